"""Families that need no knowledge of the town: reading, numbers, prices, lists, summaries."""

from __future__ import annotations

from random import Random

from rlhf_jax.tasks.town.families.exercise import Exercise, Expectation, lower, user
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import KINDS_OF_THINGS, NUMBERS, fill, say, visit
from rlhf_jax.tasks.town.phrasings import HAPPENINGS, ITEMS, VALUES, Happening
from rlhf_jax.tasks.town.world import World, article


def tell(rng: Random, slots: dict[str, str], count: int) -> tuple[str, list[Happening]]:
    """A passage of `count` happenings that share no slot, and the happenings."""
    chosen = rng.sample(HAPPENINGS, count)
    sentences = [fill(rng, chosen[0].statements, slots)]
    later = {**slots, "who": slots["she"]}
    if slots["visitor"] not in sentences[0]:
        later = slots
    for happening in chosen[1:]:
        sentences.append(fill(rng, happening.statements, later))
        if slots["visitor"] in sentences[-1]:
            later = {**slots, "who": slots["she"]}
    return finish(" ".join(sentences)), chosen


def reading(world: World, rng: Random, split: str) -> Exercise:
    """Kai bought 3 figs at the inn. It was a sunny day. … How many figs did Kai buy?"""
    slots = visit(rng)
    passage, chosen = tell(rng, slots, 2 + (rng.random() < 0.5))
    happening = pick(rng, chosen)
    asked = pick(rng, happening.asks)
    truth = slots[asked.slot]
    pool = NUMBERS if asked.slot == "number" else VALUES.get(asked.slot.rstrip("2"), ())
    options = tuple(ITEMS) if asked.slot == "item" else pool
    value = pick(rng, [o for o in options if o not in (truth, slots["visitor"])])
    false = {**slots, asked.slot: value}
    if asked.slot in ("item", "pet"):
        false["an_item" if asked.slot == "item" else "a_pet"] = article(value)
    question = fill(rng, asked.questions, slots)
    return Exercise(
        messages=user(finish(say(rng, "read_prompt", {"passage": passage, "question": question}))),
        plain=fill(rng, asked.answers, slots),
        short=fill(rng, (asked.short + ".",), slots),
        wrong=fill(rng, asked.answers, false),
        expectation=Expectation(
            required=(lower(truth),),
            allowed=lower(slots["visitor"], *(slots[slot] for slot in happening.slots)),
            max_words=16,
        ),
        key=passage,
        meta={"attribute": asked.slot},
    )


def draw_sum(world: World, rng: Random, kinds: tuple[str, ...]) -> tuple[str, int, int, int]:
    """One of the kinds, two numbers, and their sum or ("difference", "less") difference."""
    kind = pick(rng, kinds)
    x, y = (2 + int(rng.random() * (world.config.max_operand - 1)) for _ in range(2))
    return (kind, x, y, x + y) if kind in ("sum", "more") else (kind, x + y, x, y)


def arithmetic(world: World, rng: Random, split: str) -> Exercise:
    """What is 7 plus 12? Kai had 9 figs and ate 2. How many figs are left?"""
    kinds = ("sum", "sum", "difference", "difference", "more", "less")
    kind, a, b, c = draw_sum(world, rng, kinds)
    slots = {**visit(rng), "a": str(a), "b": str(b), "c": str(c)}
    false = {**slots, "c": _near(rng, c, (a, b))}
    answer = f"{kind}_answer"
    return Exercise(
        messages=user(finish(say(rng, f"{kind}_question", slots))),
        plain=say(rng, answer, slots),
        short=f"{c}.",
        wrong=say(rng, answer, false),
        expectation=Expectation(
            required=((str(c),),),
            allowed=lower(str(a), str(b), slots["visitor"], slots["fruit"]),
            concludes=True,
        ),
        key=f"{min(a, b)} {max(a, b)} {kind in ('sum', 'more')}",
        meta={"kind": kind},
    )


def prices(world: World, rng: Random, split: str) -> Exercise:
    """At the fair a hat costs 3 coins and a pen costs 2 coins. How much do they cost together?"""
    kind = pick(rng, ("together", "cheaper", "change", "twice"))
    a, b = rng.sample(range(2, 20), 2)
    if kind == "change":
        a, b = max(a, b) + 1, min(a, b)
    c = {"together": a + b, "cheaper": min(a, b), "change": a - b, "twice": 2 * a}[kind]
    slots = {**visit(rng), "a": str(a), "b": str(b), "c": str(c)}
    first, second = slots["item"], slots["item2"]
    slots["cheap"], dear = (first, second) if a < b else (second, first)
    false = {**slots, "c": _near(rng, c, (a, b)), "cheap": dear}
    choice = kind == "cheaper"
    content = {"change": (first, a, b), "twice": (first, a)}.get(kind, (first, second, a, b))
    return Exercise(
        messages=user(finish(say(rng, f"{kind}_question", slots))),
        plain=say(rng, f"{kind}_answer", slots),
        short=f"the {slots['cheap']}." if choice else say(rng, "coins_short", slots) + ".",
        wrong=say(rng, f"{kind}_answer", false),
        expectation=Expectation(
            required=(lower(slots["cheap"]) if choice else (str(c),),),
            allowed=() if choice else lower(first, second, slots["items"], str(a), str(b), "2"),
            concludes=not choice,
        ),
        key=f"{kind} {content}",
        meta={"kind": kind},
    )


