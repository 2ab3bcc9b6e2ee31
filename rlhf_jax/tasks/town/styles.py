"""Replies to a task in every style, good and bad.

"plain" and "warm" are good; "curt", "rude" and "rambling" are right but unpleasant; "unformatted"
breaks the form; "wrong", "hedging" and "garbled" fail the task. Whether a reply is right depends on
its style only, never on the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rlhf_jax.tasks.town.families.exercise import Exercise
from rlhf_jax.tasks.town.grammar import finish
from rlhf_jax.tasks.town.language import POOLS, say


def draw_style(rng: Random, weights: Mapping[str, float]) -> str:
    """A style by its weight."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def reply(rng: Random, task: Exercise, style: str) -> str:
    """A reply to `task` in one of the styles of `world.CANDIDATES`."""
    if style == "warm":
        return finish(_warm(rng, task, task.warm or task.plain, bool(task.warm)))
    if style == "curt":
        return finish(task.short or task.plain)
    if style == "rude":
        if rng.random() < 0.5:
            return finish(f"{say(rng, 'rude_lead')} {task.plain}")
        return finish(f"{task.plain} {say(rng, 'rude_tail')}")
    if style == "rambling":
        return finish(_rambling(rng, task))
    if style == "wrong":
        return finish(_warm(rng, task, task.wrong) if rng.random() < 0.5 else task.wrong)
    if style == "hedging":
        return finish(f"{task.plain} Or maybe {task.wrong}")
    if style == "unformatted":
        return finish(task.broken) if task.broken else finish(task.plain).lower().rstrip(".!?")
    if style == "garbled":
        words = f"{task.plain} {say(rng, 'filler')}".split()
        rng.shuffle(words)
        return " ".join(words)
    return finish(task.plain)


def _warm(rng: Random, task: Exercise, text: str, courteous: bool = False) -> str:
    """`text` with an opening or closing phrase, where courtesy has a place."""
    if courteous or not task.expectation.courtesy:
        return text
    if rng.random() < 0.6:
        return f"{say(rng, 'opening')} {text}"
    return f"{text} {say(rng, 'closing')}"


def _rambling(rng: Random, task: Exercise) -> str:
    """The plain reply lost among sentences that say nothing, with a further fact where there is
    one."""
    fillers = rng.sample(POOLS["filler"], 3 + int(rng.random() * 3))
    before = int(rng.random() * 3)
    middle = [task.plain, task.extra] if task.extra and rng.random() < 0.5 else [task.plain]
    return " ".join([*fillers[:before], *middle, *fillers[before:]])
