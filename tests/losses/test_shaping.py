"""Rewards of tokens by hand, and the KL estimates they are made of."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.shaping import (
    ESTIMATORS,
    adaptive_coefficient,
    exact_kl,
    kl_estimate,
    lagrange_multiplier,
    missing_eos,
    overlong_penalty,
    token_rewards,
)
from rlhf_jax.oracle import exact_world as world
from tests.losses.exact_gradients import GENERIC


def f32(x):
    return jnp.asarray(x, jnp.float32)


MASK = f32([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def test_kl_estimates_by_hand():
    logprobs, ref = f32([-1.0, -2.0]), f32([-1.5, -1.0])
    expected = {
        "k1": [0.5, -1],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1],
    }
    assert set(expected) == set(ESTIMATORS)
    for kind, values in expected.items():
        np.testing.assert_allclose(kl_estimate(logprobs, ref, kind), values, rtol=1e-6)
    assert kl_estimate(f32(-1.0), f32(-1.5), "k1").shape == ()


def test_k3_of_nearly_equal_log_probs_keeps_its_digits():
    values = kl_estimate(f32([-1.0]), f32([-1.0 + 2**-10]), "k3")
    np.testing.assert_allclose(values, 2.0**-21, rtol=1e-3)
    assert float(kl_estimate(f32(-3.0), f32(-3.0), "k3")) == 0


def test_exact_kl_is_the_expectation_of_k1_and_k3():
    rng = np.random.default_rng(0)
    logits, ref = f32(rng.normal(size=(2, 3, 2, 7)))
    probs = jax.nn.softmax(logits)
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    for kind in ("k1", "k3"):
        expected = jnp.sum(probs * kl_estimate(logp, logq, kind), axis=-1)
        np.testing.assert_allclose(exact_kl(logits, ref), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(exact_kl(logits, logits + 3), 0, atol=1e-6)
    np.testing.assert_allclose(
        exact_kl(f32([0.0, 0]), jnp.log(f32([1.0, 3]))),
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        rtol=1e-6,
    )


def test_exact_kl_of_tokens_adds_up_to_that_of_responses():
    with jax.enable_x64(True):
        per_prefix = exact_kl(jnp.asarray(GENERIC), jnp.asarray(world.REFERENCE))
        law = np.exp(world.logprobs(GENERIC))
        total = law[:, :, None] * world.MASK * np.asarray(per_prefix)[:, world.NODES]
        np.testing.assert_allclose(total.sum() / world.PROMPTS, 0.103489, atol=1e-6)


def test_banned_tokens_leave_the_exact_kl_and_its_gradient_finite():
    logits, ref = f32([0.3, 1.0, -jnp.inf]), f32([0.1, -1.0, -jnp.inf])
    value, gradient = jax.jit(jax.value_and_grad(exact_kl))(logits, ref)
    expected, expected_gradient = jax.value_and_grad(exact_kl)(logits[:2], ref[:2])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:2], expected_gradient, rtol=1e-5)
    assert gradient[2] == 0
    assert exact_kl(ref[:2], f32([0.1, -jnp.inf])) == jnp.inf
    assert np.isfinite(exact_kl(f32([0.1, -jnp.inf]), ref[:2]))


def test_token_rewards_by_hand():
    scores, kl = f32([4, 2, 9]), f32([[1, 2, 3, 9, 9], [4, 9, 5, 6, 7], [9, 9, 9, 9, 9]])
    expected = [[-0.5, -1, 2.5, 0, 0], [-2, 0, -2.5, -3, -1.5], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(token_rewards(scores, MASK, kl, coefficient=0.5), expected)
    only = [[0, 0, 4, 0, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(token_rewards(scores, MASK), only)


def test_rewards_sum_to_the_score_less_the_kl_without_gradient_or_garbage():
    rng = np.random.default_rng(0)
    scores, kl = f32(rng.normal(size=3)), f32(rng.normal(size=(3, 5)))
    spoiled = scores.at[2].set(jnp.nan), jnp.where(MASK != 0, kl, jnp.nan)

    @jax.jit
    def rewards(scores, kl):
        return token_rewards(scores, MASK, kl, coefficient=0.3)

    expected = jnp.where(MASK.any(1), scores - 0.3 * jnp.sum(kl * MASK, axis=1), 0)
    np.testing.assert_allclose(rewards(scores, kl).sum(1), expected, rtol=1e-5)
    np.testing.assert_array_equal(rewards(*spoiled), rewards(scores, kl))
    gradients = jax.grad(lambda *a: jnp.sum(rewards(*a) ** 2), (0, 1))(scores, kl)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_missing_eos_by_hand():
    scores, finished = f32([3, 4, -2]), jnp.array([True, False, False])
    expected = {"none": [3, 4, -2], "subtract": [3, 2.5, -3.5], "replace": [3, -1.5, -1.5]}
    for mode, values in expected.items():
        found = missing_eos(scores, finished, mode=mode, penalty=1.5)
        np.testing.assert_array_equal(found, values)


def test_overlong_penalty_by_hand():
    lengths = jnp.array([1, 80, 81, 90, 100, 101, 500])
    found = overlong_penalty(lengths, limit=100, buffer=20)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.5, -1, -1, -1], rtol=1e-6)


def test_the_controller_by_hand():
    def following(kl, coefficient=0.5):
        return float(adaptive_coefficient(coefficient, kl, target=2.0, horizon=100.0, count=10))

    assert following(2.0) == 0.5
    assert following(2.2) == pytest.approx(0.5 * 1.01)
    assert following(100.0) == pytest.approx(0.5 * 1.02)
    assert following(0.0) == pytest.approx(0.5 * 0.98)
    assert following(1.8, 1.0) == pytest.approx(0.99)


def test_the_controller_settles_where_the_kl_is_its_target():
    """On enum-121 at the KL of π* for β = 0.5, were the policy always optimal for its β."""
    coefficient, ref = 0.2, world.logprobs(world.REFERENCE)
    for _ in range(300):
        kl = world.kl(world.optimum(coefficient), ref)
        coefficient = float(
            adaptive_coefficient(coefficient, kl, target=0.737306, horizon=10.0, count=2)
        )
    assert coefficient == pytest.approx(0.5, abs=1e-3)


def test_precision_follows_the_inputs():
    with jax.enable_x64(True):
        x, mask = jnp.asarray([[0.1, 0.7]]), jnp.ones((1, 2))
        results = kl_estimate(x, x, "k3"), exact_kl(x, x), token_rewards(x[0, :1], mask, x)
        assert {r.dtype for r in results} == {jnp.dtype("float64")}
        x = x.astype(jnp.bfloat16)
        results = kl_estimate(x, x, "k3"), exact_kl(x, x), token_rewards(x[0, :1], mask, x)
        assert {r.dtype for r in results} == {jnp.dtype("float32")}


def test_mistakes_are_refused_by_name():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3, got 'k4'"):
        kl_estimate(ones, ones, "k4")
    with pytest.raises(ValueError, match="same shape"):
        kl_estimate(ones, ones[:2], "k1")
    with pytest.raises(ValueError, match=r"scores \(2,\), first_slots \(3,\)"):
        token_rewards(ones[:2], MASK)
    with pytest.raises(ValueError, match="mode must be one of none, subtract, replace"):
        missing_eos(ones, ones, mode="drop", penalty=1.0)
    with pytest.raises(ValueError, match=r"buffer must be in \(0, limit\], got 0"):
        overlong_penalty(ones, limit=5, buffer=0)
    with pytest.raises(ValueError, match=r"target must be in \(0, inf\), got 0"):
        adaptive_coefficient(0.1, 0.1, target=0.0, horizon=1.0, count=1)


def test_the_multiplier_ascends_by_the_excess_and_is_never_negative():
    nexts = [
        float(lagrange_multiplier(f32(multiplier), f32(cost), limit=0.05, rate=2.0))
        for multiplier, cost in ((1.0, 0.25), (1.0, 0.0), (0.05, 0.0), (0.0, 0.05))
    ]
    np.testing.assert_allclose(nexts, [1.4, 0.9, 0.0, 0.0], atol=1e-6)
