"""How completions are drawn, checked on the host, where compiled code would bend silently."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, check_tokens

_IDS = 2**32  # seeds and prompt ids: what the random numbers can tell apart
_COUNTS = ("max_new_tokens", "samples_per_prompt", "batch_size", "top_k")
_REALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number, at least 0", lambda x: x >= 0),
    "top_p": ("above 0, at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number above 0", lambda x: x > 0),
}


class Turn(NamedTuple):
    """What a completion of a prompt has said since it was last answered, its stop token too."""

    prompt: int  # index
    sample: int
    tokens: list[int]


# Answers turns, all at once: [] where the completion has ended, None where it is cut off there,
# or the tokens that it goes on after.
Respond = Callable[[Sequence[Turn]], Sequence[list[int] | None]]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, when they end, and how many are decoded together.

    Attributes:
      max_new_tokens: limit on the tokens of a completion, the stop token included.
      temperature: T of softmax(logits / T); 0 takes the most likely token, with the log-probs
        of T = 1.
      top_k, top_p, min_p: see `samplers.sample`; in this order, each over what the last one kept.
        Log-probs are normalised over the tokens that are left.
      repetition_penalty: above 1 makes tokens of the prompt and the completion so far less
        likely: see `samplers.penalise`.
      allowed_tokens: bool [vocab_size], the tokens that may be drawn; log-probs are normalised
        over them.
      stop_ids: tokens that end a completion.
      stop_strings: a completion also ends with the first token for which `decode`, given its
        tokens so far, returns a text with one of them. More tokens must only add to the text,
        but for a U+FFFD at its end.
      samples_per_prompt: completions of each prompt.
      batch_size: slots decoded together; a completion that ends makes room for the next.
      respond: answers completions that a stop token ended, which then go on in the same cache; all
        tokens, those of answers too, count to max_new_tokens, and where an answer does not fit
        the completion is cut off before it. In which order it is asked is not that of the prompts.
      cache_length: positions of a slot, by default those of the longest prompt and
        max_new_tokens, rounded up to 2ⁿ or 3·2ⁿ; the code is compiled once for each.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    allowed_tokens: np.ndarray | None = None
    stop_ids: Collection[int] = ()
    stop_strings: Collection[str] = ()
    decode: Callable[[list[int]], str] | None = None
    samples_per_prompt: int = 1
    batch_size: int = 64
    respond: Respond | None = None
    cache_length: int | None = None

    def validate(self) -> None:
        """Raises UserError for an option that no model can follow, by its name."""
        for name in _COUNTS:
            count = getattr(self, name)
            if count is not None and count < 1:
                raise UserError(f"{name} = {count}: at least 1")
        for name, (interval, fits) in _REALS.items():
            real = getattr(self, name)
            if real is not None and not (math.isfinite(real) and fits(real)):
                raise UserError(f"{name} = {real}: {interval}")
        if isinstance(self.stop_strings, str):
            raise UserError(f"stop_strings = {self.stop_strings!r}: give a list of strings")
        if "" in self.stop_strings:
            raise UserError("stop_strings: an empty string would end every completion at once")
        if self.stop_strings and self.decode is None:
            raise UserError("stop_strings need decode, which turns tokens into text")
        if self.respond is not None and (self.stop_strings or self.repetition_penalty is not None):
            raise UserError(
                "where turns are answered there are no stop_strings and no repetition_penalty: "
                "they would read the answers too"
            )

    def masks(self, config: ModelConfig) -> tuple[np.ndarray | None, np.ndarray]:
        """Bool [vocab_size] each: what may be drawn (None: everything), what ends a completion.

        What the config says is unused may never be drawn.

        Raises:
          UserError: a stop id or the mask of allowed tokens does not fit the vocabulary.
        """
        stop_ids = np.array(sorted(self.stop_ids), np.int64)
        _check_tokens(config, "stop_ids", stop_ids)
        stop = np.zeros(config.vocab_size, bool)
        stop[stop_ids] = True
        if self.allowed_tokens is None:
            return (config.words if config.unused else None), stop
        allowed = np.asarray(self.allowed_tokens)
        if allowed.shape != stop.shape or allowed.dtype != bool or not allowed.any():
            count = np.count_nonzero(allowed)
            raise UserError(
                f"allowed_tokens must be a bool mask of {config.vocab_size} tokens with one or "
                f"more allowed, not {allowed.dtype} {allowed.shape} with {count}"
            )
        if not (allowed & config.words).any():
            raise UserError("allowed_tokens allows only ids that no word of the tokenizer has")
        return allowed & config.words, stop


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    """Raises UserError for a prompt that is empty, too long or not of the vocabulary."""
    if config.head != "lm":
        raise UserError("generation needs a model with head = 'lm'")
    room, limit = config.max_length, "model.max_length"
    if sampling.cache_length is not None:
        if sampling.cache_length > room:
            raise UserError(
                f"cache_length = {sampling.cache_length}: more than {limit} = {room}; where it "
                "is rollout.max_prompt_tokens + rollout.max_new_tokens, lower one of them"
            )
        room, limit = sampling.cache_length, "cache_length"
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give it at least one token")
        if len(prompt) + sampling.max_new_tokens > room:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens = "
                f"{sampling.max_new_tokens} more than {limit} = {room}"
            )
        _check_tokens(config, f"prompt {i}", prompt)


def check_streams(seed: int, prompt_ids: Sequence[int], prompts: int) -> None:
    """Raises UserError for numbers that the random streams cannot tell apart."""
    if not 0 <= seed < _IDS:
        raise UserError(f"seed = {seed} must be a whole number from 0 to {_IDS - 1}")
    if len(prompt_ids) != prompts:
        raise UserError(f"{len(prompt_ids)} prompt_ids for {prompts} prompts")
    wrong = next((i for i in prompt_ids if not 0 <= i < _IDS), None)
    if wrong is not None:
        raise UserError(f"prompt_ids: {wrong} is not from 0 to {_IDS - 1}")


def _check_tokens(config: ModelConfig, what: str, ids) -> None:
    try:
        check_tokens(config, np.asarray(ids))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
