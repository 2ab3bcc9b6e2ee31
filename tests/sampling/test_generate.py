"""Generation: what it draws, what it reports, and that neighbours and slots never matter."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf_jax.errors import UserError
from rlhf_jax.models import apply, init, logits
from rlhf_jax.models.scoring import target_kl, target_statistics
from rlhf_jax.sampling import engine
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import first_stop, generate
from tests.models.small import KINDS, forward, noisy, random_tokens
from tests.tiny_model import GROUPED

CONFIG = dataclasses.replace(GROUPED, short_convolution=2)
PARAMS = init(CONFIG, jax.random.key(0))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [12, 0]]


@jax.jit
def _forward(tokens, params=PARAMS):
    return logits(CONFIG, params, apply(CONFIG, params, tokens).hidden)


CALL = ("seed", "prompt_ids", "on_tokens", "chunk")  # what is not of `Sampling`


def generated(config, params, prompts, **options):
    """`generate`, with all options by name."""
    call = {name: options.pop(name) for name in CALL if name in options}
    return generate(config, params, prompts, Sampling(**options), **call)


def complete(prompts=PROMPTS, params=PARAMS, **options):
    """With slots of one number and length, so that tests share compiled code."""
    options = {"batch_size": 8, "cache_length": 64, "seed": 0, **options}
    return generated(CONFIG, params, prompts, **options)


def full_logits(prompt, completion, params=PARAMS):
    """The logits [n, V] behind n completion tokens, by one forward pass without a cache."""
    sequence = [*prompt, *completion.tokens]
    values = _forward(jnp.asarray([sequence + [0] * (32 - len(sequence))]), params)[0]
    return values[len(prompt) - 1 : len(sequence) - 1]


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def test_greedy_equals_the_argmax_of_the_full_forward():
    completions = complete(max_new_tokens=20, temperature=0)
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
    completions = complete(
        max_new_tokens=20, temperature=temperature, seed=1, allowed_tokens=allowed
    )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        values = jnp.where(allowed, full_logits(prompt, completion) / temperature, -jnp.inf)
        logprobs = jax.nn.log_softmax(values)[np.arange(20), np.array(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-5, atol=1e-5)
        assert completion.logprobs.dtype == np.float32
        assert not set(completion.tokens) & set(banned)


def test_frequencies_of_two_tokens_match_the_exact_probabilities():
    samples = 4000
    completions = generated(
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
    expected = samples * np.asarray(first[:, None] * second, np.float64).ravel()
    counts = np.bincount(pairs[:, 0] * 13 + pairs[:, 1], minlength=169)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    assert len(expected) > 30
    assert chisquare(counts, expected * samples / expected.sum()).pvalue > 1e-3


def assert_equal(left, right):
    """To the last bit."""
    assert [(c.tokens, c.finished) for c in left] == [(c.tokens, c.finished) for c in right]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize(
    ("slots", "options"), [(1, {}), (5, {"top_p": 0.9, "repetition_penalty": 1.3}), (8, {})]
)
def test_neighbours_slots_and_order_never_matter(slots, options):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 13, n).tolist() for n in rng.integers(1, 41, 15)]

    def by_id(ids, samples=2):
        completions = complete(
            [prompts[i] for i in ids],
            prompt_ids=[2**32 - 1 - i for i in ids],
            samples_per_prompt=samples,
            max_new_tokens=16,
            seed=3,
            stop_ids=[7],
            batch_size=slots,
            **options,
        )
        return {i: completions[k * samples : (k + 1) * samples] for k, i in enumerate(ids)}

    together = by_id(range(15))
    assert len({tuple(c.tokens) for pair in together.values() for c in pair}) > 15
    for count in (15, 6, 1):
        ids = random.Random(count).sample(range(15), count)
        for i, pair in by_id(ids).items():
            assert_equal(pair, together[i])
    for i, single in by_id([4, 11], samples=1).items():
        assert_equal(single, together[i][:1])


def test_numbers_and_lengths_of_slots_agree_and_streams_differ():
    arguments = {"max_new_tokens": 16, "seed": 3, "stop_ids": [7], "samples_per_prompt": 2}
    together = complete(**arguments)
    for slots, cache_length in ((1, 64), (8, None)):
        other = complete(batch_size=slots, cache_length=cache_length, **arguments)
        assert tokens_of(other) == tokens_of(together)
        for left, right in zip(other, together, strict=True):
            np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=1e-5, atol=1e-5)
    # Equal prompts, samples and seeds draw from streams of their own.
    assert len({tuple(c.tokens) for c in together[0:2] + together[6:8]}) == 4
    other = complete(**{**arguments, "seed": 4})
    assert tokens_of(other) != tokens_of(together)


GREEDY = ("llama", "multiquery-capped", "experts")  # models/test_cache steps the others


@pytest.mark.parametrize(
    "kind",
    [k if k in GREEDY else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_64_greedy_tokens_of_every_kind_of_model(kind):
    config = KINDS[kind]
    params, prompts = noisy(config), random_tokens(3, 9).tolist()
    completions = generated(config, params, prompts, max_new_tokens=64, temperature=0, seed=0)
    rows = [prompt + c.tokens for prompt, c in zip(prompts, completions, strict=True)]
    values = logits(config, params, forward(config, params, jnp.asarray(rows)))[:, 8:-1]
    assert tokens_of(completions) == values.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_scoring_path(temperature):
    prompt, n = [1, 2, 3], 20
    (completion,) = complete([prompt], max_new_tokens=n, temperature=temperature, seed=5)
    batch = {
        "tokens": jnp.asarray([prompt + completion.tokens]),
        "positions": jnp.arange(3 + n)[None],
        "segment_ids": jnp.ones((1, 3 + n), jnp.int32),
        "sources": jnp.arange(2, 2 + n)[None],
        "targets": jnp.asarray([completion.tokens]),
    }
    score = jax.jit(partial(target_statistics, CONFIG, temperature=temperature))
    scored = score(PARAMS, batch)
    np.testing.assert_allclose(completion.logprobs, scored.logprobs[0], rtol=1e-5, atol=1e-5)


def test_options_reach_the_sampler():
    arguments = {"max_new_tokens": 12, "samples_per_prompt": 4}
    greedy = complete(temperature=0, **arguments)
    none = {"top_k": 13, "top_p": 1.0, "min_p": 0.0}
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        completions = complete(**{**none, **options}, **arguments)
        assert tokens_of(completions) == tokens_of(greedy)
        assert all((c.logprobs == 0).all() for c in completions)
    free = complete(**arguments)
    assert tokens_of(complete(**none, **arguments)) == tokens_of(free) != tokens_of(greedy)


@pytest.mark.parametrize("penalty", [1.5, 1e9])
def test_repetition_penalty_counts_the_prompt_and_the_completion(penalty):
    completions = complete(max_new_tokens=9, temperature=0, repetition_penalty=penalty)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        values = np.array(full_logits(prompt, completion))
        for i, row in enumerate(values):
            seen = list(set(prompt + completion.tokens[:i]))
            row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        assert completion.tokens == values.argmax(-1).tolist()
        np.testing.assert_allclose(
            completion.logprobs, jax.nn.log_softmax(values).max(-1), rtol=1e-5, atol=1e-5
        )


def letters(tokens):
    return "".join(chr(97 + token) for token in tokens)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_stop_strings_and_streams_do_not_depend_on_the_chunk(chunk):
    arguments = {"max_new_tokens": 24, "seed": 3, "samples_per_prompt": 4}
    free = complete(**arguments)
    text = letters(free[5].tokens)
    strings = [text[9:12], text[4:6]]
    streamed: dict[tuple[int, int], list[int]] = {}

    def on_tokens(prompt, sample, tokens):
        assert 1 <= len(tokens) <= chunk
        streamed.setdefault((prompt, sample), []).extend(tokens)

    stopped = complete(
        stop_strings=strings, decode=letters, on_tokens=on_tokens, chunk=chunk, **arguments
    )
    for long, short in zip(free, stopped, strict=True):
        whole = letters(long.tokens)
        ends = [whole.index(string) + len(string) for string in strings if string in whole]
        length = min(ends, default=24)
        assert short.tokens == long.tokens[:length]
        assert short.finished == bool(ends)
        np.testing.assert_array_equal(short.logprobs, long.logprobs[:length])
    assert {c.finished for c in stopped} == {True, False}
    assert [streamed[i, k] for i in range(5) for k in range(4)] == tokens_of(stopped)


def test_stop_ids_and_strings_together_end_at_the_first():
    (free,) = complete([[1]], max_new_tokens=12, seed=1)
    token = free.tokens[8]
    first = free.tokens.index(token) + 1
    arguments = {"max_new_tokens": 12, "seed": 1, "stop_ids": [token], "decode": letters}
    (late,) = complete([[1]], stop_strings=[letters(free.tokens)], **arguments)
    assert late.tokens == free.tokens[:first] and late.finished
    (early,) = complete([[1]], stop_strings=[letters(free.tokens[:2])], **arguments)
    assert early.tokens == free.tokens[: min(2, first)] and early.finished


@pytest.mark.parametrize("looked", [0, 5, 30])
@pytest.mark.parametrize("strings", [["é"], ["b", "ca"], ["€b", "cc"], ["\ufffd"], ["zz"]])
def test_the_first_end_is_found_in_few_decodes(looked, strings):
    """As a scan of every end finds it, though characters of several tokens are whole only later."""
    alphabet = "abcé€".encode()
    rng = np.random.default_rng(looked)
    calls: list[int] = []

    def decode(tokens):
        calls.append(len(tokens))
        return bytes(tokens).decode(errors="replace")

    for _ in range(200):
        tokens = [b for i in rng.integers(0, 5, 30) for b in "abcé€"[i].encode()]
        assert set(tokens) <= set(alphabet)
        ends = [
            end
            for end in range(1, len(tokens) + 1)
            if any(s in bytes(tokens[:end]).decode(errors="replace") for s in strings)
        ]
        if ends and ends[0] <= looked:
            continue
        calls.clear()
        sampling = Sampling(30, stop_strings=strings, decode=decode)
        assert first_stop(sampling, tokens, looked) == min(ends, default=None)
        assert first_stop(sampling, tokens[:looked], looked) is None
        if strings != ["\ufffd"]:
            assert len(calls) <= (8 if ends else 1)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}])
def test_a_diverged_model_is_an_error(options):
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    for watch in ({}, {"stop_strings": ["zz"], "decode": letters}):
        with pytest.raises(UserError, match="probabilities are not finite: ") as error:
            complete(params=params, max_new_tokens=4, **options, **watch)
        assert "\n" not in str(error.value)


@pytest.fixture
def steps(monkeypatch):
    """Steps of each `advance` that is called."""
    taken: list[int] = []
    advance = engine.advance

    def counted(*arguments):
        slots = advance(*arguments)
        taken.append(int(slots.steps.max()))
        return slots

    monkeypatch.setattr(engine, "advance", counted)
    return taken


def test_ends_as_soon_as_all_have_and_refills_what_has(steps):
    ended = complete(max_new_tokens=40, stop_ids=range(13))
    assert steps == [1] and [len(c.tokens) for c in ended] == [1] * 5
    steps.clear()
    some = complete(max_new_tokens=40, stop_ids=[7, 2], samples_per_prompt=16)
    lengths = [len(c.tokens) for c in some]
    assert min(lengths) < max(lengths) == 40
    # Slots hardly idle while requests wait: fewer steps than one batch after another would take.
    assert sum(steps) <= 1.1 * sum(lengths) / 8 + 40
    assert sum(steps) < 0.8 * sum(max(lengths[i : i + 8]) for i in range(0, 80, 8))


def test_lengths_of_a_bucket_share_one_compilation():
    compiled = (engine.prefill, engine.row_keys, engine.insert, engine.advance)

    def sizes():
        return [function._cache_size() for function in compiled]

    arguments = {"samples_per_prompt": 3, "cache_length": None}  # that follows from the prompts
    complete([[1], [1] * 40], max_new_tokens=7, **arguments)
    before = sizes()
    for length in (2, 9, 32, 33, 41):
        prompts = [[1] * length] * length + [[2] * 41]
        complete(prompts, max_new_tokens=6, seed=length, temperature=0.7, **arguments)
    assert sizes() == before
    assert complete([], max_new_tokens=2) == []


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
        ({"allowed_tokens": np.ones(13)}, "allowed_tokens must be a bool mask of 13"),
        ({"prompt_ids": [1, 2]}, "2 prompt_ids for 1 prompts"),
        ({"prompt_ids": [2**32]}, "prompt_ids: 4294967296 is not from 0 to 4294967295"),
        ({"prompt_ids": [-1]}, "prompt_ids: -1 is not from 0"),
        ({"seed": -1}, "seed = -1 must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296 must be a whole number from 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"batch_size": 0}, "batch_size = 0: at least 1"),
        ({"chunk": 0}, "chunk = 0: at least 1"),
        ({"top_k": 0}, "top_k = 0: at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0: above 0, at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1: above 0, at most 1"),
        ({"min_p": -0.1}, "min_p = -0.1: from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: a number above 0"),
        ({"stop_strings": ["a"]}, "stop_strings need decode"),
        ({"stop_strings": "a", "decode": str}, "stop_strings = 'a': give a list"),
        ({"stop_strings": [""], "decode": str}, "stop_strings: an empty string"),
        ({"cache_length": 65}, "cache_length = 65: more than model.max_length = 64"),
        ({"cache_length": 8}, "prompt 0 has 1 tokens, with max_new_tokens = 8 more than cache_le"),
        ({"config": dataclasses.replace(CONFIG, head="scalar")}, "head = 'lm'"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 8, "seed": 0, "config": CONFIG, **changes}
    with pytest.raises(UserError, match=message) as error:
        generated(arguments.pop("config"), PARAMS, arguments.pop("prompts"), **arguments)
    assert "\n" not in str(error.value)


UNUSED = ((0, 1), (5, 7), (10, 13))
WORDS = np.array([1, 2, 3, 4, 7, 8, 9])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 3.0])
def test_what_is_sampled_and_scored_is_of_the_ids_in_use(temperature, softcap):
    """A padded vocabulary: never drawn, and both say the log-probs of softmax over the others."""
    config = dataclasses.replace(CONFIG, logit_softcap=softcap, unused=UNUSED)
    options = {"max_new_tokens": 20, "temperature": temperature, "samples_per_prompt": 4}
    found = generated(config, PARAMS, PROMPTS, batch_size=8, cache_length=64, seed=0, **options)
    drawn = {token for completion in found for token in completion.tokens}
    assert drawn <= set(WORDS.tolist()) and len(drawn) > 1
    score = jax.jit(partial(target_statistics, config, temperature=temperature or 1.0))
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    for prompt, completion in list(zip(prompts, found, strict=True))[::5]:
        sequence = [*prompt, *completion.tokens]
        hidden = forward(config, PARAMS, jnp.asarray([sequence[:-1]]))
        values = logits(config, PARAMS, hidden)[0, len(prompt) - 1 :, WORDS].T
        wanted = jax.nn.log_softmax(values / (temperature or 1.0))
        wanted = wanted[np.arange(20), np.searchsorted(WORDS, completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, wanted, rtol=1e-5, atol=1e-5)
        count = len(sequence) - 1
        batch = {
            "tokens": jnp.asarray([sequence[:-1]]),
            "positions": jnp.arange(count)[None],
            "segment_ids": jnp.ones((1, count), jnp.int32),
            "sources": jnp.arange(count)[None],
            "targets": jnp.asarray([sequence[1:]]),
        }
        scored = score(PARAMS, batch)
        np.testing.assert_allclose(scored.logprobs[0, -20:], wanted, rtol=1e-5, atol=1e-5)


def test_the_kl_of_whole_distributions_is_of_the_ids_in_use():
    config, other = dataclasses.replace(CONFIG, unused=UNUSED), init(CONFIG, jax.random.key(1))
    steps = {"positions": jnp.arange(4)[None], "segment_ids": jnp.ones((1, 4), jnp.int32)}
    batch = {"tokens": jnp.array([[1, 2, 3, 4]]), "sources": steps["positions"], **steps}

    def logprobs(params):
        hidden = apply(config, params, batch["tokens"]).hidden
        return jax.nn.log_softmax(logits(config, params, hidden)[..., WORDS])

    p, q = map(jax.jit(logprobs), (PARAMS, other))
    found = jax.jit(partial(target_kl, config))(PARAMS, other, batch)
    np.testing.assert_allclose(found, (jnp.exp(p) * (p - q)).sum(-1), rtol=1e-5, atol=1e-6)
    total = jax.jit(jax.grad(lambda params: target_kl(config, params, other, batch).sum()))
    gradient = total(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_choice_of_unused_ids_alone_is_named():
    with pytest.raises(UserError, match="only ids that no word of the tokenizer has"):
        generated(
            dataclasses.replace(CONFIG, unused=UNUSED), PARAMS, PROMPTS,
            max_new_tokens=2, seed=0, allowed_tokens=np.arange(13) == 0,
        )  # fmt: skip
