"""Advantages by hand, and what must hold for all of them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import (
    gae,
    group_advantages,
    remax,
    reward_to_go,
    whiten,
    zero_variance,
)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_reward_to_go_by_hand():
    rewards, mask = f32([[1, 2, 4, 9], [3, 9, 5, 1]]), f32([[1, 1, 1, 0], [1, 0, 1, 1]])
    np.testing.assert_array_equal(reward_to_go(rewards, mask), [[7, 6, 4, 0], [9, 0, 6, 1]])
    discounted = [[3, 4, 4, 0], [5.75, 0, 5.5, 1]]
    np.testing.assert_array_equal(reward_to_go(rewards, mask, gamma=0.5), discounted)


def test_gae_by_hand():
    rewards, values = f32([[1, 2, 4]]), f32([[0.5, 1, 2]])
    mask = jnp.ones((1, 3))
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages, [[1.625, 2.5, 2]])
    np.testing.assert_allclose(returns, [[2.125, 3.5, 4]])
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=f32([8]))
    np.testing.assert_allclose(advantages, [[1.875, 3.5, 6]])


def test_gae_at_its_ends():
    rng = np.random.default_rng(0)
    rewards, values = f32(rng.normal(size=(2, 3, 6)))
    mask = jnp.ones((3, 6))
    advantages, returns = gae(rewards, values, mask, lam=1.0)
    np.testing.assert_allclose(returns, reward_to_go(rewards, mask), rtol=1e-5, atol=1e-6)
    advantages, _ = gae(rewards, values, mask, lam=0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(advantages, rewards + following - values, rtol=1e-5, atol=1e-6)


def test_gae_steps_over_masked_slots():
    """As though they were not there, wherever they are and whatever they hold."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 2, 4))
    bootstrap = f32([0.3, 0])
    slots = [1, 2, 4, 7]
    mask = np.zeros((2, 9))
    mask[:, slots] = 1
    wide = np.full((2, 2, 9), np.nan)
    wide[0][:, slots], wide[1][:, slots] = rewards, values
    expected = gae(f32(rewards), f32(values), jnp.ones((2, 4)), gamma=0.9, bootstrap=bootstrap)
    found = gae(f32(wide[0]), f32(wide[1]), f32(mask), gamma=0.9, bootstrap=bootstrap)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a[:, slots], b)
        np.testing.assert_array_equal(a[mask == 0], 0)


def test_garbage_reaches_neither_value_nor_gradient():
    rng = np.random.default_rng(0)
    rewards, values = f32(rng.normal(size=(2, 3, 5)))
    mask = f32(rng.random((3, 5)) < 0.6)

    def loss(rewards, values):
        advantages, returns = gae(rewards, values, mask)
        white = whiten(rewards, mask) + whiten(values, mask)
        group = group_advantages(rewards, mask=mask, scale="group")
        group += group_advantages(values, mask=mask, baseline="leave_one_out", scale="batch")
        return jnp.sum(jnp.sin(advantages) + jnp.cos(returns) + white**2 + jnp.sin(group))

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = run(rewards, values)
    for garbage in (jnp.nan, jnp.inf, -1e30):
        found = run(*(jnp.where(mask != 0, x, garbage) for x in (rewards, values)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)


def test_group_advantages_by_hand():
    scores = f32([[1, 2, 6], [2, 2, 2]])
    table = {
        ("none", "none"): [[1, 2, 6], [2, 2, 2]],
        ("mean", "none"): [[-2, -1, 3], [0, 0, 0]],
        ("leave_one_out", "none"): [[-3, -1.5, 4.5], [0, 0, 0]],
        ("mean", "group"): [[-2 / 2.645851, -1 / 2.645851, 3 / 2.645851], [0, 0, 0]],
        ("none", "group"): [[1 / 2.645851, 2 / 2.645851, 6 / 2.645851], [0, 0, 0]],
        ("mean", "batch"): [[-2 / 1.760782, -1 / 1.760782, 3 / 1.760782], [0, 0, 0]],
    }
    for (baseline, scale), expected in table.items():
        found = group_advantages(scores, baseline=baseline, scale=scale)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"{baseline} {scale}")


