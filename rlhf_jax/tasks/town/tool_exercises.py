"""Exercises that the town's tools solve: what is asked, the calls it takes, the answer, the state.

sums                   large sums, differences and products
people                 a fact about a resident of whom nothing is written
two_hops               a fact about such a resident's best friend
search_and_calculate   an age in some years, the price of several wares
trade                  a shop's hours, a ware's price
booking                a shop for a day; some are closed or full
no_tool                the town's exercises that need none
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from rlhf_jax.data.calls import render_call
from rlhf_jax.data.records import Conversation, Message, Prompt, Text
from rlhf_jax.tasks.town import families
from rlhf_jax.tasks.town.families.exercise import Expectation, loads, lower, user
from rlhf_jax.tasks.town.families.knowledge import ask, fact_task
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import fill, say, visit
from rlhf_jax.tasks.town.phrasings import ITEMS, PHRASINGS, TOOLS, VALUES
from rlhf_jax.tasks.town.styles import draw_style
from rlhf_jax.tasks.town.tools import Bookings, Office, use
from rlhf_jax.tasks.town.world import ATTRIBUTES, HELDOUT, TRAIN, Subject

MOST = 500  # of a sum's operands
RECORDS = {TRAIN: 16_000, HELDOUT: 2_000}
Call = tuple[str, dict[str, str]]  # a tool's name and its arguments


@dataclass(frozen=True)
class ToolExercise:
    """A question, the least calls that answer it, a right answer and how the answer is judged.

    `full` are the bookings before, `booked` what is to be added to them. `key` names the content,
    by which it is held out; it is "" where the people asked about are.
    """

    messages: tuple[Message, ...]
    calls: tuple[Call, ...]
    answer: str
    expectation: Expectation
    key: str = ""
    full: Bookings = frozenset()
    booked: Bookings = frozenset()


@dataclass(frozen=True)
class Goal:
    """What an episode is judged by: the answer, the bookings at its end, the calls it takes."""

    expectation: Expectation
    calls: int
    full: Bookings
    booked: Bookings

    def dumps(self) -> str:
        """Returns a JSON string, to travel in a record's `meta`; `read_goal` is the inverse."""
        pairs = {"full": sorted(self.full), "booked": sorted(self.booked)}
        return json.dumps({"expectation": self.expectation.dumps(), "calls": self.calls} | pairs)


def read_goal(text: str) -> Goal:
    """The goal written by `Goal.dumps`."""
    fields = json.loads(text)
    full, booked = (frozenset(map(tuple, fields[name])) for name in ("full", "booked"))
    return Goal(loads(fields["expectation"]), int(fields["calls"]), full, booked)


def sums(office: Office, rng: Random, split: str) -> ToolExercise:
    """What is 317 plus 425?"""
    kind = pick(rng, ("sum", "difference", "product", "more", "less"))
    x, y = (2 + int(rng.random() * (MOST - 1)) for _ in range(2))
    if kind in ("difference", "less"):
        x, y = max(x, y), min(x, y)
    sign = {"sum": "+", "more": "+", "product": "x"}.get(kind, "-")
    call = ("calculate", {"expression": f"{x} {sign} {y}"})
    slots = {**visit(rng), "a": str(x), "b": str(y)}
    question = _say(rng, f"{kind}_question", slots)
    slots["c"] = use(office, frozenset(), *call)[0]
    return ToolExercise(
        user(finish(question)),
        (call,),
        _say(rng, "found_answer", slots),
        _number(slots),
        key=f"{min(x, y)} {max(x, y)} {sign}",
    )


def people(office: Office, rng: Random, split: str) -> ToolExercise:
    """Where does Savur live?"""
    person = pick(rng, office.residents[split])
    attribute = pick(rng, ATTRIBUTES)
    return _fact(office, rng, person, attribute, person.slots, (_search(person, attribute),))


