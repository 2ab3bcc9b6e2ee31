"""Attention in blocks of queries equals the plain softmax; the mask follows its rule."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import MASKED, attend, attention_bias


def plain(query, key, value, bias, softcap):
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(scores + bias[:, None, None], axis=-1)
    return jnp.einsum("bhgqk,bhkd->bhgqd", weights, value)


@pytest.mark.parametrize("length", [20, 150])  # one block; two whole ones and a ragged one
@pytest.mark.parametrize(("groups", "softcap"), [(1, None), (3, 2.0)])
def test_blocks_equal_plain_attention_in_values_and_gradients(length, groups, softcap):
    rng = np.random.default_rng(length)
    query = jnp.asarray(rng.normal(size=(2, 2, groups, length, 4)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 2, 2, length, 4)), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, length))))
    bias = attention_bias(jnp.arange(length)[None], segments)
    weights = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

    def loss(arrays, function):
        out = function(*arrays)
        return (weights * out).sum(), out

    @partial(jax.jit, static_argnums=1)
    def step(arrays, function):
        return jax.value_and_grad(loss, has_aux=True)(arrays, function)

    arrays = (query, key, value)
    (_, out), gradients = step(arrays, lambda *x: attend(*x, bias, softcap=softcap))
    (_, expected), expected_gradients = step(arrays, lambda *x: plain(*x, bias, softcap))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mask_by_hand():
    # Two documents and padding; the second has a prompt of one token and two branches.
    positions = jnp.array([[0, 1, 0, 1, 2, 1, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 2, 0]])
    branches = jnp.array([[0, 0, 0, 1, 1, 2, 0]])
    visible = attention_bias(positions, segments, branches)[0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(visible, np.array(expected, bool))
    window = attention_bias(positions, segments, branches, sliding_window=2)[0]
    expected[4][2] = 0  # position 2 sees positions 1 and 2
    np.testing.assert_array_equal(window == 0, np.array(expected, bool))
    assert set(np.unique(window)) == {np.float32(MASKED), 0.0}
