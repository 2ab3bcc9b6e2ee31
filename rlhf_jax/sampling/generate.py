"""Completions of prompts: a compiled prefill and decoding loop over a key-value cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, apply, check_tokens, init_cache, logits
from rlhf_jax.sampling.samplers import sample, uniforms

_SHORTEST_BUCKET = 64  # compiling for another length costs more than padding to this one


@dataclasses.dataclass(frozen=True)
class Completion:
    tokens: list[int]  # up to and including the stop token
    logprobs: np.ndarray  # f32, nats, of these tokens under the distribution they were drawn from
    finished: bool  # ended by a stop token, not by the length limit


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop_ids: Collection[int] = (),
    allowed_tokens: np.ndarray | None = None,
    samples_per_prompt: int = 1,
    prompt_ids: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """Completes every prompt, `samples_per_prompt` times.

    The random number behind a token is a function of (seed, prompt id, sample, token index)
    alone, so what a prompt gets does not depend on its batch mates or on the batch size.

    Args:
        prompts: token ids; none may be empty.
        max_new_tokens: limit on the tokens of a completion, the stop token included.
        temperature: T of softmax(logits / T); 0 takes the most likely token, with the log-probs
            of T = 1.
        stop_ids: tokens that end a completion.
        allowed_tokens: bool [vocab_size], the tokens that may be drawn; log-probs are normalised
            over them.
        prompt_ids: what names a prompt in the random numbers, by default its index.
        batch_size: rows decoded together.

    Returns:
        Completions in the order of the prompts, the samples of a prompt together.

    Raises:
        UserError: arguments the model cannot follow, each named.
    """
    counts = {
        "max_new_tokens": max_new_tokens,
        "samples_per_prompt": samples_per_prompt,
        "batch_size": batch_size,
    }
    _check(config, prompts, temperature, counts)
    allowed, stop = _masks(config, allowed_tokens, stop_ids)
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    if len(prompt_ids) != len(prompts):
        raise UserError(f"{len(prompt_ids)} prompt_ids for {len(prompts)} prompts")
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(samples_per_prompt)]
    rows.sort(key=lambda row: len(prompts[row[0]]))
    batch_size = min(batch_size, _next_power(len(rows)))
    pending = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        tokens, lengths = _pad([prompts[i] for i, _ in batch], batch_size, config.max_length)
        streams = np.zeros((batch_size, 2), np.uint32)
        streams[: len(batch)] = [(prompt_ids[i], sample) for i, sample in batch]
        outputs = _complete(
            config,
            params,
            tokens,
            lengths,
            _row_keys(jax.random.key(seed), streams),
            allowed,
            stop,
            temperature or 1.0,
            greedy=temperature == 0,
            max_new_tokens=max_new_tokens,
        )
        pending.append((batch, outputs))  # not read yet: the device runs ahead
    completions = {
        row: completion
        for batch, outputs in pending
        for row, completion in zip(batch, _read(*outputs), strict=False)
    }
    return [completions[row] for row in sorted(completions)]


@partial(jax.jit, static_argnames=("config", "greedy", "max_new_tokens"))
def _complete(
    config, params, prompts, lengths, keys, allowed, stop, temperature, *, greedy, max_new_tokens
):
    """Rows of one batch: tokens and logprobs [B, max_new_tokens], count [B], finished [B].

    A row of length 0 is padding and counts as finished from the start.
    """
    batch, longest = prompts.shape

    def draw(hidden, index):
        uniform = None if greedy else uniforms(keys, index)
        return sample(logits(config, params, hidden), uniform, temperature, allowed)

    def record(state, token, logprob):
        active = ~state["finished"]
        return {
            "index": state["index"] + 1,
            "tokens": state["tokens"].at[:, state["index"]].set(token),
            "logprobs": state["logprobs"].at[:, state["index"]].set(logprob),
            "count": state["count"] + active,
            "finished": state["finished"] | stop[token],
        }

    def unfinished(carry):
        _, state, _ = carry
        return (state["index"] < max_new_tokens) & ~state["finished"].all()

    def decode(carry):
        token, state, cache = carry
        hidden, cache = apply(config, params, token[:, None], cache=cache)
        token, logprob = draw(hidden[:, 0], state["index"])
        return token, record(state, token, logprob), cache

    empty = init_cache(config, batch, longest + max_new_tokens)
    hidden, cache = apply(config, params, prompts, cache=empty, prompt_lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    token, logprob = draw(jnp.take_along_axis(hidden, last, axis=1)[:, 0], 0)
    state = {
        "index": 0,
        "tokens": jnp.zeros((batch, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((batch, max_new_tokens), jnp.float32),
        "count": jnp.zeros(batch, jnp.int32),
        "finished": lengths == 0,
    }
    state = record(state, token, logprob)
    _, state, _ = jax.lax.while_loop(unfinished, decode, (token, state, cache))
    return state["tokens"], state["logprobs"], state["count"], state["finished"]


def _read(tokens, logprobs, count, finished) -> list[Completion]:
    tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
    return [
        Completion(tokens[row, :n].tolist(), logprobs[row, :n].copy(), bool(done))
        for row, (n, done) in enumerate(zip(np.asarray(count), np.asarray(finished), strict=True))
    ]


@jax.jit
def _row_keys(key, streams):
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s[0]), s[1]))(streams)


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _pad(prompts, rows: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as right-padded rows of a power-of-two length, so that few shapes are compiled."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    width = min(max(_SHORTEST_BUCKET, _next_power(int(lengths.max()))), max_length)
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _check(config: ModelConfig, prompts, temperature: float, counts: dict[str, int]) -> None:
    if config.head != "lm":
        raise UserError("generation needs a model with head = 'lm'")
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} = {count}: at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature = {temperature}: at least 0")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give it at least one token")
        new = counts["max_new_tokens"]
        if len(prompt) + new > config.max_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens = {new} "
                f"more than model.max_length = {config.max_length}"
            )
        _check_ids(config, f"prompt {i}", prompt)


def _check_ids(config: ModelConfig, what: str, ids) -> None:
    try:
        check_tokens(config, np.asarray(ids))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _masks(config: ModelConfig, allowed_tokens, stop_ids) -> tuple[np.ndarray | None, np.ndarray]:
    """Bool [vocab_size] each: what may be drawn (None: everything) and what ends a completion."""
    stop_ids = np.array(sorted(stop_ids), np.int64)
    _check_ids(config, "stop_ids", stop_ids)
    stop = np.zeros(config.vocab_size, bool)
    stop[stop_ids] = True
    if allowed_tokens is None:
        return None, stop
    allowed = np.asarray(allowed_tokens)
    if allowed.shape != stop.shape or allowed.dtype != bool or not allowed.any():
        raise UserError(
            f"allowed_tokens must be a bool mask of {config.vocab_size} tokens with one or more "
            f"allowed, not {allowed.dtype} {allowed.shape} with {np.count_nonzero(allowed)}"
        )
    return allowed, stop