def two_hops(office: Office, rng: Random, split: str) -> ToolExercise:
    """Where does Savur's best friend live?"""
    person = pick(rng, office.residents[split])
    friend = office.directory[person.facts["friend"]]
    attribute = pick(rng, [each for each in ATTRIBUTES if each != "friend"])
    called = f"{person.name}'s best friend"
    slots = friend.slots | {"who": called, "whose": f"{called}'s"}
    hops = (_search(person, "friend"), _search(friend, attribute))
    made = _fact(office, rng, friend, attribute, slots, hops)
    answer = _say(rng, "found_answer", {"c": friend.facts[attribute]})
    return dataclasses.replace(made, answer=answer)


def search_and_calculate(office: Office, rng: Random, split: str) -> ToolExercise:
    """How old will Savur be in 12 years? What do 12 lamps cost?"""
    number = str(2 + int(rng.random() * 59))
    if rng.random() < 0.5:
        person = pick(rng, office.residents[split])
        search, found, sign = _search(person, "age"), person.facts["age"], "+"
        kind, slots, key = "older", dict(person.slots), ""
    else:
        ware = pick(rng, office.world.wares)
        search, found, sign = ("price", {"item": ware.name}), ware.facts["price"], "x"
        kind, slots, key = "several", {"items": ITEMS[ware.name]}, f"{number} {ware.name}"
    call = ("calculate", {"expression": f"{found} {sign} {number}"})
    slots |= {"a": found, "b": number, "c": use(office, frozenset(), *call)[0]}
    return ToolExercise(
        user(ask(rng, _say(rng, f"{kind}_question", slots))),
        (search, call),
        _say(rng, "found_answer", slots),
        _number(slots),
        key=key,
    )


def trade(office: Office, rng: Random, split: str) -> ToolExercise:
    """When does the gym open? What does a lamp cost?"""
    subject = pick(rng, office.world.shops + office.world.wares)
    attribute = pick(rng, tuple(subject.facts))
    tool, parameter = ("shop", "name") if subject.kind == "shops" else ("price", "item")
    call = (tool, {parameter: subject.name})
    made = _fact(office, rng, subject, attribute, subject.slots, (call,))
    return dataclasses.replace(made, key=made.messages[0].content)


def booking(office: Office, rng: Random, split: str) -> ToolExercise:
    """Please book the gym for Monday. If that can't be done, take Friday."""
    place = pick(rng, office.world.shops)
    closed = place.facts["closed"]
    day, other = rng.sample([each for each in VALUES["day"] if each != closed], 2)
    fate = pick(rng, ("booked", "booked", "closed", "full"))
    if fate == "closed":
        day = closed
    full = frozenset({(place.name, day)} if fate == "full" else ())
    either = rng.random() < 0.5
    slots = {"shop": place.name, "day": day, "day2": other}
    question = _say(rng, "either_question" if either else "book_question", slots)
    days = [day]
    if either and fate != "booked":
        days, fate = [day, other], "booked"
    slots["day"] = days[-1]
    mark = {"booked": (f"booked for {days[-1]}", f"{place.name} for {days[-1]}")}
    required = lower(*mark.get(fate, (f"{fate} on {days[-1]}",)))
    return ToolExercise(
        user(finish(question)),
        tuple(("book", {"shop": place.name, "day": each}) for each in days),
        _say(rng, f"{fate}_answer", slots),
        Expectation(required=(required,), allowed=lower(place.name)),
        key=f"{place.name} {day} {other} {either}",
        full=full,
        booked=frozenset({(place.name, days[-1])} if fate == "booked" else ()),
    )


def no_tool(office: Office, rng: Random, split: str) -> ToolExercise:
    """Good morning! I am Tara."""
    task = families.draw(office.world, rng, draw_style(rng, TOOLS["untooled"]), split)
    return ToolExercise(task.messages, (), task.warm or task.plain, task.expectation)


FAMILIES: Mapping[str, Callable[[Office, Random, str], ToolExercise]] = {
    make.__name__: make
    for make in (sums, people, two_hops, search_and_calculate, trade, booking, no_tool)
}
"""Each makes an exercise from an office and a source of chance, for "train" or "heldout"."""


