"""What several seeds and several prompts together say of a mean and of differences. Pure NumPy.

Outcomes are [S, P]: S seeds answered the same P prompts. Both are samples, of the runs there could
have been and of the prompts there could have been, so the variance of the mean has two parts. For
an outcome μ + a_s + b_p + e_sp, with v_s = Var(means of seeds)/S, v_p = Var(means of prompts)/P and
v_e = Var(e)/SP,

    Var(mean) = σ_a²/S + σ_b²/P + σ_e²/SP,   estimated by  max(v_s + v_p − v_e, v_s, v_p)

A bootstrap of seeds and then prompts has about that variance, but its percentiles are too narrow:
with five seeds it draws from five values as if there were no others. So an interval here lies about
the mean as those percentiles do, but is as wide as the estimated variance and Student's t make it,
with Satterthwaite's degrees of freedom, and never narrower than that of the seeds' means alone.

The language-as-fixed-effect fallacy (Clark, 1973), https://doi.org/10.1016/S0022-5371(73)80014-3
The pigeonhole bootstrap (Owen, 2007), https://arxiv.org/abs/0712.1111
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan, sqrt

import numpy as np
from scipy.special import stdtr, stdtrit

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts, with its interval, of 95 % where nothing else is said.

    Attributes:
        deviation: of the seeds' means.
        low, high: NaN where all outcomes are the same number, and so few seeds that by the sign
            test they exclude none.
        p: the probability, if the mean were 0, of one so far from 0; where all outcomes are the
            same number, of as many seeds on one side of it (the sign test).
        seeds: how many there are; of a single one nothing but the mean is known, the rest is NaN.
    """

    mean: float
    deviation: float
    low: float
    high: float
    p: float
    seeds: int


def estimate(
    outcomes: np.ndarray, floor: tuple[float, int] = (0.0, 0), level: float = 0.95
) -> Estimate:
    """The mean of outcomes [S, P], or of [S] where only the seeds' means are known.

    Args:
        floor: a variance of the mean over seeds, with its degrees of freedom, that several sets of
            outcomes have in common: it is taken if these ones' own is smaller, and its degrees of
            freedom are taken in any case. (0, 0) for none.
        level: the interval's, in (0, 1).

    Raises:
        ValueError: there is no outcome, or one that is not finite.
    """
    values = np.asarray(outcomes, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"need finite outcomes, got {values.shape} of them")
    values = values.reshape(len(values), -1)
    mean, (seeds, prompts) = float(values.mean()), values.shape
    if seeds < 2:
        return Estimate(mean, nan, nan, nan, nan, seeds)
    by_seed, by_prompt, rest = _variances(values)
    freedom, by_seed = floor[1] or seeds - 1, max(by_seed, floor[0])
    deviation = float(values.mean(1).std(ddof=1))
    total = max(by_seed + by_prompt - rest, by_seed, by_prompt)
    if sqrt(total) <= 1e-12 * np.abs(values).max():  # nothing but rounding
        by_signs = 0.5 ** (seeds - 1)  # alike by chance: there is no variance to go by
        end = mean if by_signs <= 1 - level else nan
        return Estimate(mean, deviation, end, end, by_signs if mean else 1.0, seeds)
    parts = by_seed**2 / freedom + (total - by_seed) ** 2 / max(1, prompts - 1)
    tests = [(sqrt(total), total**2 / parts), (sqrt(by_seed), freedom)]
    upper = (1 + level) / 2
    reach = max(spread * float(stdtrit(df, upper)) for spread, df in tests)
    p = max(2 * float(stdtr(df, -abs(mean) / spread)) for spread, df in tests if spread)
    below, above = np.quantile(_resample(values), [1 - upper, upper])
    share = float((mean - below) / (above - below)) if above > below else 0.5
    low, high = mean - 2 * reach * share, mean + 2 * reach * (1 - share)
    return Estimate(mean, deviation, low, high, p, seeds)


def differences(
    cells: Mapping[str, Mapping[int, np.ndarray]], baseline: str
) -> dict[str, tuple[Estimate, float]]:
    """{cell: (its difference to the baseline, the p-value after Holm's correction)} of the others.

    A difference is taken between outcomes of the same seeds and prompts. With few seeds its own
    variance is a poor guide: by chance it is far too small in one of many cells. So where three
    cells or more share seeds, the variance is at least what theirs have in common, with the degrees
    of freedom of that. Of cells that are all the same, and of ones of which some vary more than
    others, at most 5 % of sweeps then find a difference (tests/sweep/test_statistics.py).

    Args:
        cells: {cell: {seed: outcomes [P]}}; P is 1 where only means are known. A cell of which
            nothing is known has no seeds, and is left out.
    """
    known = {name: runs for name, runs in cells.items() if runs}
    theirs = known.get(baseline, {})
    others = [name for name in known if name != baseline and theirs.keys() & known[name].keys()]
    floor = _common_variance([known[name] for name in [baseline, *others]]) if others else (0.0, 0)
    found = {}
    for name in others:
        seeds = sorted(theirs.keys() & known[name].keys())
        paired = np.stack([known[name][seed] - theirs[seed] for seed in seeds])
        found[name] = estimate(paired, floor)
    adjusted = holm([each.p for each in found.values()])
    return {name: (each, p) for (name, each), p in zip(found.items(), adjusted, strict=True)}


def _common_variance(cells: Sequence[Mapping[int, np.ndarray]]) -> tuple[float, int]:
    """The variance over seeds of a mean difference of two cells, as all have it together.

    It is twice the mean square of what cells and seeds leave unexplained in the means [K, S],
    divided by S, with (K − 1)(S − 1) degrees of freedom; (0, 0) of fewer than three cells.
    """
    seeds = sorted(set.intersection(*(set(runs) for runs in cells)))
    if len(cells) < 3 or len(seeds) < 2:
        return 0.0, 0
    means = np.array([[runs[seed].mean() for seed in seeds] for runs in cells])
    left = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    freedom = (len(cells) - 1) * (len(seeds) - 1)
    return 2 * float((left**2).sum()) / freedom / len(seeds), freedom


def _variances(values: np.ndarray) -> tuple[float, float, float]:
    """v_s, v_p and v_e of outcomes [S, P]; the last two are 0 of a single prompt."""
    seeds, prompts = values.shape
    rows, columns = values.mean(1), values.mean(0)
    by_seed = float(rows.var(ddof=1)) / seeds
    if prompts == 1:
        return by_seed, 0.0, 0.0
    left = values - rows[:, None] - columns + values.mean()
    rest = float((left**2).sum()) / ((seeds - 1) * (prompts - 1)) / values.size
    return by_seed, float(columns.var(ddof=1)) / prompts, rest


def _resample(values: np.ndarray) -> np.ndarray:
    """[RESAMPLES] means of as many seeds, drawn with replacement, and then of as many prompts."""
    seeds, prompts = (_shares(n, axis) for axis, n in enumerate(values.shape))
    return ((seeds @ values) * prompts).sum(1)


@lru_cache(maxsize=16)
def _shares(n: int, stream: int) -> np.ndarray:
    """[RESAMPLES, n]: how often each of n is drawn in n draws with replacement, as shares."""
    random = np.random.default_rng(stream)
    return random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: at most α of all families have one below α by chance.

    The i-th smallest of m is max over j ≤ i of (m − j + 1)·p_j, at most 1; a NaN is no test and
    stays. A simple sequentially rejective multiple test procedure (Holm, 1979),
    https://www.jstor.org/stable/4615733
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p == p)
    adjusted, highest = [nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return adjusted
