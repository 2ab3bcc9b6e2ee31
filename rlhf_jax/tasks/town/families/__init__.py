"""The task families, and `draw`, which makes one task of a family for a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from zlib import crc32

from rlhf_jax.tasks.town.families import knowledge, manners, skills
from rlhf_jax.tasks.town.families.exercise import Exercise
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN, World

FAMILIES: Mapping[str, Callable[[World, Random, str], Exercise]] = {
    "facts": knowledge.facts,
    "shops": knowledge.shops,
    "claims": knowledge.claims,
    "reading": skills.reading,
    "arithmetic": skills.arithmetic,
    "prices": skills.prices,
    "lists": skills.lists,
    "rewriting": manners.rewriting,
    "summary": skills.summary,
    "constraints": knowledge.constraints,
    "followup": knowledge.followup,
    "persona": manners.persona,
    "borderline": manners.borderline,
    "harmful": manners.harmful,
    "smalltalk": manners.smalltalk,
}
"""Each makes a task from a world and a source of chance, for "train" or "heldout"."""


def split_of(key: str) -> str:
    """The split of a content: a quarter of all contents is held out, whatever the seed."""
    return HELDOUT if crc32(key.encode()) % 4 == 0 else TRAIN


def draw(world: World, rng: Random, family: str, split: str) -> Exercise:
    """A task of `family` for `split`.

    Questions about the town are held out by person, shop, ware or phrasing (the family sets
    `Exercise.heldout`); all others by the hash of their content.
    """
    make = FAMILIES[family]
    while True:
        task = make(world, rng, split)
        if "subject" in task.meta or split_of(f"{family} {task.key}") == split:
            return task
