"""Generation: what it draws, what it reports, and that neighbours and batching never matter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, apply, init, logits
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.generate import _complete

CONFIG = ModelConfig(
    vocab_size=13,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    max_length=64,
    init_std=0.5,  # far from uniform
)
PARAMS = init(CONFIG, jax.random.key(0))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [12, 0]]


@jax.jit
def _forward(tokens):
    return logits(CONFIG, PARAMS, apply(CONFIG, PARAMS, tokens).hidden)


def full_logits(prompt, completion):
    """The logits [n, V] behind n completion tokens, by one forward pass without a cache."""
    sequence = [*prompt, *completion.tokens]
    values = _forward(jnp.asarray([sequence + [0] * (32 - len(sequence))]))[0]
    return values[len(prompt) - 1 : len(sequence) - 1]


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def test_greedy_equals_the_argmax_of_the_full_forward():
    completions = generate(CONFIG, PARAMS, PROMPTS, max_new_tokens=20, temperature=0, seed=0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        values = full_logits(prompt, completion)
        assert completion.tokens == values.argmax(-1).tolist()
        np.testing.assert_allclose(
            completion.logprobs, jax.nn.log_softmax(values).max(-1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("temperature", "banned"), [(0.6, []), (1.0, []), (1.3, []), (0.6, [3, 5, 6])]
)
def test_logprobs_are_those_of_the_full_forward(temperature, banned):
    allowed = np.ones(13, bool)
    allowed[banned] = False
    completions = generate(
        CONFIG,
        PARAMS,
        PROMPTS,
        max_new_tokens=20,
        temperature=temperature,
        seed=1,
        allowed_tokens=allowed,
    )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        values = jnp.where(allowed, full_logits(prompt, completion) / temperature, -jnp.inf)
        logprobs = jax.nn.log_softmax(values)[np.arange(20), np.array(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-5, atol=1e-5)
        assert completion.logprobs.dtype == np.float32
        assert not set(completion.tokens) & set(banned)


def test_frequencies_of_two_tokens_match_the_exact_probabilities():
    samples = 4000
    completions = generate(
        CONFIG,
        PARAMS,
        [[1, 2]],
        max_new_tokens=2,
        temperature=1.3,
        seed=0,
        samples_per_prompt=samples,
        batch_size=1024,
    )
    pairs = np.array(tokens_of(completions))
    rows = _forward(jnp.asarray([[1, 2, token] + [0] * 29 for token in range(13)]))
    first = jax.nn.softmax(rows[0, 1] / 1.3)
    second = jax.nn.softmax(rows[:, 2] / 1.3)
    expected = samples * np.asarray(first[:, None] * second).ravel()
    counts = np.bincount(pairs[:, 0] * 13 + pairs[:, 1], minlength=169)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    freedom = len(expected) - 1
    assert freedom > 30
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 3.5 * np.sqrt(2 * freedom)


def test_neighbours_and_batch_size_never_matter():
    arguments = {"max_new_tokens": 16, "seed": 3, "stop_ids": [7], "samples_per_prompt": 2}
    together = generate(CONFIG, PARAMS, PROMPTS, **arguments)
    for batch_size in (1, 3):
        batched = generate(CONFIG, PARAMS, PROMPTS, batch_size=batch_size, **arguments)
        assert tokens_of(batched) == tokens_of(together)
        for left, right in zip(batched, together, strict=True):
            np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=1e-5, atol=1e-5)
    some = generate(CONFIG, PARAMS, [PROMPTS[4], PROMPTS[2]], prompt_ids=[4, 2], **arguments)
    assert tokens_of(some) == tokens_of(together[8:10] + together[4:6])
    # Equal prompts, samples and seeds draw from streams of their own.
    assert len({tuple(c.tokens) for c in together[0:2] + together[6:8]}) == 4
    other = generate(CONFIG, PARAMS, PROMPTS, **{**arguments, "seed": 4})
    assert tokens_of(other) != tokens_of(together)


def test_a_completion_ends_with_its_first_stop_token():
    arguments = {"max_new_tokens": 16, "seed": 3, "samples_per_prompt": 4}
    free = generate(CONFIG, PARAMS, PROMPTS, **arguments)
    stopped = generate(CONFIG, PARAMS, PROMPTS, stop_ids=[7, 2], **arguments)
    for long, short in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(long.tokens) if token in (7, 2)]
        length = ends[0] + 1 if ends else 16
        assert short.tokens == long.tokens[:length]
        assert short.finished == bool(ends)
        assert len(short.logprobs) == length
        assert not long.finished
    assert {completion.finished for completion in stopped} == {True, False}


def test_lengths_of_a_bucket_share_one_compilation():
    generate(CONFIG, PARAMS, [[1]] * 4, max_new_tokens=2, seed=0)
    compiled = _complete._cache_size()
    for length in (2, 9, 16):
        generate(CONFIG, PARAMS, [[1] * length] * 4, max_new_tokens=2, seed=length, temperature=0.7)
    assert _complete._cache_size() == compiled
    assert generate(CONFIG, PARAMS, [], max_new_tokens=2, seed=0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 13]]}, r"prompt 0: token id 13 at \[1\] is outside 0..12"),
        ({"prompts": [[1] * 60]}, "prompt 0 has 60 tokens, with max_new_tokens = 8 more than"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"stop_ids": [99]}, "stop_ids: token id 99"),
        ({"allowed_tokens": np.zeros(13, bool)}, "allowed_tokens must be a bool mask of 13"),
        ({"allowed_tokens": np.ones(12, bool)}, "allowed_tokens must be a bool mask of 13"),
        ({"prompt_ids": [1, 2]}, "2 prompt_ids for 1 prompts"),
        ({"config": dataclasses.replace(CONFIG, head="scalar")}, "head = 'lm'"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 8, "seed": 0, "config": CONFIG, **changes}
    with pytest.raises(UserError, match=message):
        generate(arguments.pop("config"), PARAMS, arguments.pop("prompts"), **arguments)
