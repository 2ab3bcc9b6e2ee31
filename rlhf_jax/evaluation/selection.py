"""Best-of-n selection and over-optimisation: the gain by a proxy reward, and the KL it costs.

The best of n samples by a proxy is the simplest policy there is against a reward model. Its gold
reward as a function of n follows from N samples per prompt, without sampling anew; the KL of its
law to the policy that was sampled from is bounded, and estimated, without a further log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.statistics import bootstrap_interval


@dataclass(frozen=True)
class OveroptimizationFit:
    """R = d(α − βd) or d(α − β log d): coefficients, share of variance explained, what is left.

    A high `r2` is no evidence of over-optimisation: a gold reward that only flattens out fits too.
    """

    alpha: float
    beta: float
    r2: float
    residual_std: float


def best_of_n(proxy: ArrayLike, values: ArrayLike, n: int) -> np.ndarray:
    """Expected value of the sample with the highest proxy among n of the N samples of a prompt.

        Σᵢ C(i, n−1) / C(N, n) · v₍ᵢ₎,   v₍₀₎ … v₍N−1₎ by increasing proxy

    The average over all C(N, n) draws without replacement, hence unbiased for the best of n fresh
    samples. Samples of one proxy share their weight equally.

    WebGPT, https://arxiv.org/abs/2112.09332

    Args:
        proxy: [P, N] scores that choose, in any units.
        values: [P, N] what is averaged, e.g. gold rewards of the same samples, or `proxy` itself.
        n: samples to choose from, 1 to N.

    Returns:
        [P] in the units of `values`.

    Raises:
        ValueError: unless 1 <= n <= N; on different shapes or non-finite numbers.
    """
    chosen_by, valued = _tables(proxy, values)
    by_rank = _rank_weights(chosen_by.shape[1], n)
    return np.array([_shared(row, by_rank) @ v for row, v in zip(chosen_by, valued, strict=True)])


def best_of_n_win_rate(proxy: ArrayLike, values: ArrayLike, n: int) -> np.ndarray:
    """Probability that the best of n samples by proxy has a higher value than one other sample.

        1/N Σᵢ E[1(v* > vᵢ) + ½·1(v* = vᵢ)],   v* of the best of n drawn from the others than i

    The average over every opponent i and all C(N−1, n) draws from the other N−1 samples, hence
    unbiased for n + 1 fresh samples. At most `win_bound(n)` if `values` is `proxy`. Samples of one
    proxy are chosen equally often.

    Args:
        proxy: [P, N] scores that choose, in any units.
        values: [P, N] what decides who wins, e.g. gold rewards of the same samples.
        n: samples to choose from, 1 to N − 1.

    Returns:
        [P] in [0, 1].

    Raises:
        ValueError: unless 1 <= n <= N − 1; on different shapes or non-finite numbers.
    """
    chosen_by, valued = _tables(proxy, values)
    samples = chosen_by.shape[1]
    if not 1 <= n < samples:
        raise ValueError(f"n = {n} must be at least 1 and below the {samples} samples")
    by_rank = _rank_weights(samples - 1, n)
    rates = []
    for row, value in zip(chosen_by, valued, strict=True):
        ours, theirs = value[None, :], value[:, None]
        beats = (ours > theirs) + 0.5 * (ours == theirs)
        rates.append(np.sum(_shared_without(row, by_rank) * beats) / samples)
    return np.array(rates)


def best_of_n_curve(
    proxy: ArrayLike, values: ArrayLike, ns: Sequence[int], seed: int = 0
) -> dict[str, list[float]]:
    """Mean over prompts of `best_of_n` for each of `ns`, with bootstrap intervals over prompts.

    Args:
        proxy, values: [P, N]; see `best_of_n`.
        ns: the K numbers of samples to choose from.
        seed: of the bootstrap.

    Returns:
        {"mean", "low", "high"}, each [K], in the units of `values`; 95 % intervals.
    """
    curves = [best_of_n(proxy, values, n) for n in ns]
    intervals = [bootstrap_interval(curve, seed) for curve in curves]
    return {
        "mean": [float(curve.mean()) for curve in curves],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
    }


def best_of_n_law(probabilities: ArrayLike, proxy: ArrayLike, n: int) -> np.ndarray:
    """The exact law of the best of n independent samples: π(y)/π(r = r_y) · (F(r_y)ⁿ − F(r_y⁻)ⁿ).

    F is the distribution function of the proxy under π. Outcomes of one proxy keep their
    proportions.

    Args:
        probabilities: [S] of all outcomes under the policy that is sampled from; they sum to 1.
        proxy: [S] score of each outcome.
        n: samples to choose from.

    Returns:
        [S] probabilities.
    """
    mass = np.asarray(probabilities, np.float64)
    _, level = np.unique(np.asarray(proxy, np.float64), return_inverse=True)
    of_level = np.bincount(level, mass)
    below = np.concatenate([[0.0], np.cumsum(of_level)])
    below /= below[-1]
    return mass / of_level[level] * np.diff(below**n)[level]


def kl_bound(n: float) -> float:
    """Upper bound log n − (n−1)/n of KL(best of n ‖ policy) in nats; never the KL itself.

    Without bound as n grows, while the KL is at most −log π(best outcome).
    "Theoretical guarantees on the best-of-n alignment policy", https://arxiv.org/abs/2401.01879
    """
    return log(n) - (n - 1) / n


def kl_estimate(n: int, logprobs: ArrayLike) -> float:
    """Tighter estimate of KL(best of n ‖ policy) in nats, from outcomes that best-of-n chose.

        E[(1−ε)ⁿ (log n + (n−1) log(1−ε) − (n−1)/n) + (1−(1−ε)ⁿ) log((1−(1−ε)ⁿ)/ε)],  ε = π(y)

    It is `kl_bound` where no outcome is likely, and stays finite where one is.
    "Theoretical guarantees on the best-of-n alignment policy", https://arxiv.org/abs/2401.01879

    Args:
        n: samples chosen from.
        logprobs: [...] log π(y) of the chosen outcomes under the policy sampled from, in nats.

    Raises:
        ValueError: on empty `logprobs` or one that is above 0 or not finite.
    """
    return float(np.mean(kl_terms(n, logprobs)))


def kl_terms(n: int, logprobs: ArrayLike) -> np.ndarray:
    """The terms that `kl_estimate` averages: [...] nats, one for each chosen outcome."""
    logp = np.asarray(logprobs, np.float64)
    if not logp.size or not (np.isfinite(logp) & (logp <= 0)).all():
        raise ValueError("logprobs must be finite log-probabilities, at least one")
    logp = np.minimum(logp, -1e-300)  # keeps log(1 − ε) finite at ε = 1
    rare = logp < -log(2)
    log_other = np.where(
        rare, np.log1p(-np.exp(np.where(rare, logp, -1))), np.log(-np.expm1(np.maximum(logp, -1)))
    )
    drawn = -np.expm1(n * log_other)  # that y is among n samples
    vanishing = logp < -700
    log_drawn = np.where(vanishing, log(n) + logp, np.log(np.where(vanishing, 1, drawn)))
    unseen = log(n) + (n - 1) * log_other - (n - 1) / n
    return np.exp(n * log_other) * unseen + drawn * (log_drawn - logp)


def win_bound(n: float) -> float:
    """The highest win rate of the best of n over one sample, n/(n+1), reached without ties."""
    return n / (n + 1)


def fit_overoptimization(d: ArrayLike, gold: ArrayLike) -> dict[str, OveroptimizationFit]:
    """Least squares of both laws of "Scaling Laws for Reward Model Overoptimization".

        "best_of_n": R = d(α − βd)        "rl": R = d(α − β log d)

    Which law describes which curve is for the reader to see: both are fitted.
    https://arxiv.org/abs/2210.10760

    Args:
        d: [K] √KL to the initial policy, in √nats, at least 0.
        gold: [K] gold reward minus that of the initial policy.

    Raises:
        ValueError: on fewer than three points, different shapes, or what is not finite.
    """
    x, y = np.asarray(d, np.float64), np.asarray(gold, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(f"need three points or more of one length, got {x.shape}, {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and x.min() >= 0):
        raise ValueError("d and gold must be finite, and d at least 0")
    log_x = np.log(np.where(x > 0, x, 1))
    return {"best_of_n": _fit(x, x, y), "rl": _fit(x, log_x, y)}


def _fit(x: np.ndarray, damping: np.ndarray, y: np.ndarray) -> OveroptimizationFit:
    """y = x(α − β · damping)."""
    columns = np.stack([x, -x * damping], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    left = float(np.sum((y - columns @ [alpha, beta]) ** 2))
    spread = float(np.sum((y - y.mean()) ** 2))
    return OveroptimizationFit(
        float(alpha), float(beta), 1 - left / spread if spread else 0.0, sqrt(left / (len(x) - 2))
    )


def _tables(proxy: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as [P, N], checked."""
    chosen_by, valued = np.asarray(proxy, np.float64), np.asarray(values, np.float64)
    if chosen_by.ndim != 2 or chosen_by.shape != valued.shape or not chosen_by.size:
        raise ValueError(
            f"proxy and values must be [prompts, samples], got {chosen_by.shape}, {valued.shape}"
        )
    if not (np.isfinite(chosen_by).all() and np.isfinite(valued).all()):
        raise ValueError("proxy and values must be finite")
    return chosen_by, valued


