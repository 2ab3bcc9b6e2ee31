"""The filters that a command line asks for, one after the other."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.filter import models, texts
from rlhf_jax.filter.records import Item
from rlhf_jax.filter.texts import Band, Find


@dataclass(frozen=True)
class Step:
    """A filter: the name of its reason, what it takes out in words, and what finds that."""

    reason: str
    rule: str
    find: Find


@dataclass(frozen=True)
class Fate:
    """Why an item went."""

    reason: str
    why: str


def steps_of(given: argparse.Namespace) -> list[Step]:
    """The filters in their order, which is that of the options.

    Near duplicates come last: no record goes for being like one that goes itself.

    Raises:
        UserError: an option is out of its range, or lacks another that it needs.
    """
    for band, judge in (("perplexity", "model"), ("score", "scorer")):
        if (getattr(given, band) is None) != (getattr(given, judge) is None):
            raise UserError(f"--{band} and --{judge} need each other")
    if given.model is not None and not Path(given.model).is_dir():
        raise UserError(f"--model={given.model} is no directory of a run or of a model")
    if given.scorer is not None:
        models.weights_of(given.scorer)
    if given.overlap is not None and not given.against:
        raise UserError("--overlap needs --against, the evaluation sets that it is a share of")
    steps = [Step("duplicate", "turns and label of an earlier record", texts.duplicates)]
    if given.against:
        overlap = texts.OVERLAP if given.overlap is None else given.overlap
        _check_share("overlap", overlap)
        held_out = texts.EvaluationSet(given.against)
        rule = f"at least {overlap:.0%} of the words of a prompt of {given.against}"
        find: Find = partial(held_out.contaminated, overlap=overlap)
        steps.append(Step("contaminated", rule, find))
    if given.finished:
        steps.append(Step("truncated", "stops in mid-sentence", texts.truncated))
    if given.repetition is not None:
        _check_share("repetition", given.repetition)
        find = partial(texts.repetitive, most=given.repetition)
        rule = f"over {given.repetition:.0%} of its {texts.LOOP}-grams of words came before"
        steps.append(Step("repetition", rule, find))
    if given.words is not None:
        find = partial(texts.wrong_length, band=Band.parse("words", given.words))
        steps.append(Step("length", f"words of the reply outside {given.words}", find))
    if given.perplexity is not None:
        find = partial(
            models.unlikely, band=Band.parse("perplexity", given.perplexity), run=given.model
        )
        steps.append(Step("perplexity", f"outside {given.perplexity} under {given.model}", find))
    if given.score is not None:
        find = partial(models.unworthy, band=Band.parse("score", given.score), scorer=given.scorer)
        steps.append(Step("score", f"outside {given.score} by {given.scorer}", find))
    if given.near is not None:
        _check_share("near", given.near)
        if importlib.util.find_spec("datasketch") is None:
            raise UserError("--near needs datasketch: pip install -r requirements-filter.txt")
        find = partial(texts.near_duplicates, threshold=given.near)
        grams = f"{texts.CHARACTERS}-grams of characters"
        rule = f"Jaccard similarity of {grams} to a kept record of {given.near:g} or more"
        steps.append(Step("near duplicate", rule, find))
    return steps


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"--{name} must be above 0 and at most 1, not {value:g}")


def run_filters(items: Sequence[Item], steps: Sequence[Step]) -> dict[int, Fate]:
    """Why items went, by their index; each step sees what those before it have left."""
    fates: dict[int, Fate] = {}
    left = [*range(len(items))]
    for step in steps:
        gone = step.find([items[i] for i in left])
        fates |= {left[n]: Fate(step.reason, why) for n, why in gone.items()}
        left = [i for n, i in enumerate(left) if n not in gone]
    return fates
