"""Best-of-n against exact laws, full enumeration and the two small worlds of the literature."""

from __future__ import annotations

from itertools import combinations
from math import comb, log

import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf_jax.evaluation.selection import (
    best_of_n,
    best_of_n_curve,
    best_of_n_law,
    best_of_n_win_rate,
    fit_overoptimization,
    kl_bound,
    kl_estimate,
    kl_terms,
    win_bound,
)
from rlhf_jax.oracle import exact_world as world
from tests.evaluation import gao6

# n: bound, exact KL, estimate, E r, win rate, n/(n+1) in enum-121
TABLE = {
    2: (0.1931, 0.1911, 0.1928, 0.1508, 0.66459, 0.66667),
    4: (0.6363, 0.6260, 0.6331, 0.4085, 0.79595, 0.80000),
    8: (1.2044, 1.1893, 1.1970, 0.6462, 0.88591, 0.88889),
    16: (1.8351, 1.8264, 1.8303, 0.8686, 0.94016, 0.94118),
    64: (3.1745, 3.1534, 3.1605, 1.2211, 0.98395, 0.98462),
    256: (4.5491, 4.3101, 4.3214, 1.4163, 0.99395, 0.99611),
    1024: (5.9324, 5.1064, 5.1116, 1.5358, 0.99588, 0.99902),
    4096: (7.3180, 5.7646, 5.7719, 1.6159, 0.99646, 0.99976),
}


@pytest.fixture(scope="module")
def reference():
    """log π_ref [4, 121]."""
    return world.logprobs(world.REFERENCE)


def laws(reference, n):
    pairs = zip(np.exp(reference), world.REWARDS, strict=True)
    return np.stack([best_of_n_law(p, r, n) for p, r in pairs])


@pytest.mark.parametrize("n", TABLE)
def test_exact_law(reference, n):
    law = laws(reference, n)
    ours, theirs = world.REWARDS[:, :, None], world.REWARDS[:, None, :]
    beats = (ours > theirs) + 0.5 * (ours == theirs)
    numbers = (
        kl_bound(n),
        (law * np.log(np.where(law > 0, law, 1) / np.exp(reference))).sum(1).mean(),
        (law * kl_terms(n, reference)).sum(1).mean(),
        (law * world.REWARDS).sum(1).mean(),
        np.einsum("pi,pij,pj->p", law, beats, np.exp(reference)).mean(),
        win_bound(n),
    )
    np.testing.assert_allclose(law.sum(1), 1, atol=1e-9)
    assert numbers == pytest.approx(TABLE[n], abs=1e-4)
    assert numbers[1] <= numbers[0] and numbers[4] <= numbers[5]


def test_law_of_one_is_the_policy_itself(reference):
    np.testing.assert_allclose(laws(reference, 1), np.exp(reference), atol=1e-9)
    tied = best_of_n_law([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], 2)
    # The best of two is of the upper level unless both are of the lower: 1 − .6² = .64.
    np.testing.assert_allclose(tied, [0.16, 0.12, 0.48, 0.24], atol=1e-12)


def test_sampled_best_of_n_follows_the_law(reference):
    rng = np.random.default_rng(0)
    n, draws = 4, 20_000
    law, win = laws(reference, n), []
    for p in range(world.PROMPTS):
        outcomes = rng.choice(121, (draws, n), p=np.exp(reference[p]))
        best = np.argmax(world.REWARDS[p][outcomes], axis=1)
        counts = np.bincount(outcomes[np.arange(draws), best], minlength=121)
        expected = law[p] * draws
        rare = expected < 5
        groups = [np.append(x[~rare], x[rare].sum()) for x in (counts.astype(float), expected)]
        assert chisquare(*groups).pvalue > 1e-3
        below = (world.REWARDS[p][:, None] > world.REWARDS[p]) @ np.exp(reference[p])
        below += 0.5 * np.exp(reference[p])  # all 121 rewards differ
        error = np.sqrt(law[p] @ below**2 - (law[p] @ below) ** 2) / np.sqrt(draws)
        assert abs(counts @ below / draws - law[p] @ below) < 4 * error
        win.append(counts @ below / draws)
    assert np.mean(win) == pytest.approx(TABLE[n][4], abs=0.005)


