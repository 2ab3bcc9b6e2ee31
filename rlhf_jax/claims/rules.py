"""The rules by which an interval of a difference decides a claim. Pure functions.

A difference is ours less theirs, so that above 0 is better for whom the claim is about. Each rule
has three verdicts: the whole interval lies where the claim says, the whole interval lies where it
says the difference is not, or neither. An interval that is not known (NaN) decides nothing.

Equivalence is two one-sided tests (Schuirmann, 1987), https://doi.org/10.1007/BF01068419
"""

from __future__ import annotations

from collections.abc import Iterable

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


def is_superior(low: float, high: float, margin: float) -> str:
    """Whether the difference is above the margin: refuted where it is below it."""
    if low > margin:
        return SUPPORTED
    return REFUTED if high < margin else UNDECIDED


def is_not_inferior(low: float, high: float, margin: float) -> str:
    """Whether the difference is above −margin, so that ours are not worse by as much."""
    return is_superior(low, high, -margin)


def is_equivalent(low: float, high: float, margin: float) -> str:
    """Whether the difference is within ±margin: refuted where it lies outside on either side."""
    if -margin < low and high < margin:
        return SUPPORTED
    return REFUTED if low > margin or high < -margin else UNDECIDED


RULES = {
    "superior": is_superior,
    "not inferior": is_not_inferior,
    "equivalent": is_equivalent,
}
WORDS = {
    "superior": "above {}",
    "not inferior": "above −{}",
    "equivalent": "within ±{}",
}


def decide(tests: Iterable[str], conditions: Iterable[str] = ()) -> str:
    """The verdict on a claim that says several things at once.

    It is supported if all of them are and refuted if one of them is. Where a condition under which
    it is claimed is not shown to hold, nothing is decided.
    """
    verdicts = [*tests]
    if any(each != SUPPORTED for each in conditions):
        return UNDECIDED
    if REFUTED in verdicts:
        return REFUTED
    return SUPPORTED if all(each == SUPPORTED for each in verdicts) else UNDECIDED
