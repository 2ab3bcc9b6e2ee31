"""Intervals, calibration and win rates against values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isnan

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import (
    accuracy_by_bins,
    bootstrap_interval,
    calibration,
    correlation,
    pass_all,
    preference_confidence,
    wilson_interval,
    win_rate,
)


def test_wilson_by_hand():
    # center (.8 + 3.8416/20)/1.38416, radius 1.96 √(.016 + 3.8416/400)/1.38416
    assert wilson_interval(8, 10) == pytest.approx((0.490158, 0.943320), abs=1e-5)
    # p̂ = 0: the interval is [0, z²/(n + z²)]
    assert wilson_interval(0, 20) == pytest.approx((0.0, 3.8416 / 23.8416), abs=1e-12)
    assert wilson_interval(20, 20) == pytest.approx((20 / 23.8416, 1.0), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_symmetry_and_ties():
    low, high = wilson_interval(3.5, 12)
    assert wilson_interval(8.5, 12) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson_interval(3, 12)[0] < low < wilson_interval(4, 12)[0]


@pytest.mark.parametrize("successes, n", [(-1, 10), (11, 10), (1, 0)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson_interval(successes, n)


def test_wilson_covers():
    """Over uniform p the coverage of the 95 % interval is 95 % (± 1 %, 6 standard errors)."""
    rng = np.random.default_rng(0)
    n, p = 50, rng.uniform(size=20_000)
    intervals = np.array([wilson_interval(int(k), n) for k in rng.binomial(n, p)])
    covered = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
    assert abs(covered.mean() - 0.95) < 0.01
    for edge in (p < 0.05, p > 0.95):
        assert covered[edge].mean() > 0.92


def test_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(values, seed=0) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval([2.5, 2.5], seed=0) == (2.5, 2.5)


def test_bootstrap_resamples_prompts_not_samples():
    prompts = np.random.default_rng(2).normal(size=40)
    repeated = np.repeat(prompts[:, None], 8, axis=1)
    one = bootstrap_interval(prompts, seed=0)
    assert bootstrap_interval(repeated, seed=0) == pytest.approx(one, abs=1e-12)


def test_bootstrap_is_wider_with_more_confidence():
    values = np.arange(30.0)
    low, high = bootstrap_interval(values, seed=0, confidence=0.5)
    wide_low, wide_high = bootstrap_interval(values, seed=0, confidence=0.99)
    assert wide_low < low < high < wide_high


def test_calibration_by_hand():
    # two bins: {.2, .4} right half the time, {.7, .9, .9} always
    result = calibration([0.2, 0.4, 0.7, 0.9, 0.9], [0, 1, 1, 1, 1], bins=2)
    assert result.counts == (2, 3)
    assert result.confidence == pytest.approx((0.3, 2.5 / 3), abs=1e-12)
    assert result.accuracy == (0.5, 1.0)
    assert result.ece == pytest.approx((2 * 0.2 + 3 * (0.5 / 3)) / 5, abs=1e-12)


def test_calibration_bins_are_closed_above_and_complete():
    result = calibration([0.0, 0.5, 1.0], [0, 0.5, 1], bins=4)
    assert result.counts == (1, 1, 0, 1)
    assert result.edges == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert result.accuracy == (0.0, 0.5, None, 1.0)
    assert result.ece == 0.0
    assert json.loads(json.dumps(asdict(result)))["counts"] == [1, 1, 0, 1]


def test_a_calibrated_preference_model_has_no_ece():
    """Pairs whose labels follow σ(margin): the ECE shrinks to sampling noise; doubled, it shows."""
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 2, 40_000)
    labelled = np.where(rng.random(40_000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert calibration(*preference_confidence(labelled)).ece < 0.015
    assert calibration(*preference_confidence(2 * labelled)).ece > 0.05


def test_preference_confidence():
    probabilities, outcomes = preference_confidence([0.0, np.log(3), -np.log(3)])
    np.testing.assert_allclose(probabilities, [0.5, 0.75, 0.75], atol=1e-12)
    np.testing.assert_array_equal(outcomes, [0.5, 1, 0])


def test_win_rate_by_hand():
    # differences 1, 0.1 (tie), −1, 2
    result = win_rate([2, 1.1, 0, 3], [1, 1, 1, 1], tie_tolerance=0.2)
    assert (result.rate, result.ties) == (2.5 / 4, 1)
    assert (result.low, result.high) == wilson_interval(2.5, 4)
    rate, low, high, ties = win_rate([1, 1], [1, 1])
    assert (rate, ties) == (0.5, 2) and low < 0.5 < high


def test_win_rate_is_antisymmetric():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 5, (2, 100)).astype(float)
    ours, theirs = win_rate(a, b), win_rate(b, a)
    assert ours.rate + theirs.rate == pytest.approx(1, abs=1e-12)
    assert ours.ties == theirs.ties > 0


def test_accuracy_by_bins():
    result = accuracy_by_bins([-9, -1, 0, 0, 7, 50], [1, 0, 1, 0, 1, 0.5], edges=[-5, 0, 5, 99])
    assert result.counts == (1, 1, 2, 2, 0)
    assert result.accuracy == (1.0, 0.0, 0.5, 0.75, None)
    assert (result.low[4], result.high[4]) == (0.0, 1.0)
    assert (result.low[2], result.high[2]) == wilson_interval(1, 2)


def test_correlation():
    assert correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1, abs=1e-12)
    assert correlation([1, 2, 3], [5, 3, 1]) == pytest.approx(-1, abs=1e-12)
    assert correlation([-1, 0, 1], [1, 0, 1]) == pytest.approx(0, abs=1e-12)
    assert isnan(correlation([1, 2, 3], [0.1, 0.1, 0.1]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: win_rate([1, 2], [1]), "one length"),
        (lambda: win_rate([], []), "non-empty"),
        (lambda: win_rate([np.nan], [1]), "ours has 1 non-finite"),
        (lambda: win_rate([1], [1], -1), "tie_tolerance"),
        (lambda: calibration([1.2], [1]), r"probabilities must lie in \[0, 1\]"),
        (lambda: calibration([0.2], [2]), r"outcomes must lie in \[0, 1\]"),
        (lambda: bootstrap_interval([], seed=0), "values must be"),
        (lambda: accuracy_by_bins([1], [1], [3, 2]), "increasing"),
        (lambda: correlation([[1]], [[1]]), "vectors"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pass_all_is_the_share_of_draws_that_all_succeed():
    # Of 4 tries 2 succeeded: 1 of the 6 pairs did so wholly; 3 never.
    assert pass_all([0, 2, 4], 4, 1).tolist() == [0, 0.5, 1]
    assert pass_all([0, 2, 4], 4, 2).tolist() == [0, 1 / 6, 1]
    assert pass_all([2, 3, 4], 4, 4).tolist() == [0, 0, 1]
    for k, counts in ((0, [1]), (5, [1]), (1, [5]), (1, [-1])):
        with pytest.raises(ValueError, match="need 1 <= k"):
            pass_all(counts, 4, k)
