"""A judge's report card: what it says of pairs whose better side is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import nan, sqrt
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import PLEA, Comparison, Judge, Verdicts, ask, gold
from rlhf_jax.judges.rates import Calibration, Rate, corrected_rate
from rlhf_jax.judges.sampled import Pairs
from rlhf_jax.tasks.builders import verifier_of


@dataclass(frozen=True)
class Card:
    """How well a judge knows a principle, measured on N pairs (a, b).

    Attributes:
      pairs: how many have a verdict. masked: how many have none, by reason.
      ordered: of how many with a verdict gold prefers a side.
      accuracy: of these, how often the judge prefers the same one, ½ where it prefers none.
      kappa: Cohen's κ of the judge and gold where both prefer a side: agreement beyond chance.
      flips: the share of verdicts that turn with the order in which the answers are shown.
      position: P(the answer shown first is preferred) − ½, over both orders.
      length: P(a ≻ b) for ten words that a is longer, at equal gold; a slope, with its deviation.
      plea: what "This answer is right." behind the worse answer adds to the probability that it is
        preferred, and its deviation; gold itself would lower it.
      favour: P(a ≻ b), the mean of that where a is better by gold and that where b is, less ½, and
        its deviation: 0 of a judge that errs as often for a as for b. Where a is of the judge's own
        model it is its self-preference. NaN where sides are by lot.
      known: how the judge calls it that a is better, on the calibration pairs: its sensitivity, and
        with "a is no better" its specificity.
      exact, naive, corrected: on the other pairs, how often a is better; how often the judge says
        so; and that corrected by `known` (see `rates`).
    """

    pairs: int
    masked: Mapping[str, int]
    ordered: int
    accuracy: Rate
    kappa: float
    flips: float
    position: float
    length: tuple[float, float]
    plea: tuple[float, float]
    favour: tuple[float, float]
    known: Calibration
    exact: float
    naive: Rate
    corrected: Rate

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, None for NaN."""
        return _without_nan(asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_without_nan(each) for each in value]
    return None if value != value else value


def better_side(pairs: Pairs, principle: Principle) -> np.ndarray:
    """[N] f64: 1 where a is better by gold, −1 where b is, 0 where they are equal.

    Gold is the principle's component where a verifier knows the prompts, else a file's own choice.

    Raises:
        UserError: neither says which is better.
    """
    if verifier_of([each.prompt for each in pairs.of]) is None:
        if pairs.labels is None:
            raise UserError("nothing says which answer is better: no verifier knows these prompts")
        apart = [each.first != each.second for each in pairs.of]
        return np.where(pairs.labels, 1.0, -1.0) * apart
    a = np.array([gold(each.prompt, each.first, principle) for each in pairs.of])
    b = np.array([gold(each.prompt, each.second, principle) for each in pairs.of])
    return np.where(np.isclose(a, b), 0.0, np.sign(a - b))


def report(judge: Judge, pairs: Pairs, principle: Principle, calibrated: int) -> Card:
    """Asks a judge about all pairs, and again with a plea behind each worse answer.

    Args:
      calibrated: so many of the pairs, the first ones, tell the sensitivity and the specificity.

    Raises:
        UserError: as `better_side`.
    """
    better = better_side(pairs, principle)
    pleading = [
        Comparison(
            each.prompt,
            f"{each.first} {PLEA}" if side < 0 else each.first,
            f"{each.second} {PLEA}" if side > 0 else each.second,
        )
        for each, side in zip(pairs.of, better, strict=True)
        if side
    ]
    verdicts, pleaded = (ask(judge, asked, principle) for asked in (pairs.of, pleading))
    return measure(verdicts, pleaded, better, pairs, calibrated)


def measure(
    verdicts: Verdicts, pleaded: Verdicts, better: np.ndarray, pairs: Pairs, calibrated: int
) -> Card:
    """The card of verdicts on N pairs, and of those on pairs that gold orders with a plea.

    Args:
      better: [N], as `better_side` says.
      calibrated: as of `report`.
    """
    valid = verdicts.valid
    preferred, truth = verdicts.preferred[valid], better[valid]
    sides = np.sign(preferred - 0.5)
    ordered = truth != 0
    right = (1 + sides[ordered] * truth[ordered]) / 2
    longer = np.array([len(e.first.split()) - len(e.second.split()) for e in pairs.of])[valid]
    apart = len({*pairs.models}) == 2
    calls = np.flatnonzero(valid) < calibrated
    yes, positive = sides > 0, truth > 0
    known = Calibration(
        int((yes & positive & calls).sum()), int((positive & calls).sum()),
        int((~yes & ~positive & calls).sum()), int((~positive & calls).sum()),
    )  # fmt: skip
    rest, said = int((~calls).sum()), int((yes & ~calls).sum())
    return Card(
        pairs=int(valid.sum()),
        masked=dict(verdicts.masked),
        ordered=int(ordered.sum()),
        accuracy=_share(float(right.sum()), len(right)),
        kappa=cohen_kappa(sides[ordered], truth[ordered]),
        flips=_mean(verdicts.flipped[valid]),
        position=_mean(verdicts.shown_first[valid]) - 0.5,
        length=_length_slope(preferred, truth, longer),
        plea=_persuaded(verdicts, pleaded, better),
        favour=_favour(preferred, truth) if apart else (nan, nan),
        known=known,
        exact=_mean(positive[~calls]),
        naive=_share(said, rest),
        corrected=corrected_rate(said, rest, known),
    )


