"""Checks of what `generate` is asked for, on the host, where compiled code would bend silently."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, check_tokens

_IDS = 2**32  # seeds and prompt ids: what the random numbers can tell apart


def check_options(counts: Mapping[str, int | None], reals: Mapping[str, float | None]) -> None:
    """Raises UserError for a count below 1 or a real outside its range; None is no choice."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} = {count}: at least 1")
    limits: dict[str, tuple[str, Callable[[float], bool]]] = {
        "temperature": ("a number, at least 0", lambda x: x >= 0),
        "top_p": ("above 0, at most 1", lambda x: 0 < x <= 1),
        "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
        "repetition_penalty": ("a number above 0", lambda x: x > 0),
    }
    for name, real in reals.items():
        what, fits = limits[name]
        if real is not None and not (math.isfinite(real) and fits(real)):
            raise UserError(f"{name} = {real}: {what}")


def check_stop_strings(stop_strings: Collection[str], decode: Callable | None) -> None:
    """Raises UserError unless stop strings are several, not empty, and come with `decode`."""
    if isinstance(stop_strings, str):
        raise UserError(f"stop_strings = {stop_strings!r}: give a list of strings")
    if "" in stop_strings:
        raise UserError("stop_strings: an empty string would end every completion at once")
    if stop_strings and decode is None:
        raise UserError("stop_strings need decode, which turns tokens into text")


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    cache_length: int | None,
) -> None:
    """Raises UserError for a prompt that is empty, too long or not of the vocabulary."""
    if config.head != "lm":
        raise UserError("generation needs a model with head = 'lm'")
    room, what = config.max_length, "model.max_length"
    if cache_length is not None:
        if cache_length > room:
            raise UserError(f"cache_length = {cache_length}: more than {what} = {room}")
        room, what = cache_length, "cache_length"
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give it at least one token")
        if len(prompt) + max_new_tokens > room:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens = {max_new_tokens} "
                f"more than {what} = {room}"
            )
        _check_tokens(config, f"prompt {i}", prompt)


def check_streams(seed: int, prompt_ids: Sequence[int], prompts: int) -> None:
    """Raises UserError for numbers that the random streams cannot tell apart."""
    if not 0 <= seed < _IDS:
        raise UserError(f"seed = {seed}: from 0 to {_IDS - 1}")
    if len(prompt_ids) != prompts:
        raise UserError(f"{len(prompt_ids)} prompt_ids for {prompts} prompts")
    wrong = next((i for i in prompt_ids if not 0 <= i < _IDS), None)
    if wrong is not None:
        raise UserError(f"prompt_ids: {wrong} is not from 0 to {_IDS - 1}")


def token_masks(
    config: ModelConfig, allowed_tokens: np.ndarray | None, stop_ids: Collection[int]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Bool [vocab_size] each: what may be drawn (None: everything) and what ends a completion.

    What the config says is unused may never be drawn.
    """
    stop_ids = np.array(sorted(stop_ids), np.int64)
    _check_tokens(config, "stop_ids", stop_ids)
    stop = np.zeros(config.vocab_size, bool)
    stop[stop_ids] = True
    if allowed_tokens is None:
        return (config.words if config.unused else None), stop
    allowed = np.asarray(allowed_tokens)
    if allowed.shape != stop.shape or allowed.dtype != bool or not allowed.any():
        raise UserError(
            f"allowed_tokens must be a bool mask of {config.vocab_size} tokens with one or more "
            f"allowed, not {allowed.dtype} {allowed.shape} with {np.count_nonzero(allowed)}"
        )
    if not (allowed & config.words).any():
        raise UserError("allowed_tokens allows only ids that no word of the tokenizer has")
    return allowed & config.words, stop


def _check_tokens(config: ModelConfig, what: str, ids) -> None:
    try:
        check_tokens(config, np.asarray(ids))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
