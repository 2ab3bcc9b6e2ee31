"""From the runs of a claim's arms to what each comparison came to, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import numpy as np

from rlhf_jax.claims.claim import Claim, Comparison, Measure
from rlhf_jax.claims.measures import read_values
from rlhf_jax.claims.rules import RULES, decide
from rlhf_jax.evaluation.statistics import bootstrap_interval
from rlhf_jax.sweep.statistics import Estimate, estimate

NOT_RUN = "not run"
# Of intervals. With 0.95 five placebos in a hundred are decided in the mean, often more than that.
LEVEL = 0.975
Runs = Mapping[tuple[str, int], Path]
"""The directories of finished runs by arm and seed."""


@dataclass(frozen=True)
class Found:
    """What a comparison came to.

    Attributes:
        ours, theirs: their means. difference: of the same seeds and prompts, with its interval.
        of_prompts: the interval that prompts alone give, NaN where there are none.
        seeds: the mean difference of each.
        prompts: how many; 0 of numbers that are one of each run.
    """

    comparison: Comparison
    ours: float
    theirs: float
    difference: Estimate
    of_prompts: tuple[float, float]
    seeds: tuple[float, ...]
    prompts: int
    verdict: str


@dataclass(frozen=True)
class Finding:
    """What a claim came to.

    Attributes:
        verdict: of `rules`, or "not run".
        beside: (measure, its mean, its least and its greatest value over seeds).
        failures: why, by the name of a run.
    """

    claim: Claim
    verdict: str
    tests: Sequence[Found] = ()
    conditions: Sequence[Found] = ()
    beside: Sequence[tuple[Measure, float, float, float]] = ()
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def found(self) -> list[Found]:
        """What its tests and then its conditions came to."""
        return [*self.tests, *self.conditions]


def find(claim: Claim, runs: Runs, failures: Mapping[str, str]) -> Finding:
    """Compares the runs of a claim by its rules; where one has failed the claim is not decided.

    Raises:
        UserError: a run does not have what is compared.
    """
    if failures:
        return Finding(claim, NOT_RUN, failures=failures)
    tests = [compare(each, runs, claim.seeds) for each in claim.tests]
    conditions = [compare(each, runs, claim.seeds) for each in claim.conditions]
    verdict = decide([each.verdict for each in tests], [each.verdict for each in conditions])
    beside = []
    for measure in claim.beside:
        of_seeds = [each.mean() for each, _ in _read(measure, runs, claim.seeds)]
        beside.append((measure, float(np.mean(of_seeds)), min(of_seeds), max(of_seeds)))
    return Finding(claim, verdict, tests, conditions, beside)


def compare(comparison: Comparison, runs: Runs, seeds: int) -> Found:
    """Takes the difference of the same seeds and prompts, and applies the rule to its interval."""
    ours = _read(comparison.ours, runs, seeds)
    if isinstance(comparison.theirs, Measure):
        theirs = _read(comparison.theirs, runs, seeds)
    else:
        theirs = [(np.full(each.shape, comparison.theirs), what) for each, what in ours]
    kinds = {what for _, what in (*ours, *theirs)}
    sides = [[each for each, _ in side] for side in (ours, theirs)]
    if len(kinds) > 1 or kinds == {""}:
        sides = [[each.mean(keepdims=True) for each in side] for side in sides]
    first, second = map(np.stack, sides)
    return judge(comparison, first, second)


def judge(comparison: Comparison, ours: np.ndarray, theirs: np.ndarray) -> Found:
    """What two sets of values [S, P] of the same seeds and prompts come to; P is 1 of numbers."""
    paired = ours - theirs
    difference, of_prompts = Estimate(nan, nan, nan, nan, nan, len(paired)), (nan, nan)
    if np.isfinite(paired).all():  # else nothing is known, and nothing decided
        difference = estimate(paired, level=LEVEL)
        if paired.shape[1] > 1:
            of_prompts = bootstrap_interval(paired.T, 0, confidence=LEVEL)
    prompts = paired.shape[1] if paired.shape[1] > 1 else 0
    verdict = RULES[comparison.rule](difference.low, difference.high, comparison.margin)
    return Found(
        comparison=comparison,
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        difference=difference,
        of_prompts=of_prompts,
        seeds=tuple(paired.mean(1).tolist()),
        prompts=prompts,
        verdict=verdict,
    )


def _read(measure: Measure, runs: Runs, seeds: int) -> list[tuple[np.ndarray, str]]:
    return [read_values(runs[measure.arm.name, seed], measure) for seed in range(seeds)]
