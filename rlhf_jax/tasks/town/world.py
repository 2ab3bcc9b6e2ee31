"""The facts of the town: who lives there, what they like, which shops there are, what things cost.

The values are those of phrasings/values.toml.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.grammar import pick
from rlhf_jax.tasks.town.phrasings import ITEMS, MIXTURES, NAMES, PEOPLE, VALUES

ATTRIBUTES = tuple(PEOPLE)
KINDS, FAMILIES, STYLES, CANDIDATES = MIXTURES.values()
TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)


@dataclass(frozen=True)
class TownConfig:
    """Sizes and mixtures of a town. Two equal configs give the same town, text and records.

    `heldout` is the fraction of people, shops and wares that training never asks about. The weights
    are relative; a family or kind left out, or of weight 0, never comes. `styles` are those of the
    demonstrations, `candidates` those of the replies that labelers compare. `misjudged` is the
    fraction of demonstrations that refuse a harmless request or obey a harmful one, out of such
    requests.
    """

    seed: int = 0
    people: int = 60
    attributes: tuple[str, ...] = ATTRIBUTES
    shops: int = 12
    items: int = 20
    heldout: float = 0.25
    max_operand: int = 20
    misjudged: float = 0.25

    texts: int = 20_000
    heldout_texts: int = 1_000
    demonstrations: int = 12_000
    heldout_demonstrations: int = 1_000
    pairs: int = 4_000
    heldout_pairs: int = 1_000
    prompts: int = 4_000
    heldout_prompts: int = 1_000

    kinds: Mapping[str, float] = field(default_factory=lambda: KINDS)
    families: Mapping[str, float] = field(default_factory=lambda: FAMILIES)
    styles: Mapping[str, float] = field(default_factory=lambda: STYLES)
    candidates: Mapping[str, float] = field(default_factory=lambda: CANDIDATES)

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "people": (4, len(VALUES["person"])),
            "shops": (4, len(VALUES["shop"])),
            "items": (4, len(ITEMS)),
            "heldout": (0.05, 0.5),
            "max_operand": (5, 50),
            "misjudged": (0, 1),
        }
        for name in ("texts", "demonstrations", "pairs", "prompts"):
            limits |= {name: (0, math.inf), f"heldout_{name}": (0, math.inf)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise UserError(f"town: {name} must be {least} to {most}, not {value}")
        unknown = set(self.attributes) - set(ATTRIBUTES)
        if unknown or len(self.attributes) < 4:
            raise UserError(f"town: attributes must be four or more of {', '.join(ATTRIBUTES)}")
        for name, defaults in MIXTURES.items():
            for key, weight in getattr(self, name).items():
                if key not in defaults or weight < 0:
                    raise UserError(
                        f"town: {name}[{key!r}] = {weight}: weights are ≥ 0, of "
                        f"{', '.join(defaults)}"
                    )
            if not sum(getattr(self, name).values()):
                raise UserError(f"town: {name} has no weight above 0")


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Subject:
    """Somebody or something that the town speaks of.

    `kind` is "people", "shops" or "wares", a table of phrasings. `facts` are a person's values of
    `ATTRIBUTES`, a shop's hours (o'clock; it closes in the afternoon), or a ware's price in coins.
    """

    kind: str
    name: str
    split: str
    facts: Mapping[str, str]
    woman: bool = False

    @cached_property
    def slots(self) -> dict[str, str]:
        """The names that templates have for this subject and each of its facts."""
        if self.kind == "shops":
            return {"shop": self.name, **self.facts}
        if self.kind == "wares":
            return {"item": self.name, "an_item": article(self.name), **self.facts}
        return {
            **self.facts,
            "name": self.name,
            "who": self.name,
            "whose": f"{self.name}'s",
            "she": "she" if self.woman else "he",
            "her": "her" if self.woman else "his",
            "him": "her" if self.woman else "him",
            "woman": "woman" if self.woman else "man",
            "a_job": article(self.facts["job"]),
            "a_pet": article(self.facts["pet"]),
            "child_kind": "daughter" if self.facts["child"] in NAMES["daughters"] else "son",
        }

    @cached_property
    def pronoun_slots(self) -> dict[str, str]:
        """The slots for a sentence after one that names the person."""
        return self.slots | {"who": self.slots["she"], "whose": self.slots["her"]}


Subjects = tuple[Subject, ...]


@dataclass(frozen=True)
class World:
    """All the facts of one town."""

    config: TownConfig
    people: Subjects
    shops: Subjects
    wares: Subjects

    @cached_property
    def people_of(self) -> dict[str, Subjects]:
        """People by split."""
        return _by_split(self.people)

    @cached_property
    def shops_of(self) -> dict[str, Subjects]:
        """Shops by split."""
        return _by_split(self.shops)

    @cached_property
    def wares_of(self) -> dict[str, Subjects]:
        """Wares by split."""
        return _by_split(self.wares)


def _by_split(subjects: Subjects) -> dict[str, Subjects]:
    return {split: tuple(s for s in subjects if s.split == split) for split in SPLITS}


def build_world(config: TownConfig) -> World:
    """The town of `config.seed`. Every value of a pool is used about equally often."""
    rng = Random(f"town {config.seed} world")
    women = rng.sample(NAMES["women"], config.people // 2)
    men = rng.sample(NAMES["men"], config.people - len(women))
    names = women + men
    rng.shuffle(names)
    splits = _splits(len(names), config.heldout)
    people = settle(rng, names, splits, women)

    def opening_hours() -> dict[str, str]:
        opens, closes = 6 + int(rng.random() * 6), 2 + int(rng.random() * 5)
        return {"opens": str(opens), "closes": str(closes), "closed": pick(rng, VALUES["day"])}

    shop_names = rng.sample(VALUES["shop"], config.shops)
    shops = tuple(
        Subject("shops", name, split, opening_hours())
        for name, split in zip(shop_names, _splits(config.shops, config.heldout), strict=True)
    )
    item_names = rng.sample(tuple(ITEMS), config.items)
    wares = tuple(
        Subject("wares", name, split, {"price": str(2 + int(rng.random() * 19))})
        for name, split in zip(item_names, _splits(config.items, config.heldout), strict=True)
    )
    return World(config, people, shops, wares)


def settle(
    rng: Random, names: Sequence[str], splits: Sequence[str], women: Collection[str]
) -> Subjects:
    """People of these names and splits, each with a value of every attribute."""
    ages = [str(age) for age in range(20, 80)]
    columns = {
        attribute: _evenly(rng, VALUES[attribute], len(names))
        for attribute in ("job", "street", "pet", "pet_name", "food", "colour", "hobby", "child")
    }
    columns["age"] = _evenly(rng, ages, len(names))
    columns["friend"] = _friends(rng, names, splits)
    facts = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return tuple(
        Subject("people", name, split, of_person, name in women)
        for name, split, of_person in zip(names, splits, facts, strict=True)
    )


def _splits(count: int, heldout: float) -> list[str]:
    """`heldout` of `count` places held out, at least two so that each can have a companion."""
    training = count - max(2, round(count * heldout))
    return [TRAIN] * training + [HELDOUT] * (count - training)


def _evenly(rng: Random, pool: tuple[str, ...] | list[str], count: int) -> list[str]:
    """`count` draws in which every value of the pool comes equally often, give or take one."""
    draws: list[str] = []
    while len(draws) < count:
        draws += rng.sample(pool, len(pool))
    return draws[:count]


def _friends(rng: Random, names: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Everybody's best friend, and the other way round; three friends in a ring if they are odd.

    Friends are of the same split, so held-out names stay out of training.
    """
    friend: dict[str, str] = {}
    for split in SPLITS:
        group = [name for name, other in zip(names, splits, strict=True) if other == split]
        rng.shuffle(group)
        odd = group[: 3 * (len(group) % 2)]
        friend |= dict(zip(odd, odd[1:] + odd[:1], strict=True))
        for one, other in zip(group[len(odd) :: 2], group[len(odd) + 1 :: 2], strict=True):
            friend |= {one: other, other: one}
    return [friend[name] for name in names]