def _rank_weights(samples: int, n: int) -> np.ndarray:
    """[N] probability C(i, n−1)/C(N, n) that rank i, 0 the lowest, is the highest of n drawn.

    From the top rank's n/N down, each is (i+2−n)/(i+1) times the one above, summed as logs: no
    binomial coefficient, which would overflow.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n = {n} must be between 1 and the {samples} samples")
    above = np.arange(samples - 1, n - 1, -1)
    logs = log(n / samples) + np.concatenate([[0.0], np.cumsum(np.log((above - n + 1) / above))])
    weights = np.zeros(samples)
    weights[n - 1 :] = np.exp(logs[::-1])
    return weights


def _shared(proxy: np.ndarray, by_rank: np.ndarray) -> np.ndarray:
    """[N] weights of the samples themselves; those of one proxy get the mean of their ranks'."""
    _, level, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (np.add.reduceat(by_rank, ends - counts) / counts)[level]


def _shared_without(proxy: np.ndarray, by_rank: np.ndarray) -> np.ndarray:
    """[N, N] whose row i is `_shared` of the samples but i, with 0 for i itself.

    Leaving i out moves the ranks of all levels above it, and the end of its own, down by one.
    """
    _, level, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mass = np.concatenate([[0.0], np.cumsum(by_rank), [0.0]])  # the last is of no rank: never read
    count, end = counts[level], ends[level]
    start = end - count
    above = (mass[end - 1] - mass[start - 1]) / count
    below = (mass[end] - mass[start]) / count
    equal = (mass[end - 1] - mass[start]) / np.maximum(count - 1, 1)
    left_out = level[:, None]
    weights = np.where(level > left_out, above, np.where(level < left_out, below, equal))
    np.fill_diagonal(weights, 0)
    return weights
