"""What a fit says of each labeler, and what it cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from rlhf_jax.labelers.agreement import Measured, cycles, self_consistency
from rlhf_jax.labelers.likelihood import NODES, REACH, Fitted, Votes, fit

COIN = (0.4, 0.6)  # a coin's expected accuracy, as an interval that surely holds it
WIDEST_LAPSE = 0.15  # half an interval of lapses that still tells something
MOST_PAIRS = 400  # that expected accuracy is averaged over, evenly spaced among all
_Z = 1.96
GUESSING = "answers as a coin does: who sees nothing and who does not look are the same"
UNTOLD = "the votes say little more than the prior"
TOGETHER = "a blunter labeler and one who lapses more vote alike here"
NOBODY = "no votes tell how good replies are, beyond what features and positions explain"
FEW = "whether a bias is a labeler's own needs three labelers, or replies with known scores"


@dataclass(frozen=True)
class Estimate:
    """An effect with its 95 % interval; `why` says why it cannot be told, and is "" if it can.

    Units: sharpness in logits per unit of quality, features in logits per unit, position in logits,
    lapses and accuracy are probabilities. `error` is the standard error, of lapses that of their
    logit.
    """

    value: float
    low: float
    high: float
    error: float
    why: str = ""


@dataclass(frozen=True)
class LabelerReport:
    """All that is known of a labeler; `verdict` is "spammer", "contrary" or ""."""

    name: str
    votes: int
    effects: dict[str, Estimate]
    accuracy: Estimate
    consistency: Measured
    cycles: Measured
    verdict: str


@dataclass(frozen=True)
class CrowdReport:
    """The labelers of a file of votes.

    Attributes:
      labelers: in the order of the votes'.
      belief: [P] what all votes about a pair say of by how much a is better, in the fit's units.
      known: whether qualities were known, and not fitted with the labelers.
      converged: whether the fit ended at the mode.
    """

    labelers: tuple[LabelerReport, ...]
    belief: np.ndarray
    known: bool
    converged: bool


def estimate(votes: Votes) -> CrowdReport:
    """Fits the labelers and says what can be told of each.

    Where qualities are unknown, they may go with a feature, and everybody's effect of it with them.
    What most labelers share is then taken for quality, and a labeler's effect is what they have
    beyond it: a bias that all share cannot be told from quality.
    """
    fitted, shared = fit(votes), np.zeros(len(votes.names))
    few = votes.quality is None and len(votes.labelers) < 3
    if votes.quality is None and not few:
        fitted, shared = take_shared(fitted)
    own, again = cycles(votes), self_consistency(votes)
    width = len(votes.effects)
    reports = []
    for i, name in enumerate(votes.labelers):
        covariance = fitted.covariance[i * width : (i + 1) * width, i * width : (i + 1) * width]
        accuracy = _accuracy(votes, fitted.theta[i], covariance, shared)
        if votes.quality is None and not sees(fitted).any():
            accuracy = replace(accuracy, low=0.0, high=1.0, why=NOBODY)
        found = _effects(votes, fitted.theta[i], np.sqrt(np.diag(covariance)))
        why = _untold(found, fitted.prior, accuracy, votes.names if few else ())
        effects = {effect: replace(x, why=why.get(effect, "")) for effect, x in found.items()}
        reports.append(
            LabelerReport(
                name, int((votes.labeler == i).sum()), effects, accuracy, again[i], own[i],
                _verdict(accuracy),
            )
        )  # fmt: skip
    belief = fitted.quality + votes.features @ shared
    return CrowdReport(tuple(reports), belief, votes.quality is not None, fitted.converged)


def take_shared(fitted: Fitted) -> tuple[Fitted, np.ndarray]:
    """Moves into quality what most labelers have of each feature per sharpness.

    That is the mean of effect_l / sharpness_l, by precision, of the labelers within 2.5 standard
    errors of it, begun at their median.

    Returns:
      (the fit with effects beyond what is shared, [F] what is shared in quality per unit).
    """
    count, width = fitted.theta.shape
    theta, jacobian = fitted.theta.copy(), np.eye(count * width)
    variance = np.diag(fitted.covariance).reshape(count, width)
    at, shared = np.arange(count) * width, np.zeros(width - 3)
    sharpness = fitted.theta[:, 0]
    seeing = sees(fitted)
    if not seeing.any():
        return fitted, shared
    for f in range(1, width - 2):
        ratio = fitted.theta[:, f] / np.where(seeing, sharpness, 1.0)
        precision = seeing * sharpness**2 / variance[:, f]
        center = float(np.median(ratio[seeing]))
        for _ in range(5):
            near = np.abs(ratio - center) * np.sqrt(precision) <= 2.5
            weight = near * precision / max((near * precision).sum(), 1e-300)
            if weight.any():
                center = float(weight @ ratio)
        shared[f - 1] = center
        theta[:, f] -= sharpness * center
        # of center: by each effect, weight / sharpness, and by each sharpness, −that · ratio
        by_effect = np.where(seeing, weight / np.where(seeing, sharpness, 1.0), 0.0)
        jacobian[np.ix_(at + f, at + f)] -= sharpness[:, None] * by_effect
        jacobian[np.ix_(at + f, at)] += sharpness[:, None] * (by_effect * ratio)
        jacobian[at + f, at] -= center
    covariance = jacobian @ fitted.covariance @ jacobian.T
    return Fitted(theta, covariance, fitted.prior, fitted.quality, fitted.converged), shared


def sees(fitted: Fitted) -> np.ndarray:
    """[L] bool: whose sharpness is further from 0 than its standard error.

    More cannot be asked: where people always agree, it is large and so is its error.
    """
    count, width = fitted.theta.shape
    errors = np.sqrt(np.diag(fitted.covariance).reshape(count, width)[:, 0])
    return np.abs(fitted.theta[:, 0]) > errors


def _effects(votes: Votes, theta: np.ndarray, errors: np.ndarray) -> dict[str, Estimate]:
    effects = {}
    for k, name in enumerate(votes.effects):
        ends = (theta[k], theta[k] - _Z * errors[k], theta[k] + _Z * errors[k])
        value, low, high = map(float, expit(ends) if name == "lapses" else ends)
        effects[name] = Estimate(value, low, high, float(errors[k]))
    return effects


def _untold(
    effects: dict[str, Estimate], prior: np.ndarray, accuracy: Estimate, unknown: Sequence[str]
) -> dict[str, str]:
    """Why effects cannot be told, by name; `unknown` are features whose effects are shared."""
    why = dict.fromkeys(unknown, FEW)
    for (name, effect), spread in zip(effects.items(), prior, strict=True):
        if name != "lapses" and effect.error > spread / 2:
            why[name] = UNTOLD
    if effects["lapses"].high - effects["lapses"].low > 2 * WIDEST_LAPSE:
        why |= dict.fromkeys(("sharpness", "lapses"), TOGETHER)
    if accuracy.low <= 0.5 <= accuracy.high:
        why |= dict.fromkeys(("sharpness", "lapses"), GUESSING)
    return why


def _verdict(accuracy: Estimate) -> str:
    """ "spammer": surely as a coin; "contrary": surely prefers the worse; else ""."""
    if accuracy.high < COIN[0]:
        return "contrary"
    return "spammer" if accuracy.low > COIN[0] and accuracy.high < COIN[1] else ""


def _accuracy(
    votes: Votes, theta: np.ndarray, covariance: np.ndarray, shared: np.ndarray
) -> Estimate:
    """How often a labeler prefers the better of two, with an interval by the delta method.

    The mean over pairs, which are not equally good, over both orders, and over quality where that
    is not known.
    """
    pairs = np.unique(np.linspace(0, len(votes.features) - 1, MOST_PAIRS).astype(int))
    features = votes.features[pairs]
    if votes.quality is not None:
        quality, mass = votes.quality[pairs][:, None], np.ones(1)
    else:
        grid = np.linspace(-REACH, REACH, NODES)
        quality = grid[None, :] + (features @ shared)[:, None]
        mass = np.exp(-0.5 * grid**2)
    weight = mass * (quality != 0)
    if not weight.any():
        return Estimate(math.nan, 0.0, 1.0, math.inf, "all pairs are of equally good replies")

    def accuracy(at: np.ndarray) -> float:
        logit = at[0] * quality + (features @ at[1:-2])[:, None]
        both = [expit(np.sign(quality) * (logit + order * at[-2])) for order in (1, -1)]
        right = (1 - expit(at[-1])) * (both[0] + both[1]) / 2 + expit(at[-1]) / 2
        return float((weight * right).sum() / np.broadcast_to(weight, right.shape).sum())

    value, steps = accuracy(theta), 1e-4 * np.maximum(np.abs(theta), 1e-2)
    gradient = np.array(
        [(accuracy(theta + s) - accuracy(theta - s)) / (2 * s.sum()) for s in np.diag(steps)]
    )
    error = float(np.sqrt(gradient @ covariance @ gradient))
    return Estimate(value, value - _Z * error, value + _Z * error, error)


def spammers(labelers: Sequence[LabelerReport]) -> list[str]:
    """The names of those who answer as a coin does."""
    return [labeler.name for labeler in labelers if labeler.verdict == "spammer"]
