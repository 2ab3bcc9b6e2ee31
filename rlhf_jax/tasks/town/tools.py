"""The town's tools: functions of what the town knows, of the bookings there are, and of a call.

calculate(expression)       the exact result of "17 + 25 - 3 x 2": integers, +, - and x
directory(name, attribute)  a fact about a person, also about residents who are in no text
shop(name)                  a shop's hours
price(item)                 what a ware costs, in coins
book(shop, day)             books a shop for a day unless it is closed or full: the one tool that
                            changes something
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, TypeVar

from rlhf_jax.tasks.town.phrasings import TOOLS, VALUES, WORDS
from rlhf_jax.tasks.town.world import (
    HELDOUT,
    SPLITS,
    TRAIN,
    Subject,
    Subjects,
    TownConfig,
    World,
    build_world,
    settle,
)

Bookings = frozenset[tuple[str, str]]  # of shops and days
RESIDENTS = {TRAIN: 9000, HELDOUT: 300}  # so many that no name comes often
MOST_DIGITS, MOST_OF_RESULT = 9, 100  # Python refuses to write numbers of 4,301
T = TypeVar("T")
_TERM = re.compile(r" *([0-9]+) *")


class InvalidCall(Exception):
    """A call that no tool can answer; its text says why, to whoever called."""


@dataclass(frozen=True)
class Office:
    """What the tools look things up in: a town, and residents of whom nothing is written anywhere.

    `residents` are by split; `directory` has everybody by name.
    """

    world: World
    residents: Mapping[str, Subjects]
    directory: Mapping[str, Subject]
    shops: Mapping[str, Subject]
    wares: Mapping[str, Subject]


@cache
def open_office(seed: int = 0) -> Office:
    """The office of the town of that seed, with `RESIDENTS` of both splits."""
    world = build_world(TownConfig(seed=seed))
    rng = Random(f"town {seed} residents")
    names = rng.sample(new_names(), sum(RESIDENTS.values()))
    splits = [split for split in SPLITS for _ in range(RESIDENTS[split])]
    women = {name for name in names if rng.random() < 0.5}
    people = settle(rng, names, splits, women)
    residents = {split: tuple(p for p in people if p.split == split) for split in SPLITS}
    by_name = [{each.name: each for each in group} for group in
               ((*world.people, *people), world.shops, world.wares)]  # fmt: skip
    return Office(world, residents, *by_name)


@cache
def new_names() -> list[str]:
    """All names that can be made of the parts of tools.toml, without any word of the town."""
    parts = (TOOLS["onsets"], TOOLS["vowels"], TOOLS["middles"], TOOLS["endings"])
    names = [""]
    for part in parts:
        names = [name + each for name in names for each in part]
    return [name for name in names if name.lower() not in WORDS]


def calculate(expression: str) -> str:
    """The value of an expression in integers, + - and x (or *), products first."""
    terms: list[int] = []
    signs: list[str] = []
    place = 0
    while True:
        term = _TERM.match(expression, place)
        if term is None:
            raise InvalidCall(f"no number at place {place + 1} of {expression!r}")
        if len(term[1]) > MOST_DIGITS:
            raise InvalidCall(f"a number of more than {MOST_DIGITS} digits")
        terms.append(int(term[1]))
        place = term.end()
        if place == len(expression):
            break
        if expression[place] not in "+-x*":
            raise InvalidCall(f"{expression[place]!r} is none of + - x")
        signs.append(expression[place])
        place += 1
    summands = terms[:1]
    for sign, value in zip(signs, terms[1:], strict=True):
        if sign in "x*":
            summands[-1] *= value
        else:
            summands.append(value if sign == "+" else -value)
    if abs(value := sum(summands)) >= 10**MOST_OF_RESULT:
        raise InvalidCall(f"a result of more than {MOST_OF_RESULT} digits")
    return str(value)


def directory(office: Office, name: str, attribute: str) -> str:
    """A fact about a person."""
    person = _known(office.directory, "person", name)
    return _known(person.facts, "attribute", attribute)


def shop(office: Office, name: str) -> str:
    """When a shop opens and closes, and on which day it does not."""
    hours = _known(office.shops, "shop", name).facts
    return f"opens at {hours['opens']}, closes at {hours['closes']}, closed on {hours['closed']}"


def price(office: Office, item: str) -> str:
    """What a ware costs, in coins."""
    return _known(office.wares, "ware", item).facts["price"]


def book(office: Office, bookings: Bookings, name: str, day: str) -> tuple[str, Bookings]:
    """What comes of booking a shop, and the bookings after it."""
    hours = _known(office.shops, "shop", name).facts
    if day not in VALUES["day"]:
        raise InvalidCall(f"there is no day {day!r}")
    if hours["closed"] == day:
        return "closed", bookings
    if (name, day) in bookings:
        return "full", bookings
    return "booked", bookings | {(name, day)}


def _known(table: Mapping[str, T], kind: str, key: str) -> T:
    if key not in table:
        raise InvalidCall(f"there is no {kind} {key!r}")
    return table[key]


PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "calculate": ("expression",),
    "directory": ("name", "attribute"),
    "shop": ("name",),
    "price": ("item",),
    "book": ("shop", "day"),
}
"""What each tool must be given, all of it text."""


def use(
    office: Office, bookings: Bookings, name: str, arguments: Mapping[str, Any]
) -> tuple[str, Bookings]:
    """The result of a call, and the bookings after it.

    Raises:
        InvalidCall: there is no such tool, it takes other arguments, or it knows nothing of them.
    """
    if name not in PARAMETERS:
        raise InvalidCall(f"there is no tool {name!r}")
    expected = PARAMETERS[name]
    if {*arguments} != {*expected} or not all(isinstance(a, str) for a in arguments.values()):
        raise InvalidCall(f"{name} takes the texts {', '.join(expected)}")
    values = [arguments[parameter] for parameter in expected]
    if name == "book":
        return book(office, bookings, *values)
    if name == "calculate":
        return calculate(*values), bookings
    return _LOOKUPS[name](office, *values), bookings


_LOOKUPS: Mapping[str, Callable[..., str]] = {"directory": directory, "shop": shop, "price": price}


class Desk:
    """The tools for whoever has no exercise to solve, as in a chat: one desk, its own bookings."""

    def __init__(self) -> None:
        self._bookings: Bookings = frozenset()

    def calculate(self, expression: str) -> str:
        """Calculates with integers.

        Args:
            expression: such as 17 + 25 - 3 x 2
        """
        return self._use("calculate", expression=expression)

    def directory(self, name: str, attribute: str) -> str:
        """Looks up a fact about a person.

        Args:
            name: whose
            attribute: job, street, pet, pet_name, food, colour, hobby, age, child or friend
        """
        return self._use("directory", name=name, attribute=attribute)

    def shop(self, name: str) -> str:
        """Looks up when a shop is open.

        Args:
            name: of the shop
        """
        return self._use("shop", name=name)

    def price(self, item: str) -> str:
        """Looks up what a ware costs.

        Args:
            item: the ware
        """
        return self._use("price", item=item)

    def book(self, shop: str, day: str) -> str:
        """Books a shop.

        Args:
            shop: its name
            day: of the week
        """
        return self._use("book", shop=shop, day=day)

    def _use(self, tool: str, /, **arguments: str) -> str:
        result, self._bookings = use(open_office(), self._bookings, tool, arguments)
        return result
