"""Drawing tokens: the right distribution, its log-probs, and never a banned token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling.samplers import sample, uniforms

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.499, 0), (0.501, 1), (0.74, 1), (0.76, 2), (0.999999, 3)]
)
def test_inverse_of_the_cumulative_sum_by_hand(uniform, token):
    tokens, logprobs = sample(LOGITS, jnp.array([uniform]))
    assert tokens.tolist() == [token]
    np.testing.assert_allclose(logprobs, LOGITS[0, token], rtol=1e-5)


def test_temperature_and_mask_renormalise_by_hand():
    # At T = 1/2 the probabilities are squared: 16, 4, 1, 1 of 22; without token 0: 4, 1, 1 of 6.
    allowed = jnp.array([False, True, True, True])
    tokens, logprobs = sample(LOGITS, jnp.array([0.7]), 0.5, allowed)
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(logprobs, np.log(1 / 6), rtol=1e-5)
    tokens, logprobs = sample(LOGITS, None, 1.0, allowed)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, np.log(1 / 2), rtol=1e-5)


def test_frequencies_match_the_probabilities():
    rows = 20_000
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, 16), jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    tokens, _ = sample(jnp.broadcast_to(logits, (rows, 16)), uniforms(keys, 3), 1.3)
    expected = rows * np.asarray(jax.nn.softmax(logits / 1.3))
    chi_square = ((np.bincount(tokens, minlength=16) - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, one chance in a thousand


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-23])
def test_only_allowed_tokens_even_at_the_edges(uniform):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (500, 1000)), jnp.float32)
    allowed = rng.random((500, 1000)) < 0.01
    allowed[:, 7] |= ~allowed.any(axis=1)
    tokens, logprobs = sample(logits, jnp.full(500, uniform), 1.0, jnp.asarray(allowed))
    assert allowed[np.arange(500), tokens].all()
    assert np.isfinite(logprobs).all()


def test_uniforms_depend_on_key_and_index_alone():
    keys = jax.vmap(jax.random.key)(jnp.arange(5))
    first = uniforms(keys, 0)
    np.testing.assert_array_equal(uniforms(keys[2:4], 0), first[2:4])
    assert len(np.unique(np.concatenate([first, uniforms(keys, 1)]))) == 10
    assert ((first >= 0) & (first < 1)).all()