def test_grpo_golden_of_trl():
    """(r − mean) / (std + 1e-4) with Bessel's correction: [0, 0, 1, 1] and [0.1, 0.9]."""
    found = group_advantages(f32([[0, 0, 1, 1]]), scale="group")
    np.testing.assert_allclose(found, f32([[-1, -1, 1, 1]]) * 0.8658754, rtol=1e-6)
    found = group_advantages(f32([[0.1, 0.9]]), scale="group")
    np.testing.assert_allclose(found, f32([[-1, 1]]) * 0.7069818, rtol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_a_flat_group_is_exactly_zero(baseline, scale):
    scores = f32([[0.1] * 7, [1 / 3] * 7, [-1e6] * 7, [0.1] * 6 + [0.2]])
    found = group_advantages(scores, baseline=baseline, scale=scale)
    np.testing.assert_array_equal(found[:3], 0)
    assert np.abs(found[3]).min() > 1e-9
    np.testing.assert_array_equal(zero_variance(scores), [True, True, True, False])


def test_invalid_scores_are_as_good_as_absent():
    scores = f32([[1, jnp.nan, 2, 6], [5, jnp.inf, jnp.nan, 5], [7, 8, 9, 9], [4, 0, 0, 0]])
    mask = f32([[1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    for baseline, expected in (("mean", [-2, 0, -1, 3]), ("leave_one_out", [-3, 0, -1.5, 4.5])):
        found = group_advantages(scores, mask=mask, baseline=baseline)
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)
        np.testing.assert_array_equal(found[1:], 0)
    np.testing.assert_array_equal(zero_variance(scores, mask), [False, True, True, True])
    whole = group_advantages(f32([[1, 2, 6]]), scale="group")
    found = group_advantages(scores, mask=mask, scale="group")
    np.testing.assert_allclose(found[0, [0, 2, 3]], whole[0], rtol=1e-6)


def test_groups_follow_their_scores():
    scores = f32(np.random.default_rng(0).normal(size=(6, 5)))
    rows, columns = np.array([3, 0, 5, 1, 4, 2]), np.array([4, 2, 0, 1, 3])
    for baseline in ("none", "mean", "leave_one_out"):
        for scale in ("none", "group", "batch"):

            @jax.jit
            def advantages(scores, baseline=baseline, scale=scale):
                return group_advantages(scores, baseline=baseline, scale=scale)

            expected = advantages(scores)[rows][:, columns]
            found = advantages(scores[rows][:, columns])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            shifted = advantages(scores + 3) - (3 if (baseline, scale) == ("none", "none") else 0)
            if baseline != "none" or scale == "none":
                np.testing.assert_allclose(shifted, advantages(scores), rtol=1e-4, atol=1e-5)


def test_remax_by_hand():
    found = remax(f32([[1, 2], [3, 5]]), f32([2, 1]))
    np.testing.assert_array_equal(found, [[-1, 0], [2, 4]])


def test_whiten_by_hand():
    values, mask = f32([[1, 2, 9], [6, 9, 9]]), f32([[1, 1, 0], [1, 0, 0]])
    expected = np.array([[-2, -1, 0], [3, 0, 0]]) / math.sqrt(7)
    np.testing.assert_allclose(whiten(values, mask), expected, rtol=1e-6)


@jax.jit
def whitened(values, mask):
    def square(values):
        return jnp.sum(whiten(values, mask) ** 2)

    return whiten(values, mask), jax.grad(square)(values)


@pytest.mark.parametrize("shape", [(5,), (1,)])
def test_whitening_what_does_not_vary(shape):
    equal, ones = jnp.full(shape, 0.1), jnp.ones(shape)
    moved, gradient = whitened(equal, ones)
    np.testing.assert_array_equal(moved, 0)
    assert np.isfinite(gradient).all()
    for result in whitened(equal, 0 * ones):
        np.testing.assert_array_equal(result, 0)


def test_padding_does_not_change_whitening():
    values = f32(np.random.default_rng(0).normal(3, 2, size=(3, 4)))
    padded = jnp.pad(values, ((0, 2), (0, 5)), constant_values=jnp.nan)
    mask = jnp.pad(jnp.ones((3, 4)), ((0, 2), (0, 5)))
    np.testing.assert_allclose(
        whiten(padded, mask)[:3, :4], whiten(values, jnp.ones((3, 4))), rtol=1e-5, atol=1e-6
    )


def test_precision_follows_the_inputs():
    with jax.enable_x64(True):
        x, ones = jnp.asarray([[0.1, 0.7, 0.2]]), jnp.ones((1, 3))
        results = (*gae(x, x, ones), whiten(x, ones), group_advantages(x), remax(x, x[:, 0]))
        assert {r.dtype for r in results} == {jnp.dtype("float64")}
        x = x.astype(jnp.bfloat16)
        results = (*gae(x, x, x), whiten(x, x), group_advantages(x), remax(x, x[:, 0]))
        assert {r.dtype for r in results} == {jnp.dtype("float32")}


def test_mistakes_are_refused_by_name():
    ones = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="baseline must be one of none, mean, leave_one_out"):
        group_advantages(ones, baseline="median")
    with pytest.raises(ValueError, match="scale must be one of none, group, batch"):
        group_advantages(ones, scale="std")
    with pytest.raises(ValueError, match=r"scores must have 2 axes, got shape \(3,\)"):
        group_advantages(ones[0])
    with pytest.raises(ValueError, match="same shape"):
        gae(ones, ones, ones[:1])
    with pytest.raises(ValueError, match=r"bootstrap \(3,\), first_rewards \(2,\)"):
        gae(ones, ones, ones, bootstrap=ones[0])
    with pytest.raises(ValueError, match="same shape"):
        whiten(ones, ones[0])
    with pytest.raises(ValueError, match="same shape"):
        remax(ones, ones[0])
