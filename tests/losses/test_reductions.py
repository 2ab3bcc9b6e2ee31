"""Sums and weights: hand values, additivity, and rows of weight 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.checks import check_choice, check_rank, check_same_shape
from rlhf_jax.losses.reductions import mean, segment_logprobs, weighted_sum


def test_weighted_sum_by_hand_ignores_nan_of_weight_zero():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    total, weight = weighted_sum(values, jnp.array([2.0, 0.0, 0.5, 0.0]))
    assert (float(total), float(weight)) == (3.5, 2.5)
    assert float(mean((total, weight))) == pytest.approx(1.4)
    gradient = jax.grad(lambda v: weighted_sum(v, jnp.array([2.0, 0.0, 0.5, 0.0]))[0])(values)
    np.testing.assert_array_equal(gradient, [2.0, 0.0, 0.5, 0.0])


def test_reductions_of_parts_add_up_to_the_whole():
    values, weights = jnp.arange(6.0), jnp.array([1.0, 0, 2, 1, 1, 3])
    parts = [{"loss": weighted_sum(values[i : i + 2], weights[i : i + 2])} for i in (0, 2, 4)]
    whole = jax.tree.map(lambda *x: sum(x), *parts)["loss"]
    np.testing.assert_array_equal(whole, weighted_sum(values, weights))


def test_mean_of_nothing_is_zero_with_zero_gradient():
    def loss(x):
        return mean(weighted_sum(x, jnp.zeros(3)))

    value, gradient = jax.value_and_grad(loss)(jnp.ones(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros(3))


def test_accumulates_in_float32_or_the_wider_input():
    bf16 = jnp.full(1000, 1.0, jnp.bfloat16)
    total, weight = weighted_sum(bf16, bf16)
    assert total.dtype == weight.dtype == jnp.float32
    assert (float(total), float(weight)) == (1000.0, 1000.0)
    with jax.enable_x64(True):
        total, _ = weighted_sum(jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float32))
        assert total.dtype == jnp.float64


def test_segment_logprobs_by_hand():
    logprobs = jnp.array([[-1.0, -2.0, -4.0, jnp.nan], [-8.0, -16.0, -32.0, -64.0]])
    weights = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    sequences = jnp.array([[0, 2, 0, 1], [1, 1, 1, 2]])
    expected = [[-5.0, 0.0, -2.0], [0.0, -56.0, -64.0]]
    np.testing.assert_array_equal(segment_logprobs(logprobs, weights, sequences, 3), expected)
    gradient = jax.grad(lambda x: segment_logprobs(x, weights, sequences, 3).sum())(logprobs)
    np.testing.assert_array_equal(gradient, weights)


def test_checks_name_the_culprit():
    with pytest.raises(ValueError, match=r"scores must have 2 axes, got shape \(3,\)"):
        check_rank("scores", jnp.ones(3), 2)
    with pytest.raises(ValueError, match=r"a \(3,\), b \(2,\)"):
        check_same_shape(a=jnp.ones(3), b=jnp.ones(2), c=None)
    with pytest.raises(ValueError, match="mode must be one of x, y, got 'z'"):
        check_choice("mode", "z", ("x", "y"))
    with pytest.raises(ValueError, match="same shape"):
        weighted_sum(jnp.ones(3), jnp.ones((3, 1)))