@pytest.mark.parametrize("levels", [1, 3, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_draw_counts_once(levels, n):
    """The average over all C(7, n) draws, each won by its highest proxy, ties shared."""
    rng = np.random.default_rng(levels)
    proxy, values = rng.integers(0, levels, (3, 7)), rng.normal(size=(3, 7))
    expected = np.zeros(3)
    for draw in combinations(range(7), n):
        drawn = proxy[:, draw]
        best = drawn == drawn.max(1, keepdims=True)
        expected += (best * values[:, draw]).sum(1) / best.sum(1) / comb(7, n)
    np.testing.assert_allclose(best_of_n(proxy, values, n), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unbiased_over_all_samples(n):
    """Its expectation over every possible set of N = 4 samples is the law's, ties included."""
    p = np.array([0.2, 0.5, 0.3])
    proxy, gold = np.array([1.0, 0.0, 1.0]), np.array([0.3, -1.0, 2.0])
    samples = np.stack(np.meshgrid(*[range(3)] * 4, indexing="ij"), -1).reshape(-1, 4)
    estimates = best_of_n(proxy[samples], gold[samples], n)
    assert p[samples].prod(1) @ estimates == pytest.approx(best_of_n_law(p, proxy, n) @ gold)


def test_best_of_all_is_the_best_and_of_one_the_mean():
    rng = np.random.default_rng(3)
    proxy = rng.normal(size=(5, 4096))
    np.testing.assert_allclose(best_of_n(proxy, proxy, 4096), proxy.max(1), atol=1e-9)
    np.testing.assert_allclose(best_of_n(proxy, proxy, 1), proxy.mean(1), atol=1e-9)
    for n in (2, 100, 2048, 4095):
        ones = best_of_n(proxy, np.ones_like(proxy), n)
        np.testing.assert_allclose(ones, 1, atol=1e-9)


@pytest.mark.parametrize("levels", [1, 2, 4, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_win_rate_counts_every_draw_against_every_opponent(levels, n):
    rng = np.random.default_rng(levels)
    proxy, values = rng.integers(0, levels, (3, 7)), rng.integers(0, 3, (3, 7))
    for p, v, rate in zip(proxy, values, best_of_n_win_rate(proxy, values, n), strict=True):
        wins = []
        for opponent in range(7):
            for draw in combinations([i for i in range(7) if i != opponent], n):
                best = [i for i in draw if p[i] == max(p[list(draw)])]
                wins.append(np.mean(np.sign(v[best] - v[opponent]) / 2 + 0.5))
        assert rate == pytest.approx(np.mean(wins), abs=1e-12)


def test_win_rate_in_the_small_world(reference):
    rng = np.random.default_rng(5)
    rewards = np.concatenate(
        [
            r[rng.choice(121, (64, 256), p=np.exp(p))]
            for r, p in zip(world.REWARDS, reference, strict=True)
        ]
    )
    for n in (2, 4, 8, 16, 64, 255):
        rates = best_of_n_win_rate(rewards, rewards, n)
        assert rates.shape == (256,) and rates.max() <= win_bound(n) + 1e-9
        if n in TABLE:
            error = rates.std() / 16
            assert rates.mean() == pytest.approx(TABLE[n][4], abs=4 * error + 1e-5)
    distinct = rng.normal(size=(2, 256))
    for n in (1, 7, 255):
        np.testing.assert_allclose(best_of_n_win_rate(distinct, distinct, n), win_bound(n))
        np.testing.assert_allclose(best_of_n_win_rate(distinct, np.ones((2, 256)), n), 0.5)
    for n in (0, 256):
        with pytest.raises(ValueError, match="at least 1 and below the 256 samples"):
            best_of_n_win_rate(distinct, distinct, n)


@pytest.mark.parametrize("n", [0, 5])
def test_no_more_than_there_are(n):
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), n)


def test_refuses_what_is_no_table_of_scores():
    for proxy, values in (
        ([1.0, 2.0], [1.0, 2.0]),
        ([[1.0, 2.0]], [[1.0]]),
        ([[1.0, np.nan]], [[1.0, 2.0]]),
        ([[1.0, 2.0]], [[1.0, np.inf]]),
    ):
        with pytest.raises(ValueError, match="proxy and values"):
            best_of_n(proxy, values, 1)


def test_curve():
    rng = np.random.default_rng(4)
    proxy = rng.normal(size=(50, 32))
    curve = best_of_n_curve(proxy, proxy, [1, 4, 32])
    assert curve["mean"] == [pytest.approx(best_of_n(proxy, proxy, n).mean()) for n in (1, 4, 32)]
    assert all(
        low < mean < high
        for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True)
    )
    assert curve == best_of_n_curve(proxy, proxy, [1, 4, 32])
    assert curve["low"] != best_of_n_curve(proxy, proxy, [1, 4, 32], seed=1)["low"]


def test_kl_estimate_at_the_edges():
    for n in (1, 2, 1000):
        assert kl_estimate(n, [0.0, 0.0]) == pytest.approx(0, abs=1e-9)  # the one outcome there is
        for rare in (-30.0, -50.0, -690.0, -800.0):
            assert kl_estimate(n, rare) == pytest.approx(kl_bound(n), abs=1e-9)
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(log(4) - 0.75)
    for bad in ([], [0.1], [np.nan], [-np.inf]):
        with pytest.raises(ValueError, match="log-probabilities"):
            kl_estimate(2, bad)


def test_fits_recover_their_own_law():
    d = np.linspace(0, 3, 9)
    curved = fit_overoptimization(d, d * (1.5 - 0.4 * d))["best_of_n"]
    assert (curved.alpha, curved.beta, curved.r2) == pytest.approx((1.5, 0.4, 1))
    assert curved.residual_std == pytest.approx(0, abs=1e-9)
    logged = fit_overoptimization(d, d * (1.5 - 0.4 * np.log(np.maximum(d, 1e-9))))
    assert (logged["rl"].alpha, logged["rl"].beta) == pytest.approx((1.5, 0.4))
    assert logged["best_of_n"].r2 < logged["rl"].r2 == pytest.approx(1)
    noise = np.random.default_rng(0).normal(0, 0.1, 2000)
    long = np.linspace(0, 3, 2000)
    assert fit_overoptimization(long, long + noise)["rl"].residual_std == pytest.approx(0.1, 0.05)
    with pytest.raises(ValueError, match="three points"):
        fit_overoptimization([1, 2], [1, 2])
    with pytest.raises(ValueError, match="at least 0"):
        fit_overoptimization([-1, 1, 2], [1, 2, 3])


NS = [2**i for i in range(12)]
RM_2 = [0, 0.367, 0.703, 0.940, 0.998, 0.856, 0.540, 0.105, -0.367, -0.755, -1.091, -1.452]


@pytest.fixture(scope="module")
def gold_curves():
    """Gold reward of best-of-n by each reward model of gao-6, minus the reference's: [12] each."""
    curves = {}
    for size in gao6.FEATURES:
        scores = gao6.reward_model(size)
        gain = [[(best_of_n_law(q, scores, n) - q) @ gao6.GOLD for q in gao6.REFERENCE] for n in NS]
        curves[size] = np.mean(gain, axis=1)
    return curves


def test_gao6_is_the_world_of_the_specification():
    assert gao6.REFERENCE.shape == (4, 1093)
    np.testing.assert_allclose(gao6.REFERENCE.sum(1), 1, atol=1e-9)
    assert gao6.REFERENCE[:, gao6.A >= 4].sum(1).mean() == pytest.approx(0.0092, abs=5e-5)


def test_small_reward_models_are_overoptimized(gold_curves):
    for size in (1, 2):
        assert NS[np.argmax(gold_curves[size])] == 16
        assert gold_curves[size][-1] < -1.4
    np.testing.assert_allclose(gold_curves[2], RM_2, atol=0.01)


def test_large_reward_models_are_not(gold_curves):
    for size in (3, 4):
        assert (np.diff(gold_curves[size]) > 0).all()
        assert gold_curves[size][-1] == pytest.approx(2.05, abs=0.02)


def test_a_good_fit_is_no_evidence_of_overoptimization(gold_curves):
    d = np.sqrt([kl_bound(n) for n in NS])
    r2 = {size: fit_overoptimization(d, y)["best_of_n"].r2 for size, y in gold_curves.items()}
    assert r2[2] == pytest.approx(0.965, abs=0.003) and r2[1] == pytest.approx(0.963, abs=0.005)
    assert r2[3] == pytest.approx(0.995, abs=0.002) and r2[4] == pytest.approx(0.995, abs=0.002)


def test_rl_against_a_small_reward_model_ends_far_below_its_start():
    scores = gao6.reward_model(2)
    kl, gold = np.transpose([gao6.tilted(scores, beta) for beta in np.geomspace(30, 0.01, 100)])
    peak = int(np.argmax(gold))
    assert gold[peak] == pytest.approx(0.456, abs=0.01) and 0.6 < kl[peak] < 1
    assert gold[-1] < -3 and kl[-1] == pytest.approx(11.45, abs=0.05)