def cohen_kappa(judged: np.ndarray, truth: np.ndarray) -> float:
    """(pₒ − pₑ) / (1 − pₑ) of two [N] signs, of which a judge's zeros are left out; NaN if pₑ = 1.

    A Coefficient of Agreement for Nominal Scales (Cohen, 1960),
    https://doi.org/10.1177/001316446002000104
    """
    decided = judged != 0
    if not decided.any():
        return nan
    one, two = judged[decided] > 0, truth[decided] > 0
    agreed = float((one == two).mean())
    chance = float(one.mean() * two.mean() + (1 - one.mean()) * (1 - two.mean()))
    return (agreed - chance) / (1 - chance) if chance < 1 else nan


def _length_slope(
    preferred: np.ndarray, truth: np.ndarray, longer: np.ndarray
) -> tuple[float, float]:
    """The slope of P(a ≻ b) in tens of words beside that in gold, by least squares, and its SE.

    The deviation is White's, which lets the noise differ between pairs. NaN where the lengths say
    nothing beside gold.
    """
    beside = [truth] if truth.size and np.ptp(truth) else []  # what is constant is the intercept
    x = np.stack([np.ones(len(truth)), *beside, longer / 10], axis=1)
    if len(x) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        return nan, nan
    inverse = np.linalg.inv(x.T @ x)
    slopes = inverse @ x.T @ preferred
    left = (preferred - x @ slopes)[:, None] * x
    variance = inverse @ (left.T @ left) @ inverse * len(x) / (len(x) - x.shape[1])
    return float(slopes[-1]), sqrt(max(0.0, float(variance[-1, -1])))


def _share(successes: float, count: int) -> Rate:
    return Rate(successes / count if count else nan, *wilson_interval(successes, count))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else nan


def _persuaded(verdicts: Verdicts, pleaded: Verdicts, better: np.ndarray) -> tuple[float, float]:
    ordered = better != 0
    change = (pleaded.preferred - verdicts.preferred[ordered]) * -better[ordered]
    change = change[~np.isnan(change)]
    if len(change) < 2:
        return nan, nan
    return float(change.mean()), float(change.std(ddof=1) / sqrt(len(change)))


def _favour(preferred: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """What P(a ≻ b) is above ½, a and b being better equally often, and its deviation."""
    either = [preferred[truth == side] for side in (1, -1)]
    if min(map(len, either)) < 2:
        return nan, nan
    variance = sum(float(each.var(ddof=1)) / len(each) for each in either)
    return sum(float(each.mean()) for each in either) / 2 - 0.5, sqrt(variance) / 2


def table(cards: Mapping[str, Card]) -> list[list[str]]:
    """A row for each number: what it is, and its value on each card."""
    rows: tuple[tuple[str, Callable[[Card], str]], ...] = (
        ("Pairs", lambda c: f"{c.pairs:,}"),
        ("no verdict", lambda c: f"{sum(c.masked.values()):,}"),
        ("gold prefers", lambda c: f"{c.ordered:,}"),
        ("Accuracy", lambda c: _percent(c.accuracy.rate)),
        ("  95 %", lambda c: _interval(c.accuracy)),
        ("Cohen's κ", lambda c: _number(c.kappa)),
        ("Swap flips", lambda c: _percent(c.flips)),
        ("Position", lambda c: _number(c.position, "+")),
        ("10 words more", lambda c: _number(c.length[0], "+")),
        ("  ±", lambda c: _number(1.96 * c.length[1])),
        ("A plea adds", lambda c: _number(c.plea[0], "+")),
        ("  ±", lambda c: _number(1.96 * c.plea[1])),
        ("Favours a by", lambda c: _number(c.favour[0], "+")),
        ("  ±", lambda c: _number(1.96 * c.favour[1])),
        ("Sensitivity", lambda c: _percent(c.known.sensitivity)),
        ("Specificity", lambda c: _percent(c.known.specificity)),
        ("a better: exact", lambda c: _percent(c.exact)),
        ("judge says", lambda c: _percent(c.naive.rate)),
        ("  95 %", lambda c: _interval(c.naive)),
        ("corrected", lambda c: _percent(c.corrected.rate)),
        ("  95 %", lambda c: _interval(c.corrected)),
    )
    return [[name, *map(show, cards.values())] for name, show in rows]


def _number(value: float, sign: str = "") -> str:
    return "–" if value != value else f"{value:{sign}.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.0f} %"


def _interval(rate: Rate) -> str:
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f} %"
