"""Drawing tokens: the right distribution, its log-probs, and never a banned token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf_jax.sampling.samplers import penalise, sample, uniforms

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.499, 0), (0.501, 1), (0.74, 1), (0.76, 2), (0.999999, 3)]
)
def test_inverse_of_the_cumulative_sum_by_hand(uniform, token):
    tokens, logprobs = sample(LOGITS, jnp.array([uniform]))
    assert tokens.tolist() == [token]
    np.testing.assert_allclose(logprobs, LOGITS[0, token], rtol=1e-5)


@pytest.mark.parametrize("vocab", [128, pytest.param(300, marks=pytest.mark.slow), 1000])
def test_inverse_of_the_cumulative_sum_over_many_words(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (400, vocab)).astype(np.float32)
    uniform = rng.random(400).astype(np.float32)
    upto = np.cumsum(np.exp(logits.astype(np.float64)), axis=-1)
    upto /= upto[:, -1:]
    tokens, _ = sample(jnp.asarray(logits), jnp.asarray(uniform))
    rows = np.arange(400)
    below = np.where(tokens > 0, upto[rows, np.maximum(tokens - 1, 0)], 0)
    assert (below - 1e-5 < uniform).all() and (uniform < upto[rows, tokens] + 1e-5).all()


def test_temperature_and_mask_renormalise_by_hand():
    # At T = 1/2 the probabilities are squared: 16, 4, 1, 1 of 22; without token 0: 4, 1, 1 of 6.
    allowed = jnp.array([False, True, True, True])
    tokens, logprobs = sample(LOGITS, jnp.array([0.7]), 0.5, allowed)
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(logprobs, np.log(1 / 6), rtol=1e-5)
    tokens, logprobs = sample(LOGITS, None, 1.0, allowed)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, np.log(1 / 2), rtol=1e-5)


def truncated(logits, *, top_k=None, top_p=None, min_p=None, allowed=None):
    """Exact probabilities [V] by sorting, in float64: an implementation of its own."""
    probs = np.exp(np.asarray(logits, np.float64))
    if allowed is not None:
        probs = np.where(allowed, probs, 0)
    order = np.argsort(-probs, kind="stable")
    if top_k is not None:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    if top_p is not None:
        probs[order[1:][np.cumsum(probs[order])[:-1] >= top_p]] = 0
    if min_p is not None:
        probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


OPTIONS = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"allowed": np.arange(16) % 3 > 0},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "allowed": np.arange(16) % 5 > 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_frequencies_and_logprobs_match_the_exact_probabilities(options):
    rows = 20_000
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, 16), jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    tokens, logprobs = sample(
        jnp.broadcast_to(logits, (rows, 16)), uniforms(keys, 3), 1.3, **options
    )
    exact = truncated(logits / 1.3, **options)
    kept = exact > 0
    counts = np.bincount(tokens, minlength=16)
    assert not counts[~kept].any()
    assert chisquare(counts[kept], rows * exact[kept]).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logprobs), exact[np.asarray(tokens)], rtol=1e-5)
    every = dict(zip(np.asarray(tokens).tolist(), np.exp(logprobs).tolist(), strict=True))
    assert sum(every.values()) == pytest.approx(exact[list(every)].sum(), rel=1e-5)
    assert exact[list(every)].sum() > 0.999


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 0]),  # two tokens tie at 1/8: the lower id
        ({"top_p": 0.9}, [1, 3, 0, 2]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_k": 99}, [1, 3, 0, 2]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 2/3 of the two
        ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 0.2}, [1, 3, 0, 2]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.0}, [1, 3, 0, 2]),
    ],
)
def test_what_is_kept_by_hand(options, kept):
    logits = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))
    uniform = jnp.linspace(0, 1 - 2**-20, 400)
    tokens, logprobs = sample(jnp.broadcast_to(logits, (400, 4)), uniform, **options)
    assert set(tokens.tolist()) == set(kept)
    mass = np.exp(np.asarray(logits))[kept].sum()
    np.testing.assert_allclose(np.exp(logprobs), np.exp(logits)[tokens] / mass, rtol=1e-5)


def test_many_ties_and_rows_of_their_own():
    logits = jnp.stack([jnp.zeros(10), jnp.array([-1e30] * 5 + [1.0] * 5), -jnp.arange(10.0)])
    uniform = jnp.linspace(0, 0.999, 200)
    for row, kept in zip(logits, ([0, 1, 2], [5, 6, 7], [0, 1, 2]), strict=True):
        tokens, _ = sample(jnp.broadcast_to(row, (200, 10)), uniform, top_k=3)
        assert sorted(set(tokens.tolist())) == kept
    tokens, _ = sample(logits, None, top_k=1)
    assert tokens.tolist() == [0, 5, 0]


def test_repetition_penalty_by_hand():
    logits = jnp.array([[2.0, -2.0, 0.0, 2.0], [2.0, -2.0, 1.0, 3.0]])
    seen = jnp.array([[True, True, True, False], [False, True, False, True]])
    np.testing.assert_array_equal(
        penalise(logits, seen, 2.0), [[1.0, -4.0, 0.0, 2.0], [2.0, -4.0, 1.0, 1.5]]
    )


@pytest.mark.parametrize(("vocab", "share"), [(1000, 0.01), (40_000, 0.0005)])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-23])
def test_only_allowed_tokens_even_at_the_edges(uniform, vocab, share):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (500, vocab)), jnp.float32)
    allowed = rng.random((500, vocab)) < share
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
