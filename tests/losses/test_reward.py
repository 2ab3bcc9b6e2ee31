"""Reward-model losses against hand-computed values and each other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reductions import mean
from rlhf_jax.losses.reward import bradley_terry, pointwise_logistic


def nll(x):
    """−log σ(x)."""
    return math.log1p(math.exp(-x))


def test_bradley_terry_by_hand():
    chosen, rejected = jnp.array([1.0, 0.5, 2.0]), jnp.array([0.0, 0.5, 2.5])
    (total, weight), metrics = bradley_terry(chosen, rejected, jnp.array([1.0, 2.0, 1.0]))
    # −log σ(1) = 0.3132617, −log σ(0) = 0.6931472, −log σ(−0.5) = 0.9740770
    assert float(total) == pytest.approx(0.3132617 + 2 * 0.6931472 + 0.9740770, abs=1e-5)
    assert float(weight) == 4
    assert float(mean(metrics["rewards/accuracies"])) == pytest.approx((1 + 2 * 0.5 + 0) / 4)
    assert float(mean(metrics["rewards/margins"])) == pytest.approx((1 + 0 - 0.5) / 4)
    assert float(mean(metrics["rewards/chosen"])) == pytest.approx((1 + 1 + 2) / 4)
    assert float(mean(metrics["rewards/rejected"])) == pytest.approx((0 + 1 + 2.5) / 4)


def test_bradley_terry_centering_by_hand():
    (total, _), _ = bradley_terry(jnp.array([1.0]), jnp.array([-0.5]), jnp.ones(1), centering=0.01)
    assert float(total) == pytest.approx(nll(1.5) + 0.01 * 0.5**2, abs=1e-6)


def test_bradley_terry_of_votes_by_hand():
    # A gap of 1 at scale 2 with bias −0.5 and lapses 0.1: 0.9 σ(1.5) + 0.05 = 0.7858170.
    votes = jnp.array([[2.0, -0.5, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    chosen, weights = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 1.0, 0.0])
    (total, weight), metrics = bradley_terry(chosen, jnp.zeros(3), weights, votes=votes)
    assert float(total) == pytest.approx(-math.log(0.7858170) + nll(2.0), abs=1e-5)
    assert float(weight) == 2
    assert float(mean(metrics["rewards/margins"])) == pytest.approx(1.5)  # of scores alone


def test_a_vote_that_only_bias_explains_moves_no_score():
    def slope(bias, lapses):
        votes = jnp.array([[1.0, bias, lapses]])
        return float(
            jax.grad(lambda c: bradley_terry(c, jnp.zeros(1), jnp.ones(1), votes=votes)[0][0])(
                jnp.zeros(1)
            )[0]
        )

    assert slope(0.0, 0.0) == pytest.approx(-0.5, abs=1e-5)
    assert abs(slope(20.0, 0.02)) < 1e-6  # they would have chosen so in any case
    assert abs(slope(-200.0, 0.02)) < 1e-6  # a lapse: finite, too


def test_bradley_terry_is_free_of_an_offset_and_symmetric_under_swap():
    chosen, rejected = jnp.array([0.3, -1.0]), jnp.array([0.1, 2.0])

    def loss(c, r):
        return bradley_terry(c, r, jnp.ones(2))[0][0]

    np.testing.assert_allclose(loss(chosen + 7, rejected + 7), loss(chosen, rejected), rtol=1e-5)
    difference = loss(chosen, rejected) - loss(rejected, chosen)
    np.testing.assert_allclose(difference, -(chosen - rejected).sum(), rtol=1e-5)


def test_pointwise_logistic_by_hand():
    scores, labels = jnp.array([2.0, -1.0, 0.0]), jnp.array([1.0, 0.0, 0.25])
    (total, weight), metrics = pointwise_logistic(scores, labels, jnp.array([1.0, 2.0, 1.0]))
    expected = nll(2.0) + 2 * nll(1.0) + math.log(2)
    assert float(total) == pytest.approx(expected, abs=1e-5)
    assert float(weight) == 4
    assert float(mean(metrics["rewards/accuracies"])) == pytest.approx((1 + 2 + 0.5) / 4)


@pytest.mark.parametrize("loss", ["pair", "point"])
def test_a_row_of_weight_zero_reaches_neither_loss_nor_gradient(loss):
    weights = jnp.array([1.0, 0.0])

    @jax.jit
    @jax.value_and_grad
    def step(x):
        if loss == "pair":
            return bradley_terry(x, -x, weights, centering=0.1)[0][0]
        return pointwise_logistic(x, x, weights)[0][0]

    clean, clean_gradient = step(jnp.array([0.7, 0.0]))
    assert clean_gradient[0] != 0
    assert clean_gradient[1] == 0
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        value, gradient = step(jnp.array([0.7, bad]))
        assert value == clean
        np.testing.assert_array_equal(gradient, clean_gradient)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="chosen must have 1 axes"):
        bradley_terry(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="same shape"):
        pointwise_logistic(jnp.ones(2), jnp.ones(3), jnp.ones(2))
