"""What the rules decide: hand-made intervals, a placebo, and effects that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_jax.claims.claim import Arm, Comparison, Measure
from rlhf_jax.claims.findings import LEVEL, judge
from rlhf_jax.claims.rules import REFUTED, RULES, SUPPORTED, UNDECIDED, WORDS, decide
from rlhf_jax.sweep.statistics import estimate

ONE, OTHER = Measure(Arm("one", "a.py"), "gold"), Measure(Arm("other", "a.py"), "gold")


@pytest.mark.parametrize(
    "rule, low, high, margin, verdict",
    [
        ("superior", 0.06, 0.20, 0.05, SUPPORTED),
        ("superior", 0.05, 0.20, 0.05, UNDECIDED),  # its end is on the margin
        ("superior", -0.10, 0.04, 0.05, REFUTED),
        ("superior", -0.10, 0.05, 0.05, UNDECIDED),
        ("superior", 0.01, 0.02, 0.0, SUPPORTED),
        ("superior", -0.02, -0.01, 0.0, REFUTED),
        ("not inferior", -0.04, 0.20, 0.05, SUPPORTED),
        ("not inferior", -0.06, 0.20, 0.05, UNDECIDED),
        ("not inferior", -0.30, -0.06, 0.05, REFUTED),
        ("equivalent", -0.04, 0.04, 0.05, SUPPORTED),
        ("equivalent", -0.05, 0.04, 0.05, UNDECIDED),
        ("equivalent", -0.01, 0.06, 0.05, UNDECIDED),
        ("equivalent", 0.06, 0.10, 0.05, REFUTED),
        ("equivalent", -0.10, -0.06, 0.05, REFUTED),
    ],
)
def test_a_rule_asks_where_the_whole_interval_lies(rule, low, high, margin, verdict):
    assert RULES[rule](low, high, margin) == verdict


def test_of_an_interval_that_is_not_known_nothing_is_decided():
    assert RULES.keys() == WORDS.keys()
    assert {rule(math.nan, math.nan, 0.05) for rule in RULES.values()} == {UNDECIDED}


@pytest.mark.parametrize(
    "tests, conditions, verdict",
    [
        ([SUPPORTED, SUPPORTED], [], SUPPORTED),
        ([SUPPORTED, UNDECIDED], [], UNDECIDED),
        ([UNDECIDED, REFUTED], [], REFUTED),
        ([SUPPORTED], [SUPPORTED], SUPPORTED),
        ([SUPPORTED], [UNDECIDED], UNDECIDED),
        ([REFUTED], [REFUTED], UNDECIDED),  # nothing was claimed of such runs
    ],
)
def test_a_claim_of_several_parts_needs_all_of_them(tests, conditions, verdict):
    assert decide(tests, conditions) == verdict


def test_a_verdict_by_hand():
    # Differences of three seeds are 0.1, 0.2 and 0.3: mean 0.2, sd 0.1, half-width
    # 6.2053 · 0.1 / √3 = 0.3583 of Student's t with two degrees of freedom.
    ours, theirs = np.array([[0.5], [0.7], [0.9]]), np.array([[0.4], [0.5], [0.6]])
    found = judge(Comparison(ONE, OTHER, "superior", 0.1), ours, theirs)
    assert (found.ours, found.theirs, found.difference.mean) == pytest.approx((0.7, 0.5, 0.2))
    assert found.difference.high - found.difference.low == pytest.approx(2 * 0.3583, abs=1e-3)
    assert found.seeds == pytest.approx((0.1, 0.2, 0.3)) and found.prompts == 0
    assert found.verdict == UNDECIDED
    assert judge(Comparison(ONE, OTHER, "superior", 0.6), ours, theirs).verdict == REFUTED
    assert judge(Comparison(ONE, OTHER, "equivalent", 0.6), ours, theirs).verdict == SUPPORTED
    # The same differences with the same prompts: what seeds share is taken out by pairing.
    shifts = np.array([[0.0], [0.3], [-0.3]])
    again = judge(Comparison(ONE, OTHER, "superior", 0.1), ours + shifts, theirs + shifts)
    assert again.difference.mean == pytest.approx(0.2) and again.seeds == pytest.approx(found.seeds)


def test_both_intervals_are_of_one_level():
    # Seeds that all say the same: prompts alone have the whole variance.
    ours = np.tile(np.random.default_rng(0).normal(size=400), (3, 1))
    found = judge(Comparison(ONE, OTHER, "superior"), ours, 0 * ours)
    low, high = found.of_prompts
    assert high - low == pytest.approx(found.difference.high - found.difference.low, rel=0.04)


def simulated(random, seeds: int, effect: float, rule: str, margin: float) -> list[str]:
    """Verdicts on 100 sets of two arms of the town's kind, one better by `effect`.

    As in docs/sweeps.md, seeds have a deviation of one point and single answers one of 20.
    """
    found = []
    for _ in range(100):
        prompts = random.normal(0.7, 0.25, 256)
        ours, theirs = (
            prompts + random.normal(0, 0.01, (seeds, 1)) + random.normal(0, 0.2, (seeds, 256))
            for _ in range(2)
        )
        interval = estimate(ours + effect - theirs, level=LEVEL)
        found.append(RULES[rule](interval.low, interval.high, margin))
    return found


@pytest.mark.parametrize("seeds", [3, 5])
def test_of_the_same_arm_twice_nothing_is_found(seeds):
    """A placebo: of 100 sets of seeds at least 95 are undecided or equivalent, by every rule."""
    random = np.random.default_rng(seeds)
    found = simulated(random, seeds, 0.0, "superior", 0.0)
    print(f"{seeds} seeds, the same arm twice: {found.count(UNDECIDED)} of 100 undecided")
    assert found.count(UNDECIDED) >= 95
    assert simulated(random, seeds, 0.0, "equivalent", 0.05).count(REFUTED) <= 5
    assert simulated(random, seeds, 0.0, "not inferior", 0.05).count(REFUTED) <= 5


@pytest.mark.parametrize("seeds, effect, least", [(3, 0.05, 20), (3, 0.15, 80), (5, 0.05, 80)])
def test_a_planted_effect_is_found(seeds, effect, least):
    """Five points are found by five seeds in at least 80 of 100 sets; three seeds need more."""
    random = np.random.default_rng(0)
    found = simulated(random, seeds, effect, "superior", 0.0)
    print(f"{seeds} seeds, {100 * effect:g} points better: {found.count(SUPPORTED)} of 100 found")
    assert found.count(SUPPORTED) >= least and REFUTED not in found


def test_arms_that_differ_by_the_margin_are_not_equivalent():
    random = np.random.default_rng(0)
    assert simulated(random, 5, 0.05, "equivalent", 0.05).count(SUPPORTED) <= 5
    assert simulated(random, 5, 0.15, "equivalent", 0.05).count(REFUTED) >= 95


def test_a_number_that_is_none_decides_nothing():
    for ours in (np.array([[1.0], [math.nan]]), np.full((3, 8), math.nan)):
        found = judge(Comparison(ONE, OTHER, "superior"), ours, 0 * ours)
        assert found.verdict == UNDECIDED and math.isnan(found.difference.low)
        assert all(map(math.isnan, found.of_prompts))