def _near(rng: Random, truth: int, given: tuple[int, int]) -> str:
    """A number above 1 near `truth` that is neither it nor given."""
    near = (truth + step for step in (-10, -3, -2, -1, 1, 2, 3, 10))
    return str(pick(rng, [number for number in near if number > 1 and number not in given]))


def lists(world: World, rng: Random, split: str) -> Exercise:
    """Sort these numbers: 31, 8, 12. How many colours are in this list: …?"""
    kind = pick(rng, ("sort", "sort", "alphabet", "count", "extreme", "end", "odd"))
    if kind in ("sort", "extreme"):
        return _numbers(rng, kind)
    name = pick(rng, tuple(KINDS_OF_THINGS))
    words = rng.sample(KINDS_OF_THINGS[name], 3 + int(rng.random() * (3 if kind == "count" else 2)))
    slots = {"kind": name, "list": ", ".join(words), "end": pick(rng, ("first", "last"))}
    if kind == "alphabet":
        right, wrong = sorted(words), sorted(words, reverse=True)
        return _order(rng, kind, slots, right, wrong)
    if kind == "count":
        truth, miss = str(len(words)), str(len(words) + pick(rng, (-1, 1)))
    elif kind == "end":
        truth, miss = (words[0], words[1]) if slots["end"] == "first" else (words[-1], words[0])
    else:
        other = pick(rng, [kind for kind in KINDS_OF_THINGS if kind not in (name, "things")])
        truth = pick(rng, KINDS_OF_THINGS[other])
        place = int(rng.random() * 3)
        words = [*words[:place], truth, *words[place:2]]
        slots |= {"kind": other, "list": ", ".join(words)}
        miss = words[1 if place == 0 else 0]
    return _choice(rng, kind, slots, truth, miss)


def _numbers(rng: Random, kind: str) -> Exercise:
    numbers = rng.sample(range(1, 50), 3 + int(rng.random() * 2))
    shown = ", ".join(map(str, numbers))
    slots = {"list": shown, "extreme": pick(rng, ("largest", "smallest"))}
    ranked = [str(number) for number in sorted(numbers)]
    if kind == "sort":
        return _order(rng, kind, slots, ranked, ranked[::-1])
    truth, miss = ranked[-1], ranked[-2]
    if slots["extreme"] == "smallest":
        truth, miss = ranked[0], ranked[1]
    return _choice(rng, kind, slots, truth, miss)


def _order(
    rng: Random, kind: str, slots: dict[str, str], right: list[str], wrong: list[str]
) -> Exercise:
    """The task to put the list into the right order."""
    return Exercise(
        messages=user(finish(say(rng, f"{kind}_question", slots))),
        plain=say(rng, "order_answer", {"list": ", ".join(right)}),
        short=", ".join(right) + ".",
        wrong=say(rng, "order_answer", {"list": ", ".join(wrong)}),
        expectation=Expectation(
            required=tuple(lower(value) for value in right), ordered=True, min_words=5
        ),
        key=f"{kind} {right}",
        meta={"kind": kind},
    )


def _choice(rng: Random, kind: str, slots: dict[str, str], truth: str, miss: str) -> Exercise:
    """The task to name one thing about the list."""
    return Exercise(
        messages=user(finish(say(rng, f"{kind}_question", slots))),
        plain=say(rng, f"{kind}_answer", {**slots, "c": truth}),
        short=f"{truth}.",
        wrong=say(rng, f"{kind}_answer", {**slots, "c": miss}),
        expectation=Expectation(required=(lower(truth),)),
        key=f"{kind} {slots['list']}",
        meta={"kind": kind},
    )


def summary(world: World, rng: Random, split: str) -> Exercise:
    """A short story of four sentences, to be told in one."""
    slots = visit(rng)
    plot = dict(slots)
    plot["goal"] = say(rng, "goal", slots)
    plot["outcome"] = say(rng, "outcome", {**slots, "who": slots["she"]})
    wrong = dict(plot)
    while wrong["goal"] == plot["goal"]:
        wrong["goal"] = say(rng, "goal", visit(rng))
    later = {**slots, "who": slots["she"]}
    sentences = [
        say(rng, "goal_tail", plot),
        say(rng, "goal_detail", later),
        say(rng, "trouble", later),
        say(rng, "outcome_tail", plot),
    ]
    passage = finish(" ".join(sentences))
    named = [slots[s] for s in ("visitor", "visitor2", "item", "shop", "food", "pet", "place")]
    return Exercise(
        messages=user(finish(say(rng, "summary_prompt", {"passage": passage}))),
        plain=say(rng, "summary_answer", plot),
        wrong=say(rng, "summary_answer", wrong),
        expectation=Expectation(
            required=(lower(slots["visitor"]), lower(plot["goal"]), lower(plot["outcome"])),
            allowed=lower(*named, slots["hobby"]),
            max_words=20,
        ),
        key=passage,
    )
