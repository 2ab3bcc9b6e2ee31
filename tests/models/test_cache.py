"""Decoding with cached keys and values equals the full forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import apply, init_cache
from tests.models.small import KINDS, SMALL, forward, noisy, random_tokens

LENGTHS = np.array([5, 9, 1])


@partial(jax.jit, static_argnums=(0, 3))
def prefill(config, params, tokens, slots, lengths):
    cache = init_cache(config, len(tokens), slots)
    return apply(config, params, tokens, cache=cache, prompt_lengths=lengths)


STEPPED = ("gpt2", "grouped-window")  # sampling/test_generate draws from the others


@pytest.mark.parametrize(
    "kind",
    [k if k in STEPPED else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_64_cached_steps_equal_the_full_forward(kind):
    config = KINDS[kind]
    params, tokens = noisy(config), random_tokens(3, 9 + 64)
    prompts = jnp.where(np.arange(9) < LENGTHS[:, None], tokens[:, :9], 60)  # any padding
    hidden, cache = prefill(config, params, prompts, 80, LENGTHS)
    np.testing.assert_array_equal(cache["lengths"], LENGTHS)

    @jax.jit
    def decode(params, cache):
        def step(cache, _):
            token = jnp.take_along_axis(tokens, cache["lengths"][:, None], axis=1)
            hidden, cache = apply(config, params, token, cache=cache)
            return cache, hidden[:, 0]

        return jax.lax.scan(step, cache, length=64)

    cache, decoded = decode(params, cache)
    full = forward(config, params, tokens)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            decoded[:, row], full[row, length : length + 64], rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(cache["lengths"], LENGTHS + 64)


@pytest.mark.parametrize("kind", ["grouped-window", "gpt2"])
def test_several_tokens_at_once_equal_the_full_forward(kind):
    config = KINDS[kind]
    params, tokens = noisy(config), random_tokens(3, 9 + 64)
    _, cache = prefill(config, params, tokens[:, :9], 80, jnp.array([9, 9, 9]))
    hidden, _ = jax.jit(lambda cache: apply(config, params, tokens[:, 9:], cache=cache))(cache)
    full = forward(config, params, tokens)
    np.testing.assert_allclose(hidden, full[:, 9:], rtol=1e-5, atol=1e-5)


def test_layout_and_room():
    cache = init_cache(KINDS["grouped-window"], 3, 10)
    assert [x.shape for x in cache["keys"] + cache["values"]] == [(3, 2, 10, 4)] * 4
    with pytest.raises(UserError, match="11 tokens a row do not fit a cache of 10"):
        prefill(SMALL, noisy(SMALL), random_tokens(3, 11), 10, jnp.array([11, 1, 1]))