def draw(office: Office, split: str, index: int) -> tuple[ToolExercise, Prompt]:
    """The exercise of that index, and its record.

    `meta`: "family", and "goal" for `episodes.judge`.
    """
    rng = Random(f"town {office.world.config.seed} tools {split} {index}")
    family = draw_style(rng, TOOLS["weights"])
    made = FAMILIES[family](office, rng, split)
    while made.key and families.split_of(f"{family} {made.key}") != split:
        made = FAMILIES[family](office, rng, split)
    goal = Goal(made.expectation, len(made.calls), made.full, made.booked)
    meta = {"family": family, "goal": goal.dumps()}
    return made, Prompt(f"{split}-{index}", made.messages, meta)


def prompts(office: Office, split: str) -> Iterator[Prompt]:
    """Exercises as prompts."""
    for index in range(RECORDS[split]):
        yield draw(office, split, index)[1]


def dialogues(office: Office, split: str) -> Iterator[Conversation]:
    """The prompts of `prompts`, each with its calls, their results, and the answer."""
    for index in range(RECORDS[split]):
        made, prompt = draw(office, split, index)
        turns, bookings = list(made.messages), made.full
        for name, arguments in made.calls:
            result, bookings = use(office, bookings, name, arguments)
            turns += [Message("assistant", render_call(name, arguments)), Message("tool", result)]
        turns.append(Message("assistant", finish(made.answer)))
        yield Conversation(prompt.id, tuple(turns), prompt.meta)


def direct(office: Office, split: str) -> Iterator[Conversation]:
    """The prompts of `prompts`, each with its answer and no call: what a model without tools is
    taught."""
    for index in range(RECORDS[split]):
        made, prompt = draw(office, split, index)
        answer = Message("assistant", finish(made.answer))
        yield Conversation(prompt.id, (*prompt.messages, answer), prompt.meta)


def drills(office: Office, split: str) -> Iterator[Text]:
    """Names and numbers to copy, twice each and once as JSON: what a call is made of."""
    for index in range(RECORDS[split]):
        rng = Random(f"town {office.world.config.seed} drills {split} {index}")
        listed = [
            pick(rng, office.residents[split]).name
            if rng.random() < 0.5
            else str(int(10 ** (1 + 5 * rng.random())))
            for _ in range(1 + int(rng.random() * 6))
        ]
        ways = [", ".join(listed), json.dumps(listed), " and ".join(listed)]
        rng.shuffle(ways)
        yield Text(f"{split}-{index}", "\n".join(ways))


def _search(person: Subject, attribute: str) -> Call:
    return "directory", {"name": person.name, "attribute": attribute}


def _fact(
    office: Office,
    rng: Random,
    subject: Subject,
    attribute: str,
    slots: Mapping[str, str],
    calls: tuple[Call, ...],
) -> ToolExercise:
    """The question for one attribute of a subject, who is called as `slots` have it."""
    phrasing = PHRASINGS[subject.kind][attribute]
    question = user(ask(rng, fill(rng, phrasing.questions, slots)))
    task = fact_task(office.world, rng, subject, attribute, question, "")
    # Which pet it is that has the name, nobody has looked up.
    told = [each for each in phrasing.answers if "{pet}" not in each]
    return ToolExercise(question, calls, fill(rng, told, subject.slots), task.expectation)


def _number(slots: Mapping[str, str]) -> Expectation:
    """An answer that ends in the number c, may repeat a and b, and names nothing else."""
    return Expectation(required=((slots["c"],),), allowed=(slots["a"], slots["b"]), concludes=True)


def _say(rng: Random, pool: str, slots: Mapping[str, str]) -> str:
    """A random member of a pool of tools.toml, or else of the town's."""
    if pool in TOOLS["pools"]:
        return fill(rng, TOOLS["pools"][pool], slots)
    return say(rng, pool, slots)
