"""Rates corrected for a judge's mistakes, and intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.judges.rates import Calibration, corrected_rate


def test_a_rate_by_hand():
    known = Calibration(hits=80, positives=100, rejections=90, negatives=100)
    assert (known.sensitivity, known.specificity) == (0.8, 0.9)
    rate = corrected_rate(450, 1000, known)
    assert math.isclose(rate.rate, (0.45 + 0.9 - 1) / (0.9 + 0.8 - 1))
    assert rate.low < rate.rate < rate.high
    # Each end is just not contradicted: its distance is z standard errors, by the formula.
    z2 = 1.959964**2
    p, q1, q0 = (((x + z2 / 2) / (n + z2), n + z2) for x, n in ((450, 1000), (80, 100), (90, 100)))
    for theta in rate[1:]:
        terms = ((p, 1.0), (q1, theta), (q0, 1 - theta))
        variance = sum(w * w * s * (1 - s) / n for (s, n), w in terms)
        distance = p[0] - theta * q1[0] - (1 - theta) * (1 - q0[0])
        assert math.isclose(abs(distance), math.sqrt(z2 * variance), rel_tol=1e-9)


@pytest.mark.parametrize(
    "known",
    [
        Calibration(50, 100, 50, 100),  # a coin
        Calibration(20, 100, 30, 100),  # worse than a coin
        Calibration(0, 0, 90, 100),  # no positive was seen
    ],
)
def test_a_judge_that_tells_nothing_has_no_rate(known):
    rate = corrected_rate(450, 1000, known)
    assert math.isnan(rate.rate) and rate[1:] == (0.0, 1.0)


def test_a_judge_that_hardly_tells_has_a_rate_from_0_to_1():
    rate = corrected_rate(500, 1000, Calibration(11, 20, 11, 20))
    assert rate[1:] == (0.0, 1.0) and 0 <= rate.rate <= 1


@pytest.mark.parametrize(("yes", "hits", "rejections"), [(0, 90, 60), (100, 60, 90)])
def test_counts_that_contradict_every_rate_are_no_surety(yes, hits, rejections):
    # Of 100 items none (all) is called so, though two in five of the other kind are by mistake.
    rate = corrected_rate(yes, 100, Calibration(hits, 100, rejections, 100))
    assert math.isnan(rate.rate) and rate[1:] == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_corrected_intervals_hold_the_exact_rate_and_naive_ones_do_not(seed):
    rng, judges, items, calibrated = np.random.default_rng(seed), 200, 1000, 200
    held = naive = 0
    for _ in range(judges):
        q0, q1 = rng.uniform(0.6, 0.95, 2)
        truth = rng.random(items) < rng.uniform(0.1, 0.9)
        exact = truth.mean()
        positives = int(rng.binomial(calibrated, exact))
        negatives = calibrated - positives
        known = Calibration(
            int(rng.binomial(positives, q1)), positives,
            int(rng.binomial(negatives, q0)), negatives,
        )  # fmt: skip
        yes = int((rng.random(items) < np.where(truth, q1, 1 - q0)).sum())
        rate = corrected_rate(yes, items, known)
        low, high = wilson_interval(yes, items)
        held += rate.low <= exact <= rate.high
        naive += low <= exact <= high
    assert held >= 0.93 * judges and naive < 0.5 * judges
    print(f"corrected {held / judges:.1%}, naive {naive / judges:.1%}")
