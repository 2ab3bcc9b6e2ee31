"""Completions whose turns are answered: one cache, one sequence of tokens, nothing read twice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import apply, init, logits
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from tests.tiny_model import GROUPED

END, TOOL, ASK = 2, 3, 4
CONFIG = dataclasses.replace(GROUPED, short_convolution=2)
PARAMS = init(CONFIG, jax.random.key(0))
PROMPTS = [[1, 5, 6], [1], [1, 7, 8, 9, 10, 11], [1, 12]]
LIMIT = 40


def answer(turn):
    """Two tokens that depend on what was said, between those of a tool's turn; three at most."""
    said = sum(turn.tokens) % 7
    return [] if said > 4 else [TOOL, 5 + said, END, ASK]


def answered(prompts=PROMPTS, respond=answer, seed=0, **options):
    options = {"max_new_tokens": LIMIT, "stop_ids": (END,), "samples_per_prompt": 4, **options}
    options = {"batch_size": 8, "cache_length": 64, **options}
    call = {
        name: options.pop(name) for name in ("prompt_ids", "on_tokens", "chunk") if name in options
    }
    sampling = Sampling(respond=lambda turns: [respond(turn) for turn in turns], **options)
    return generate(CONFIG, PARAMS, prompts, sampling, seed=seed, **call)


@jax.jit
def _forward(tokens):
    return jax.nn.log_softmax(logits(CONFIG, PARAMS, apply(CONFIG, PARAMS, tokens).hidden))


def pieces(completion):
    """(drawn tokens, the answer to them or None) of each turn."""
    begin, found = 0, []
    for given in completion.given:
        found.append(
            (completion.tokens[begin : given.start], completion.tokens[given.start : given.stop])
        )
        begin = given.stop
    return [*found, (completion.tokens[begin:], None)]


def test_a_trajectory_is_what_was_drawn_and_what_answered_it_and_nothing_else():
    calls = []

    def remember(turn):
        calls.append(turn)
        return answer(turn)

    completions = answered(respond=remember)
    assert sum(len(c.given) for c in completions) >= 8
    by_request = {}
    for turn in calls:
        by_request.setdefault(turn[:2], []).append(turn.tokens)
    for i, completion in enumerate(completions):
        said = by_request.get((i // 4, i % 4), [])
        for k, (drawn, given) in enumerate(pieces(completion)):
            if given is not None:
                assert (
                    drawn[-1] == END
                    and drawn == said[k]
                    and given == answer(calls[0]._replace(tokens=drawn))
                )
            elif completion.finished:
                assert drawn == said[k] and answer(calls[0]._replace(tokens=drawn)) == []
            else:
                assert len(completion.tokens) <= LIMIT


def test_log_probs_of_all_turns_are_those_of_one_forward_pass_and_zero_on_answers():
    completions = answered()
    for i, completion in enumerate(completions):
        prompt = PROMPTS[i // 4]
        whole = [*prompt, *completion.tokens]
        values = np.asarray(_forward(jnp.asarray([whole + [0] * (64 - len(whole))])))[0]
        places = np.arange(len(prompt), len(whole))
        expected = values[places - 1, completion.tokens]
        for given in completion.given:
            expected[given.start : given.stop] = 0
        np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_what_else_is_decoded_changes_nothing_where_turns_are_answered():
    every = answered()
    for i, prompt in enumerate(PROMPTS):
        alone = answered([prompt], prompt_ids=[i])
        for ours, theirs in zip(alone, every[4 * i : 4 * i + 4], strict=True):
            assert ours.tokens == theirs.tokens and ours.given == theirs.given
            np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_without_an_answer_completions_are_those_of_a_call_without_answers():
    plain = Sampling(LIMIT, stop_ids=(END,), samples_per_prompt=4, batch_size=8, cache_length=64)
    expected = generate(CONFIG, PARAMS, PROMPTS, plain, seed=0)
    for ours, theirs in zip(answered(respond=lambda turn: []), expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.finished == theirs.finished
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_what_is_cut_off_is_told_from_what_has_ended():
    ended = answered(respond=lambda turn: [])
    cut = answered(respond=lambda turn: None)
    long = answered(respond=lambda turn: [TOOL] * LIMIT)
    assert any(c.finished for c in ended)
    for first, second, third in zip(ended, cut, long, strict=True):
        assert first.tokens == second.tokens == third.tokens
        assert not second.finished and not third.finished and third.given == ()


def test_an_answer_that_leaves_room_for_one_token_is_taken_and_one_that_leaves_none_is_not():
    for room, taken in ((1, True), (0, False)):
        said = {}

        def fill(turn, room=room, said=said):
            key = turn[:2]
            if key in said:
                return []
            said[key] = len(turn.tokens)
            return [TOOL] * (LIMIT - room - len(turn.tokens))

        for i, completion in enumerate(answered(respond=fill)):
            if (i // 4, i % 4) in said:
                assert (len(completion.tokens) == LIMIT) == taken == bool(completion.given)


def test_new_tokens_are_passed_on_once_and_in_order_answers_among_them():
    seen = {}
    completions = answered(
        on_tokens=lambda i, k, new: seen.setdefault((i, k), []).extend(new), chunk=3
    )
    assert [seen[i, k] for i in range(4) for k in range(4)] == [c.tokens for c in completions]


def test_what_would_read_the_answers_too_is_refused():
    with pytest.raises(UserError, match="no stop_strings and no repetition_penalty"):
        answered(repetition_penalty=1.2)
