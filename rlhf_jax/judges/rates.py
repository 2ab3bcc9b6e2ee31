"""The rate behind a judge's verdicts: corrected for its sensitivity and specificity.

How to Correctly Report LLM-as-a-Judge Evaluations (Lee et al., 2025),
https://arxiv.org/abs/2511.21140; Estimating Prevalence from the Results of a Screening Test (Rogan
& Gladen, 1978), https://doi.org/10.1093/oxfordjournals.aje.a112510
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt
from typing import NamedTuple

Z = 1.959964


class Rate(NamedTuple):
    """A rate in [0, 1] with its 95 % interval; NaN where nothing tells it."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """How often a judge was right on items whose truth is known.

    Attributes:
      hits: it said yes, of `positives` that are.
      rejections: it said no, of `negatives` that are not.
    """

    hits: int
    positives: int
    rejections: int
    negatives: int

    @property
    def sensitivity(self) -> float:
        """The share of positives that it calls so, q₁; NaN where there is none."""
        return self.hits / self.positives if self.positives else nan

    @property
    def specificity(self) -> float:
        """The share of negatives that it calls so, q₀; NaN where there is none."""
        return self.rejections / self.negatives if self.negatives else nan


def corrected_rate(yes: int, count: int, known: Calibration) -> Rate:
    """The rate of true positives among `count` items of which a judge calls `yes` positive.

        p = θ q₁ + (1 − θ)(1 − q₀)        so        θ̂ = (p̂ + q̂₀ − 1) / (q̂₀ + q̂₁ − 1)

    The interval has every θ in [0, 1] that the counts do not contradict (Fieller's theorem):

        |p̃ − θ q̃₁ − (1 − θ)(1 − q̃₀)| ≤ z √(var p̃ + θ² var q̃₁ + (1 − θ)² var q̃₀)

    with Agresti and Coull's shrunken proportions. Unlike an interval by the delta method it stays
    right where q₀ + q₁ is near 1, where it is all of [0, 1]: such a judge tells nothing. The items
    of `known` must be drawn as the counted ones are, and not be among them.

    Returns:
        The rate, cut to [0, 1]; NaN from 0 to 1 where q̂₀ + q̂₁ ≤ 1 or a share is unknown, or where
        the counts contradict every θ in [0, 1]: such items are not as the known ones.
    """
    if not (count and known.positives and known.negatives):
        return Rate(nan, 0.0, 1.0)
    informed = known.sensitivity + known.specificity - 1
    estimate = (yes / count + known.specificity - 1) / informed if informed > 0 else nan
    p, vp = _shrunken(yes, count)
    q1, v1 = _shrunken(known.hits, known.positives)
    q0, v0 = _shrunken(known.rejections, known.negatives)
    excess, slope = p + q0 - 1, q0 + q1 - 1
    # The squared inequality is a θ² + b θ + c ≤ 0.
    a = slope**2 - Z**2 * (v0 + v1)
    b = 2 * (Z**2 * v0 - excess * slope)
    c = excess**2 - Z**2 * (vp + v0)
    if informed <= 0 or slope <= 0 or a <= 0:
        return Rate(_cut(estimate), 0.0, 1.0)
    root = sqrt(max(0.0, b * b - 4 * a * c))
    low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
    if high < 0 or low > 1:
        return Rate(nan, 0.0, 1.0)
    return Rate(_cut(estimate), _cut(low), _cut(high))


def _shrunken(successes: int, count: int) -> tuple[float, float]:
    """A proportion with z²/2 successes and failures added, and its variance."""
    size = count + Z**2
    share = (successes + Z**2 / 2) / size
    return share, share * (1 - share) / size


def _cut(rate: float) -> float:
    return min(1.0, max(0.0, rate)) if rate == rate else nan
