"""Attention in blocks of queries equals the plain softmax; the mask follows its rule."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.models.attention import LONG, MASKED, LongRows, attend, attend_long, attention_bias
from rlhf_jax.models.fused_attention import random_rows, visibility
from tests.models.small import SMALL


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


@pytest.mark.parametrize("window", [None, 700])
def test_long_rows_are_attended_to_as_others_without_holding_all_scores(window):
    length, rng = LONG + 26, np.random.default_rng(0)
    config = dataclasses.replace(SMALL, attention="xla", sliding_window=window)
    ids = random_rows(rng, 1, length, branches=True)
    bias = attention_bias(**ids, sliding_window=window)
    lazy = visibility(config, **ids, sliding_window=window)
    assert isinstance(lazy, LongRows)
    real = (ids["segment_ids"] > 0)[:, None, None, :, None]  # padding sees nothing
    arrays = tuple(jnp.asarray(rng.normal(size=(1, 1, 1, length, 4)), jnp.float32) for _ in "qkv")
    arrays = arrays[0], arrays[1][:, :, 0], arrays[2][:, :, 0]

    def loss(function, visible, *arrays):
        out = function(*arrays, visible) * real
        return jnp.sin(out).sum(), out

    def compiled(function, visible):
        step = jax.jit(jax.value_and_grad(partial(loss, function, visible), (0, 1, 2), True))
        return step.lower(*arrays).compile()

    by_blocks = compiled(attend_long, lazy)
    ((_, out), gradients) = by_blocks(*arrays)
    ((_, expected), expected_gradients) = compiled(lambda *x: plain(*x, None), bias)(*arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_long_rows_need_grows_with_their_length():
    def needed(length):
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        heads = jax.ShapeDtypeStruct((1, 1, length, 4), jnp.float32)
        queries = jax.ShapeDtypeStruct((1, 1, 1, length, 4), jnp.float32)

        def loss(query, key, value, ids):
            return jnp.sin(attend_long(query, key, value, LongRows(ids, ids, None, LONG))).sum()

        step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(queries, heads, heads, row)
        return step.compile().memory_analysis().temp_size_in_bytes

    assert needed(8192) < 2.2 * needed(4096)
    assert needed(8192) < 8192**2  # bytes: a quarter of the scores of its one head


def test_a_cache_is_written_alike_in_either_way():
    rng = np.random.default_rng(0)
    cached = jnp.asarray(rng.normal(size=(3, 2, 8, 4)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(3, 2, 2, 4)), jnp.float32)
    starts = np.array([0, 5, 6])
    expected = np.array(cached)
    for row, start in enumerate(starts):
        expected[row, :, start : start + 2] = new[row]
    for write in (attention._scatter, attention._write_rows):  # the latter is a TPU's
        written = write(cached, new, jnp.asarray(starts[:, None] + np.arange(2)))
        np.testing.assert_array_equal(written, expected)


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
