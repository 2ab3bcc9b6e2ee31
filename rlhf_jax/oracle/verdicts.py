"""Where a policy landed, exactly, and the verdict: whether that is where it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtrc

from rlhf_jax.evaluation.selection import best_of_n, kl_bound, kl_estimate, kl_terms, win_bound
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.oracle.oracle_rows import BETA, Row

ERRORS = 4  # standard errors that a measured value may be off


@dataclass(frozen=True)
class Measured:
    """The trainer's metrics of fresh samples.

    Attributes:
      reward, kl: the mean score, and KL in nats per sequence.
      covariance: [2, 2] of these two means.
      same: KL of the very same samples by the exact log-probabilities of whole responses. It has no
        sampling error, so that it shows a mistake too small for standard errors.
    """

    reward: float
    kl: float
    covariance: np.ndarray
    same: float


@dataclass(frozen=True)
class Outcome:
    """Where an algorithm landed, exactly.

    Attributes:
      reward: E r.
      kl: to the reference, nats per sequence.
      regret: β·KL(π‖π*), nats per sequence.
      optimum: (E r, KL) of the reference's own π*.
      reference: its log-probabilities [4, 121].
      measured: by sampling, where a trainer did.
      coefficient: of KL, at the end.
      loss: of the last update, for losses on pairs.
    """

    reward: float
    kl: float
    regret: float
    optimum: tuple[float, float]
    reference: np.ndarray
    measured: Measured | None = None
    coefficient: float = BETA
    loss: float | None = None


@dataclass(frozen=True)
class Result:
    """An outcome, where it should be (E r, KL) and that in words, and the verdict."""

    outcome: Outcome
    expected: tuple[float, float]
    note: str
    verdict: str

    @property
    def line(self) -> str:
        o, (reward, kl) = self.outcome, self.expected
        return (
            f"E r {o.reward:7.4f}  KL {o.kl:7.4f}  regret {o.regret:8.5f}  "
            f"must be E r {reward:7.4f}, KL {kl:7.4f} ({self.note}): {self.verdict}"
        )


def locate(logp: np.ndarray, reference: np.ndarray) -> Outcome:
    """Computes where a policy is; both are log-probabilities [4, 121]."""
    best = world.tilt(reference, world.REWARDS / BETA)
    optimum = world.expected_reward(best), world.kl(best, reference)
    reward, kl = world.expected_reward(logp), world.kl(logp, reference)
    regret = (optimum[0] - BETA * optimum[1]) - (reward - BETA * kl)
    return Outcome(reward, kl, regret, optimum, reference)


def expect(row: Row, outcome: Outcome) -> tuple[float, float]:
    """Returns (E r, KL) where the row must land."""
    reward, kl = outcome.optimum
    return (reward if row.reward is None else row.reward, kl if row.kl is None else row.kl)


def judge(row: Row, outcome: Outcome) -> str:
    """Returns "ok", or says what is wrong."""
    # No policy's exact point lies above: this guards the oracle's own sums.
    if outcome.reward > world.frontier(outcome.kl, outcome.reference) + 1e-6:
        return "above the frontier: the oracle itself is wrong"
    measured = outcome.measured
    if measured is not None:
        if _is_above_frontier(measured, outcome.reference):
            return f"measured above the frontier: E r {measured.reward:.4f}, KL {measured.kl:.4f}"
        errors = np.sqrt(np.diag(measured.covariance))
        if abs(measured.reward - outcome.reward) > ERRORS * errors[0]:
            return f"reward measured as {measured.reward:.4f}, is {outcome.reward:.4f}"
        if abs(measured.kl - outcome.kl) > ERRORS * errors[1]:
            return f"KL measured as {measured.kl:.4f}, is {outcome.kl:.4f}"
        if abs(measured.kl - measured.same) > 1e-3:
            return f"KL measured as {measured.kl:.4f}, is {measured.same:.4f} on those samples"
    if row.regret is not None and outcome.regret > row.regret:
        return f"regret over {row.regret}"
    if row.coefficient is not None and abs(outcome.coefficient - row.coefficient) > 0.03:
        return f"β = {outcome.coefficient:.3f}, should be {row.coefficient}"
    if row.loss is not None and (outcome.loss is None or abs(outcome.loss - row.loss) > 1e-4):
        return f"loss = {outcome.loss}, should be {row.loss}"
    reward, kl = expect(row, outcome)
    if abs(outcome.reward - reward) > row.tolerance[0]:
        return f"reward should be {reward:.3f}"
    if abs(outcome.kl - kl) > row.tolerance[1]:
        return f"KL should be {kl:.3f}"
    return "ok"


def _is_above_frontier(measured: Measured, reference: np.ndarray) -> bool:
    """Whether E r − β·KL as measured exceeds that of any policy, for the frontier's slope β there.

    A tangent bounds the whole curve, so one a few standard errors off serves as well, and is not
    infinitely steep where KL was measured as 0.
    """
    error = np.sqrt(measured.covariance[1, 1])
    beta = world.temperature(max(measured.kl, 0) + ERRORS * error, reference)
    best = world.tilt(reference, world.REWARDS / beta)
    most = world.expected_reward(best) - beta * world.kl(best, reference)
    slope = np.array([1, -beta])
    error = np.sqrt(slope @ measured.covariance @ slope)
    return measured.reward - beta * measured.kl > most + ERRORS * error


def judge_best_of(
    chosen: np.ndarray, law: np.ndarray, where: tuple[float, float], n: int
) -> tuple[str, float, float]:
    """Returns (verdict, E r, KL) of best-of-n as estimated from samples of the reference.

    Args:
        chosen: [4, N] which of the 121 responses each sample is.
        law: [4, 121] probabilities of the best of n.
        where: expected E r, and expected estimate of KL.
        n: samples to choose from.
    """
    count = chosen.shape[1] // n * n
    reference = world.logprobs(world.REFERENCE)
    scores = np.take_along_axis(world.REWARDS, chosen, axis=1)
    groups = scores[:, :count].reshape(world.PROMPTS, -1, n)
    first = groups.argmax(-1) + np.arange(0, count, n)
    best = np.take_along_axis(chosen, first, axis=1)

    reward = float(best_of_n(scores, scores, n).mean())
    parts = np.split(scores[:, : count // 20 * 20], 20, axis=1)
    error = _error([best_of_n(part, part, n).mean() for part in parts])
    terms = kl_terms(n, np.take_along_axis(reference, best, axis=1))
    kl = kl_estimate(n, np.take_along_axis(reference, best, axis=1))
    tops, others = groups.max(-1), np.roll(groups[:, :, 0], 1, axis=1)  # of other groups
    wins = (tops > others) + (tops == others) / 2
    likely = _chi_square(best, law)
    verdict = "ok"
    if likely <= 1e-3:
        verdict = f"not its law, p = {likely:.1e}"
    elif abs(reward - where[0]) > ERRORS * error:
        verdict = f"reward should be {where[0]:.4f} ± {error:.4f}"
    elif wins.mean() > win_bound(n) + ERRORS * _error(wins):
        verdict = f"wins {wins.mean():.4f}, more than {win_bound(n):.4f}"
    elif kl > kl_bound(n):
        verdict = f"KL over {kl_bound(n):.4f}"
    elif abs(kl - where[1]) > ERRORS * _error(terms):
        verdict = f"KL should be {where[1]:.4f}"
    return verdict, reward, kl


def _chi_square(chosen: np.ndarray, law: np.ndarray) -> float:
    """Returns p of outcomes [4, N] under their law [4, 121]; a prompt's rare ones count as one."""
    statistic, freedom = 0.0, 0
    for outcomes, probs in zip(chosen, law, strict=True):
        counts, means = np.bincount(outcomes, minlength=len(probs)), len(outcomes) * probs
        rare = means < 5
        if means[rare].sum() < 5:
            rare |= means == means[~rare].min()
        counts = np.append(counts[~rare], counts[rare].sum())
        means = np.append(means[~rare], means[rare].sum())
        statistic += float(((counts - means) ** 2 / means).sum())
        freedom += len(means) - 1
    return float(chdtrc(freedom, statistic))


def _error(values: Any) -> float:
    """Returns the standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(np.size(values)))
