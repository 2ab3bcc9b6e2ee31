"""The numbers of an evaluation: rates, intervals, calibration. Pure NumPy, plain floats out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb, nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class WinRate(NamedTuple):
    """`rate` in [0, 1] with its 95 % interval; `ties` is how many of the comparisons were tied."""

    rate: float
    low: float
    high: float
    ties: int


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram. `edges` has one entry more than the bins; an empty bin holds None."""

    ece: float
    edges: tuple[float, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class BinnedAccuracy:
    """Accuracy in the bins (−∞, e₀), [e₀, e₁), …, [e₋₁, ∞), with 95 % intervals; None if empty."""

    edges: tuple[float, ...]
    accuracy: tuple[float | None, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    counts: tuple[int, ...]


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion p̂ = successes / n.

        (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)

    Unlike p̂ ± z·se it stays inside [0, 1] and covers near 0 and 1. A tie may count as half a
    success; the interval is then a little wide, since ties vary less than wins and losses.
    `n = 0` knows nothing: (0, 1).

    Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927),
    https://doi.org/10.1080/01621459.1927.10502953

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    shrink = 1 + z * z / n
    center = (rate + z * z / (2 * n)) / shrink
    radius = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, center - radius), min(1.0, center + radius)


def bootstrap_interval(
    values: ArrayLike, seed: int, *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling prompts.

    Several samples of one prompt are not independent, so prompts (rows), not samples, are drawn
    with replacement: the interval holds the quantiles (1−c)/2 and (1+c)/2 of the resampled means.

    Bootstrap Methods: Another Look at the Jackknife (Efron, 1979),
    https://doi.org/10.1214/aos/1176344552

    Args:
        values: [prompts] or [prompts, samples], finite.
        seed: of the resampling; the same seed gives the same interval.
        confidence: coverage aimed at.
        resamples: number of resampled means.

    Raises:
        ValueError: on an empty or non-finite `values`.
    """
    array = _finite("values", values)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"values must be [prompts] or [prompts, samples], got {array.shape}")
    means = array.reshape(len(array), -1).mean(axis=1)
    n = len(means)
    found = np.concatenate([draws @ means / n for draws in resample(n, seed, resamples)])
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def with_interval(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    """A metric and its interval, by the names that all metrics with one have."""
    low, high = interval
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def resample(n: int, seed: int, resamples: int = 2000) -> Iterator[np.ndarray]:
    """How often each of n records is drawn in n draws with replacement, [some, n] at a time.

    All of them together are [resamples, n]; 80 MB are held, however many records there are.
    """
    random, most = np.random.default_rng(seed), max(1, 10**7 // n)
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        yield random.multinomial(n, np.full(n, 1 / n), size=count)


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 15) -> Calibration:
    """Expected calibration error over equal-width bins (eᵢ, eᵢ₊₁], and the bins themselves.

        ECE = Σᵢ nᵢ/n · |accuracyᵢ − confidenceᵢ|

    Of a preference model pass `preference_confidence(margins)`, not σ(chosen − rejected): with
    the chosen side always first the outcome is always 1 and nothing is measured.

    On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599

    Args:
        probabilities: [N] in [0, 1], what the model claims.
        outcomes: [N] in [0, 1], what happened (ties ½).
        bins: number of bins.

    Raises:
        ValueError: on empty input, different shapes, or values outside [0, 1].
    """
    claimed, happened = _finite("probabilities", probabilities), _finite("outcomes", outcomes)
    _check_vectors(probabilities=claimed, outcomes=happened)
    for name, array in (("probabilities", claimed), ("outcomes", happened)):
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} must lie in [0, 1]")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.digitize(claimed, edges[1:-1], right=True)
    counts = np.bincount(index, minlength=bins)
    confidence = np.bincount(index, claimed, bins)
    accuracy = np.bincount(index, happened, bins)
    return Calibration(
        ece=float(np.abs(accuracy - confidence).sum() / counts.sum()),
        edges=tuple(edges.tolist()),
        confidence=_bin_means(confidence, counts),
        accuracy=_bin_means(accuracy, counts),
        counts=tuple(counts.tolist()),
    )


def preference_confidence(margins: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidence σ(|m|) in the preferred side and whether it was right, from m = chosen − rejected.

    Args:
        margins: [N] score differences in nats (for DPO: implicit rewards, β included).

    Returns:
        (probabilities [N] in [½, 1], outcomes [N]: 1 right, 0 wrong, ½ at m = 0).
    """
    array = _finite("margins", margins)
    return 1 / (1 + np.exp(-np.abs(array))), (np.sign(array) + 1) / 2


def win_rate(ours: ArrayLike, theirs: ArrayLike, tie_tolerance: float = 0.0) -> WinRate:
    """How often `ours` beats `theirs` on the same prompt, ties ½, with Wilson's 95 % interval.

        rate = (#{oursᵢ − theirsᵢ > tol} + ½ #{|oursᵢ − theirsᵢ| <= tol}) / N

    Args:
        ours: [N] scores, one per prompt.
        theirs: [N] scores of the same prompts.
        tie_tolerance: differences up to this are ties.

    Raises:
        ValueError: on empty input, different shapes, non-finite scores or a negative tolerance.
    """
    a, b = _finite("ours", ours), _finite("theirs", theirs)
    _check_vectors(ours=a, theirs=b)
    if tie_tolerance < 0:
        raise ValueError(f"tie_tolerance must not be negative, got {tie_tolerance}")
    difference = a - b
    ties = int((np.abs(difference) <= tie_tolerance).sum())
    wins = int((difference > tie_tolerance).sum()) + ties / 2
    return WinRate(wins / len(a), *wilson_interval(wins, len(a)), ties)


def accuracy_by_bins(x: ArrayLike, correct: ArrayLike, edges: ArrayLike) -> BinnedAccuracy:
    """Accuracy as a function of `x`, e.g. of the length difference between chosen and rejected.

    Args:
        x: [N] what to bin by.
        correct: [N] in [0, 1], ties ½.
        edges: [E] increasing inner boundaries of E + 1 bins; the outer bins are open, so that
            no example is left out.

    Raises:
        ValueError: on different shapes, non-finite values or edges that do not increase.
    """
    values, right = _finite("x", x), _finite("correct", correct)
    _check_vectors(x=values, correct=right)
    inner = _finite("edges", edges)
    if inner.ndim != 1 or not (np.diff(inner) > 0).all():
        raise ValueError("edges must be a list of increasing numbers")
    index = np.digitize(values, inner)
    counts = np.bincount(index, minlength=len(inner) + 1)
    totals = np.bincount(index, right, len(inner) + 1)
    intervals = list(map(wilson_interval, totals.tolist(), counts.tolist()))
    return BinnedAccuracy(
        edges=tuple(inner.tolist()),
        accuracy=_bin_means(totals, counts),
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
        counts=tuple(counts.tolist()),
    )


def pass_all(successes: ArrayLike, n: int, k: int) -> np.ndarray:
    """The chance that k draws of n tries without replacement all succeeded, C(c, k) / C(n, k): [N].

    Over prompts its mean is the unbiased estimate of pass^k, that k tries in a row succeed.

    τ-bench: A Benchmark for Tool-Agent-User Interaction in Real-World Domains,
    https://arxiv.org/abs/2406.12045

    Args:
        successes: [N] whole numbers in [0, n], c of each prompt.

    Raises:
        ValueError: k is not in [1, n], or a count not in [0, n].
    """
    counts = np.asarray(successes)
    if not 1 <= k <= n or not ((counts >= 0) & (counts <= n)).all():
        raise ValueError(f"need 1 <= k <= n and 0 <= successes <= n, got k = {k}, n = {n}")
    return np.array([comb(int(c), k) / comb(n, k) for c in counts])


def auc(good: ArrayLike, bad: ArrayLike) -> float:
    """P(good > bad) + ½ P(good = bad) for one of each, [N] and [M]."""
    good, below = np.asarray(good), np.sort(bad)
    lower, upper = (np.searchsorted(below, good, side) for side in ("left", "right"))
    return float((lower + upper).mean() / (2 * len(below)))


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²); NaN where either side is constant.

    Args:
        x: [N], e.g. response lengths.
        y: [N], e.g. rewards.
    """
    a, b = _finite("x", x), _finite("y", y)
    _check_vectors(x=a, y=b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / sqrt((a @ a) * (b @ b)))


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} non-finite values")
    return array


def _check_vectors(**arrays: np.ndarray) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] == 0 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"need non-empty vectors of one length, got {shapes}")


def _bin_means(totals: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    pairs = zip(totals.tolist(), counts.tolist(), strict=True)
    return tuple(total / n if n else None for total, n in pairs)
