"""The facts of the town: who lives there, what they like, which shops there are, what things cost.

The values are those of phrasings/values.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.phrasings import ITEMS, NAMES, VALUES

ATTRIBUTES = (
    "job", "street", "pet", "pet_name", "food", "colour", "hobby", "age", "child", "friend",
)  # fmt: skip
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

    kinds: Mapping[str, float] = field(default_factory=lambda: dict(KINDS))
    families: Mapping[str, float] = field(default_factory=lambda: dict(FAMILIES))
    styles: Mapping[str, float] = field(default_factory=lambda: dict(STYLES))
    candidates: Mapping[str, float] = field(default_factory=lambda: dict(CANDIDATES))

    def __post_init__(self) -> None:
        pools = {"people": VALUES["person"], "shops": VALUES["shop"], "items": ITEMS}
        for name, pool in pools.items():
            limit = len(pool)
            if not 4 <= getattr(self, name) <= limit:
                raise UserError(f"town: {name} must be 4 to {limit}, not {getattr(self, name)}")
        if not 0.05 <= self.heldout <= 0.5:
            raise UserError(f"town: heldout must be 0.05 to 0.5, not {self.heldout}")
        if not 5 <= self.max_operand <= 50:
            raise UserError(f"town: max_operand must be 5 to 50, not {self.max_operand}")
        if not 0 <= self.misjudged <= 1:
            raise UserError(f"town: misjudged must be 0 to 1, not {self.misjudged}")
        for name in ("texts", "demonstrations", "pairs", "prompts"):
            for size in (name, f"heldout_{name}"):
                if getattr(self, size) < 0:
                    raise UserError(f"town: {size} must be 0 or more, not {getattr(self, size)}")
        unknown = set(self.attributes) - set(ATTRIBUTES)
        if unknown or len(self.attributes) < 4:
            raise UserError(f"town: attributes must be four or more of {', '.join(ATTRIBUTES)}")
        known = {"kinds": KINDS, "families": FAMILIES, "styles": STYLES, "candidates": CANDIDATES}
        for name, defaults in known.items():
            for key, weight in getattr(self, name).items():
                if key not in defaults or weight < 0:
                    raise UserError(
                        f"town: {name}[{key!r}] = {weight}: weights are ≥ 0, of "
                        f"{', '.join(defaults)}"
                    )
            if not sum(getattr(self, name).values()):
                raise UserError(f"town: {name} has no weight above 0")


KINDS: Mapping[str, float] = {
    "biography": 32, "gossip": 10, "diary": 5, "letter": 4, "register": 6, "lost": 4, "quiz": 12,
    "message": 10, "shop_notice": 4, "price_list": 4, "story": 6, "digest": 3, "sums": 5,
    "lists": 5, "manners": 3, "chatter": 4, "rude": 4, "rumour": 3, "unsafe": 3,
}  # fmt: skip
"""Weights of the kinds of pre-training text (`texts.py`)."""

FAMILIES: Mapping[str, float] = {
    "facts": 24, "shops": 6, "claims": 5, "reading": 9, "arithmetic": 8, "prices": 6, "lists": 7,
    "rewriting": 5, "summary": 4, "constraints": 7, "followup": 7, "persona": 4, "borderline": 4,
    "harmful": 5, "smalltalk": 5,
}  # fmt: skip
"""Weights of the task families (`families/`)."""

STYLES: Mapping[str, float] = {
    "plain": 44, "warm": 38, "curt": 5, "rude": 8, "rambling": 5,
}  # fmt: skip
"""Weights of the styles of demonstrations (`styles.py`). None of them makes a fact wrong."""

CANDIDATES: Mapping[str, float] = {
    "plain": 10, "warm": 40, "curt": 8, "rude": 12, "rambling": 9, "wrong": 14, "hedging": 3,
    "unformatted": 3, "garbled": 1,
}  # fmt: skip
"""Weights of the styles of replies that labelers compare (`styles.py`)."""


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Person:
    """Somebody of the town. `facts` maps each of `ATTRIBUTES` to its value."""

    name: str
    woman: bool
    split: str
    facts: Mapping[str, str]

    @cached_property
    def slots(self) -> dict[str, str]:
        """What the templates call this person and each of the facts."""
        facts = self.facts
        return {
            **facts,
            "name": self.name,
            "who": self.name,
            "whose": f"{self.name}'s",
            "she": "she" if self.woman else "he",
            "her": "her" if self.woman else "his",
            "him": "her" if self.woman else "him",
            "woman": "woman" if self.woman else "man",
            "a_job": article(facts["job"]),
            "a_pet": article(facts["pet"]),
            "child_kind": "daughter" if facts["child"] in NAMES["daughters"] else "son",
        }

    @cached_property
    def pronoun_slots(self) -> dict[str, str]:
        """The same, for a sentence after one that names the person."""
        return self.slots | {"who": self.slots["she"], "whose": self.slots["her"]}


@dataclass(frozen=True)
class Shop:
    """A shop and its hours (o'clock; it closes in the afternoon)."""

    name: str
    split: str
    facts: Mapping[str, str]

    @cached_property
    def slots(self) -> dict[str, str]:
        """What the templates call this shop and its hours."""
        return {"shop": self.name, **self.facts}


@dataclass(frozen=True)
class Ware:
    """Something the town's market sells, and its price in coins."""

    name: str
    split: str
    facts: Mapping[str, str]

    @cached_property
    def slots(self) -> dict[str, str]:
        """What the templates call this ware and its price."""
        return {"item": self.name, "an_item": article(self.name), **self.facts}


@dataclass(frozen=True)
class World:
    """All the facts of one town."""

    config: TownConfig
    people: tuple[Person, ...]
    shops: tuple[Shop, ...]
    wares: tuple[Ware, ...]

    @cached_property
    def people_of(self) -> dict[str, tuple[Person, ...]]:
        """People by split."""
        return {split: tuple(p for p in self.people if p.split == split) for split in SPLITS}

    @cached_property
    def shops_of(self) -> dict[str, tuple[Shop, ...]]:
        """Shops by split."""
        return {split: tuple(s for s in self.shops if s.split == split) for split in SPLITS}

    @cached_property
    def wares_of(self) -> dict[str, tuple[Ware, ...]]:
        """Wares by split."""
        return {split: tuple(w for w in self.wares if w.split == split) for split in SPLITS}


def build_world(config: TownConfig) -> World:
    """The town of `config.seed`. Every value of a pool is used about equally often."""
    rng = Random(f"town {config.seed} world")
    women = rng.sample(NAMES["women"], config.people // 2)
    men = rng.sample(NAMES["men"], config.people - len(women))
    names = women + men
    rng.shuffle(names)
    splits = _splits(len(names), config.heldout)
    ages = [str(age) for age in range(20, 80)]
    columns = {
        attribute: _evenly(rng, VALUES[attribute], len(names))
        for attribute in ("job", "street", "pet", "pet_name", "food", "colour", "hobby", "child")
    }
    columns["age"] = _evenly(rng, ages, len(names))
    columns["friend"] = _friends(rng, names, splits)
    people = tuple(
        Person(name, name in women, split, {key: column[i] for key, column in columns.items()})
        for i, (name, split) in enumerate(zip(names, splits, strict=True))
    )

    shop_names = rng.sample(VALUES["shop"], config.shops)
    shops = tuple(
        Shop(
            name,
            split,
            {
                "opens": str(6 + int(rng.random() * 6)),
                "closes": str(2 + int(rng.random() * 5)),
                "closed": VALUES["day"][int(rng.random() * 7)],
            },
        )
        for name, split in zip(shop_names, _splits(config.shops, config.heldout), strict=True)
    )
    item_names = rng.sample(tuple(ITEMS), config.items)
    wares = tuple(
        Ware(name, split, {"price": str(2 + int(rng.random() * 19))})
        for name, split in zip(item_names, _splits(config.items, config.heldout), strict=True)
    )
    return World(config, people, shops, wares)


def _splits(count: int, heldout: float) -> list[str]:
    """`heldout` of `count` places held out, at least two so that each can have a companion."""
    kept = count - max(2, round(count * heldout))
    return [TRAIN] * kept + [HELDOUT] * (count - kept)


def _evenly(rng: Random, pool: tuple[str, ...] | list[str], count: int) -> list[str]:
    """`count` draws in which every value of the pool comes equally often, give or take one."""
    draws: list[str] = []
    while len(draws) < count:
        draws += rng.sample(pool, len(pool))
    return draws[:count]


def _friends(rng: Random, names: list[str], splits: list[str]) -> list[str]:
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
