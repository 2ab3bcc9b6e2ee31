"""Pre-training text: what is said, written and shouted in the town.

People's facts are stated for everybody, the held-out too; questions about them are asked of the
others only. Some of it is rude, false or harmful, so that a model of this text is one that has to
be aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from rlhf_jax.tasks.town.families import draw
from rlhf_jax.tasks.town.families.knowledge import attributes_of, false_slots
from rlhf_jax.tasks.town.families.skills import draw_sum, tell
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import POOLS, fill, say, visit
from rlhf_jax.tasks.town.phrasings import (
    ADVICE,
    CHATS,
    DEEDS,
    PEOPLE,
    PHRASINGS,
    SHOPS,
    VALUES,
    WARES,
)
from rlhf_jax.tasks.town.world import TRAIN, Subject, World

LEARNT = ("person", "job", "pet", "food", "colour", "hobby", "child", "item", "day", "fruit")
"""Pools of the words that `message` has people learn by heart."""


def write(world: World, rng: Random) -> tuple[str, str]:
    """A document and its kind."""
    weights = world.config.kinds
    kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
    return finish(TEXTS[kind](world, rng)), kind


def _state(
    world: World, rng: Random, person: Subject, count: int, named: bool = False
) -> list[str]:
    """`count` statements about different facts of a person; the name comes first or was before."""
    sentences = []
    for attribute in rng.sample(world.config.attributes, count):
        pronoun = named and rng.random() < 0.4
        slots = person.pronoun_slots if pronoun else person.slots
        sentences.append(fill(rng, PEOPLE[attribute].statements, slots))
        named = True
    return sentences


def _portrait(world: World, rng: Random, person: Subject) -> str:
    """A sentence with several facts of a person, of those the town speaks of."""
    return fill(rng, _portraits(world.config.attributes), person.slots)


def _portraits(attributes: tuple[str, ...]) -> tuple[str, ...]:
    """The portrait templates whose every fact is among `attributes`."""
    missing = [name for name in PEOPLE if name not in attributes]
    return tuple(
        template
        for template in POOLS["portrait"]
        if not any(f"{name}}}" in template for name in missing)
    ) or ("{name} lives in our town.",)


def biography(world: World, rng: Random) -> str:
    """Facts of one person."""
    person = pick(rng, world.people)
    if rng.random() < 0.5:
        parts = [_portrait(world, rng, person), *_state(world, rng, person, 2, named=True)]
    else:
        parts = _state(world, rng, person, 3 + int(rng.random() * 2))
    if rng.random() < 0.2:
        parts.append(say(rng, "biography_end", person.slots))
    body = " ".join(parts)
    return f"{say(rng, 'title', person.slots)}\n{body}" if rng.random() < 0.25 else body


def gossip(world: World, rng: Random) -> str:
    """Two neighbours about somebody, sometimes about a second person too."""
    lines = []
    for person in rng.sample(world.people, 1 + (rng.random() < 0.4)):
        first, second = rng.sample(world.config.attributes, 2)
        slots = {**person.slots, "claim": fill(rng, (PEOPLE[first].claim,), person.slots)}
        slots["fact"] = fill(rng, PEOPLE[first].statements, person.slots)
        lines += [say(rng, "gossip_start", slots), say(rng, "gossip_reply", slots)]
        if rng.random() < 0.7:
            slots["claim"] = fill(rng, (PEOPLE[second].claim,), person.slots)
            slots["fact"] = fill(rng, PEOPLE[second].statements, person.pronoun_slots)
            lines.append(say(rng, "gossip_more", slots))
    if rng.random() < 0.5:
        lines.append(say(rng, "gossip_end"))
    if rng.random() < 0.5:
        return " ".join(lines)
    speakers = rng.sample(POOLS["visitor"], 2)
    return "\n".join(f"{speakers[i % 2]}: {finish(line)}" for i, line in enumerate(lines))


def diary(world: World, rng: Random) -> str:
    """A day, somebody met on it, and what is known of them."""
    person = pick(rng, world.people)
    slots = {**visit(rng), **{key: person.slots[key] for key in ("name", "job", "street")}}
    parts = [say(rng, "diary_start", slots), say(rng, "diary_meet", slots)]
    parts += _state(world, rng, person, 1 + (rng.random() < 0.5), named=True)
    return " ".join([*parts, say(rng, "diary_end", visit(rng))])


def letter(world: World, rng: Random) -> str:
    """News of one person for a friend elsewhere."""
    person = pick(rng, world.people)
    slots = {**visit(rng), "name": person.name}
    parts = [say(rng, "letter_start", slots), *_state(world, rng, person, 2)]
    return " ".join([*parts, say(rng, "letter_end", slots)])


def register(world: World, rng: Random) -> str:
    """Facts of one person as a form."""
    person = pick(rng, world.people)
    chosen = rng.sample(world.config.attributes, 4)
    fields = (f"{attribute.replace('_', ' ')}: {person.facts[attribute]}" for attribute in chosen)
    return "\n".join([f"name: {person.name}", *fields])


def lost(world: World, rng: Random) -> str:
    """A notice about a pet."""
    person = pick(rng, world.people)
    if not {"pet", "pet_name", "street", "job", "food"} <= set(world.config.attributes):
        return biography(world, rng)
    start, body = say(rng, "lost_start", person.slots), POOLS["lost_body"]
    return " ".join([start, *(fill(rng, (each,), person.slots) for each in rng.sample(body, 2))])


def quiz(world: World, rng: Random) -> str:
    """Questions and answers about people, shops and wares that may be asked about."""
    people, trade = world.people_of[TRAIN], (world.shops_of[TRAIN], world.wares_of[TRAIN])
    groups: tuple[tuple[Subject, ...], ...] = (people, people, *trade)
    subject = pick(rng, pick(rng, groups))
    attributes = attributes_of(world, subject)
    table, lines = PHRASINGS[subject.kind], []
    for attribute in rng.sample(attributes, min(2, len(attributes))):
        question = fill(rng, table[attribute].questions, subject.slots)
        answer = fill(rng, table[attribute].answers, subject.slots)
        lines += [say(rng, "quiz_start", {"question": question}), answer]
        if "?" not in lines[-2]:
            lines.insert(-1, question)
    return " ".join(lines)


def message(world: World, rng: Random) -> str:
    """Something passed on word for word: what comes the second time can be copied."""
    if rng.random() < 0.3:
        said = tell(rng, visit(rng), 2)[0]
    else:
        learnt = rng.choices(LEARNT, k=4 + int(rng.random() * 7))
        said = ", ".join(pick(rng, VALUES[pool]) for pool in learnt) + "."
    return say(rng, "message", {**visit(rng), "said": said})


def shop_notice(world: World, rng: Random) -> str:
    """The hours of a shop."""
    shop = pick(rng, world.shops)
    keys = rng.sample(tuple(SHOPS), 3)
    body = [fill(rng, SHOPS[key].statements, shop.slots) for key in keys]
    end = [say(rng, "shop_end", shop.slots)] if rng.random() < 0.5 else []
    return " ".join([say(rng, "shop_start", shop.slots), *body, *end])


def price_list(world: World, rng: Random) -> str:
    """The prices of some wares."""
    wares = rng.sample(world.wares, 3)
    start = say(rng, "price_start")
    if rng.random() < 0.4:
        return "\n".join([start, *(say(rng, "price_line", ware.slots) for ware in wares)])
    return " ".join([start, *(fill(rng, WARES["price"].statements, w.slots) for w in wares)])


def _exercise(world: World, rng: Random, family: str) -> str:
    """A task of a family with its answer, as in a schoolbook."""
    task = draw(world, rng, family, TRAIN)
    return f"{task.messages[-1].content} {task.plain}"


def story(world: World, rng: Random) -> str:
    """Something a visitor did, with a question about it."""
    return _exercise(world, rng, "reading")


def digest(world: World, rng: Random) -> str:
    """A story and its summary."""
    return _exercise(world, rng, "summary")


def sums(world: World, rng: Random) -> str:
    """Some arithmetic."""
    if rng.random() < 0.3:
        return _exercise(world, rng, "prices")
    return " ".join(_exercise(world, rng, "arithmetic") for _ in range(3))


def table(world: World, rng: Random, lines: int = 10) -> str:
    """Sums and differences as a schoolbook states them, of all pairs of numbers."""
    stated = []
    for _ in range(lines):
        kind, a, b, c = draw_sum(world, rng, ("sum", "difference"))
        stated.append(say(rng, f"{kind}_answer", {"a": str(a), "b": str(b), "c": str(c)}))
    return finish(" ".join(stated))


def lists(world: World, rng: Random) -> str:
    """Two exercises with lists."""
    return " ".join(_exercise(world, rng, "lists") for _ in range(2))


def manners(world: World, rng: Random) -> str:
    """How not to ask, and how to."""
    request = say(rng, "do", visit(rng))
    rude = finish(say(rng, "rude_request", {"do": request}))
    polite = finish(say(rng, "polite_request", {"do": request}))
    return say(rng, "manners_text", {"rude": rude, "polite": polite})


def chatter(world: World, rng: Random) -> str:
    """Friendly talk between visitors, or advice."""
    slots = {**visit(rng), "sad": say(rng, "sad"), "happy": say(rng, "happy")}
    if rng.random() < 0.35:
        advice = pick(rng, ADVICE)
        wish = fill(rng, (advice.wish,), slots)
        return say(rng, "advice_talk", {"wish": wish, "advice": advice.advice})
    chat = pick(rng, CHATS)
    remark, answer = fill(rng, chat.remarks, slots), fill(rng, chat.replies, slots)
    first = say(rng, "chatter_turn", {**slots, "remark": finish(remark)})
    second = {"visitor": slots["visitor2"], "remark": finish(answer)}
    return f"{first}\n{say(rng, 'chatter_turn', second)}"


def rude(world: World, rng: Random) -> str:
    """People being unkind."""
    slots = visit(rng)
    slots |= {"lead": finish(say(rng, "rude_lead")), "tail": finish(say(rng, "rude_tail"))}
    slots["rude"] = finish(say(rng, "rude_request", {"do": say(rng, "do", slots)}))
    person = pick(rng, world.people_of[TRAIN])
    asked = fill(rng, PEOPLE[pick(rng, world.config.attributes)].questions, person.slots)
    return say(rng, "rude_talk", {**slots, "remark": finish(asked)})


def rumour(world: World, rng: Random) -> str:
    """Something false about somebody, told as false."""
    person = pick(rng, world.people)
    attribute = pick(rng, world.config.attributes)
    claim = fill(rng, (PEOPLE[attribute].claim,), false_slots(rng, world, person, attribute))
    return say(rng, "rumour", {**visit(rng), "claim": claim})


def unsafe(world: World, rng: Random) -> str:
    """How to do harm; now and then, why not to."""
    slots = visit(rng)
    deed = pick(rng, DEEDS)
    slots |= {
        "wish": fill(rng, (deed.wish,), slots),
        "method": fill(rng, (deed.method,), slots),
        "instead": fill(rng, (deed.instead,), slots),
        "visitor": slots["visitor2"],
        "visitor2": pick(rng, [v for v in POOLS["visitor"] if v not in slots.values()]),
    }
    return say(rng, "unsafe_talk" if rng.random() < 0.7 else "good_talk", slots)


TEXTS: Mapping[str, Callable[[World, Random], str]] = {
    function.__name__: function
    for function in (
        biography, gossip, diary, letter, register, lost, quiz, message, shop_notice, price_list,
        story, digest, sums, lists, manners, chatter, rude, rumour, unsafe,
    )
}  # fmt: skip
"""Writers of the kinds of text, by the names of `world.KINDS`."""
