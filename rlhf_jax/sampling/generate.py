"""Completions of prompts: the host's side, which keeps the slots of the engine filled."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.devices import decoding_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, decoding_params
from rlhf_jax.sampling import engine
from rlhf_jax.sampling.arguments import (
    check_options,
    check_prompts,
    check_stop_strings,
    check_streams,
    token_masks,
)
from rlhf_jax.stopping import stop_point

_SHORTEST_BUCKET = 32  # compiling for another length costs more than padding to this one
_REPLACEMENT = "\ufffd"  # half a character; the next token may complete it, and it is gone
_ROWS = 8  # prompts prefilled, or slots filled, by one call; fewer only if there are fewer slots


class _Request(NamedTuple):
    prompt: int
    sample: int


class _Waiting(NamedTuple):
    """A request whose prompt is row `row` of a prefilled batch."""

    number: int  # of the batch
    batch: engine.Prefilled
    row: int
    request: _Request


class _Streams(NamedTuple):
    """What the random numbers of a request follow from, beside its sample."""

    key: jax.Array
    prompt_ids: Sequence[int]


@dataclasses.dataclass
class _Held:
    """What a slot works on."""

    request: _Request
    looked: int = 0  # tokens the host has looked at


@dataclasses.dataclass(frozen=True)
class _Watch:
    """What the host looks for among new tokens."""

    stop_strings: Collection[str]
    decode: Callable[[list[int]], str] | None
    on_tokens: Callable[[int, int, list[int]], object] | None
    chunk: int  # steps between two looks

    def needed(self) -> bool:
        return bool(self.stop_strings) or self.on_tokens is not None

    def stop(self, tokens: list[int], looked: int) -> int | None:
        """How many tokens a stop string leaves, if one ends after the first `looked`."""
        decode = self.decode
        if not self.stop_strings or decode is None:
            return None

        def stopped(end: int) -> bool:
            text = decode(tokens[:end])
            return any(string in text for string in self.stop_strings)

        ends = range(looked + 1, len(tokens) + 1)
        if any(_REPLACEMENT in string for string in self.stop_strings):
            return next(filter(stopped, ends), None)
        if not ends or not stopped(len(tokens)):
            return None
        return ends[bisect.bisect_left(ends, True, key=stopped)]


@dataclasses.dataclass(frozen=True)
class Completion:
    tokens: list[int]  # up to and including the stop token, or the one that completes a stop string
    logprobs: np.ndarray  # f32, nats, of these tokens under the distribution they were drawn from
    finished: bool  # ended by a stop token or string, not by the length limit


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    allowed_tokens: np.ndarray | None = None,
    stop_ids: Collection[int] = (),
    stop_strings: Collection[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    on_tokens: Callable[[int, int, list[int]], object] | None = None,
    chunk: int = 16,
    samples_per_prompt: int = 1,
    prompt_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    cache_length: int | None = None,
) -> list[Completion]:
    """Completes every prompt, `samples_per_prompt` times.

    The random number behind a token is a function of (seed, prompt id, sample, token index) alone.
    With one `batch_size`, one `cache_length` and the same devices, tokens and log-probs are the
    same to the last bit whatever else is in the call, in whatever order; with others, log-probs may
    round differently. Devices that all have the parameters share the slots: see `devices.py`.

    Args:
        prompts: token ids; none may be empty.
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
        on_tokens: called with (prompt index, sample, new tokens) as they come: in order, and
            nothing after the end of a completion.
        chunk: tokens between two looks of the host at them, for stop_strings and on_tokens.
        prompt_ids: whole numbers below 2³² that name the prompts in the random numbers, by
            default their indices.
        batch_size: slots decoded together; a completion that ends makes room for the next.
        cache_length: positions of a slot, by default those of the longest prompt and
            max_new_tokens, rounded up to 2ⁿ or 3·2ⁿ; the code is compiled once for each.

    Returns:
        Completions in the order of the prompts, the samples of a prompt together.

    Raises:
        UserError: arguments the model cannot follow, each named; a token was drawn whose
            probability is not finite.
        Preempted: a stop was asked for (see `stopping`).
    """
    counts = {
        "max_new_tokens": max_new_tokens,
        "samples_per_prompt": samples_per_prompt,
        "batch_size": batch_size,
        "chunk": chunk,
        "top_k": top_k,
    }
    reals = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    check_options(counts, reals)
    check_stop_strings(stop_strings, decode)
    check_prompts(config, prompts, max_new_tokens, cache_length)
    check_streams(seed, prompt_ids, len(prompts))
    allowed, stop = token_masks(config, allowed_tokens, stop_ids)
    if not len(prompts):
        return []
    if cache_length is None:
        longest = max(len(prompt) for prompt in prompts)
        cache_length = min(_round_up(longest + max_new_tokens), config.max_length)
    sampling = engine.Sampling(
        temperature=float(temperature) or None,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        allowed=allowed,
        stop=stop,
        limit=max_new_tokens,
    )
    params = decoding_params(config, params)
    mesh = decoding_mesh(params, batch_size)
    penalised = repetition_penalty is not None
    slots = engine.empty(config, batch_size, cache_length, penalised, mesh)
    reader = params if mesh is None else _on_first(params)
    read = partial(engine.prefill, config, reader, penalised=penalised)
    params = _on_all(mesh, params)
    rows = min(_ROWS, batch_size)
    waiting = _prefilled(read, mesh, prompts, samples_per_prompt, rows, cache_length)
    completions = _complete(
        partial(engine.advance, config, params),
        mesh,
        slots,
        sampling,
        waiting,
        len(prompts) * samples_per_prompt,
        _Streams(jax.random.key(seed), prompt_ids),
        _Watch(stop_strings, decode, on_tokens, chunk),
    )
    return [completions[request] for request in sorted(completions)]


def _complete(
    advance: Callable[..., engine.Slots],
    mesh: Mesh | None,
    slots: engine.Slots,
    sampling: engine.Sampling,
    waiting: Iterator[_Waiting],
    requests: int,
    streams: _Streams,
    watch: _Watch,
) -> dict[_Request, Completion]:
    """All completions: fills free slots, lets all advance and takes out what has ended, in turn."""
    held: list[_Held | None] = [None] * len(slots.active)
    completions: dict[_Request, Completion] = {}
    unstarted = requests
    while len(completions) < requests:
        stop_point()
        slots, started = _refill(slots, held, waiting, streams, mesh)
        unstarted -= started
        # Refilling costs a little: let a quarter of the slots end first, if any wait for them.
        ended = min(max(1, len(held) // 4), unstarted) if unstarted else len(held)
        live = np.array([work is not None for work in held])
        steps = watch.chunk if watch.needed() else sampling.limit
        slots = advance(slots, sampling, live, len(held) - ended, steps, mesh)
        completions.update(_harvest(slots, held, watch))
    return completions


def _on_first(tree: Any) -> Any:
    """The tree as the first of its devices has it; all have all of it."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _on_all(mesh: Mesh | None, tree: Any) -> Any:
    """The tree on every device of the mesh, copied from the first one if it is not there yet."""
    if mesh is None:
        return tree
    there = jax.tree.leaves(tree)[0].sharding.device_set == {*mesh.devices.flat}
    return jax.device_put(tree if there else _on_first(tree), NamedSharding(mesh, PartitionSpec()))


def _prefilled(
    read: Callable[..., engine.Prefilled],
    mesh: Mesh | None,
    prompts: Sequence[Sequence[int]],
    samples: int,
    rows: int,
    cache_length: int,
) -> Iterator[_Waiting]:
    """All requests, those of a prompt together; their prompts are prefilled as they are taken.

    A batch has `rows` rows, and one length, the next power of two to those of its prompts, so that
    what a prompt gets does not depend on the others and few lengths are compiled.
    """
    buckets: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        length = min(max(_SHORTEST_BUCKET, _next_power(len(prompt))), cache_length)
        buckets.setdefault(length, []).append(i)
    batches = [
        (length, indices[start : start + rows])
        for length, indices in sorted(buckets.items())
        for start in range(0, len(indices), rows)
    ]
    for number, (length, indices) in enumerate(batches):
        tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(prompts[i])] = prompts[i]
            lengths[row] = len(prompts[i])
        batch = _on_all(mesh, read(tokens, lengths))
        for row, i in enumerate(indices):
            for sample in range(samples):
                yield _Waiting(number, batch, row, _Request(i, sample))


def _refill(
    slots: engine.Slots,
    held: list[_Held | None],
    waiting: Iterator[_Waiting],
    streams: _Streams,
    mesh: Mesh | None,
) -> tuple[engine.Slots, int]:
    """The slots with as many of the waiting requests as fit, and how many those were."""
    free = [place for place, work in enumerate(held) if work is None]
    started, rows = 0, min(_ROWS, len(held))
    # `free` comes first: zip must not take a request that it has no place for.
    pairs = zip(free, waiting, strict=False)
    for _, group in itertools.groupby(pairs, lambda pair: pair[1].number):
        while part := list(itertools.islice(group, rows)):
            sources, places = np.zeros(rows, np.int32), np.full(rows, len(held), np.int32)
            names = np.zeros((rows, 2), np.uint32)
            for i, (place, (_, _, row, request)) in enumerate(part):
                sources[i], places[i] = row, place
                names[i] = streams.prompt_ids[request.prompt], request.sample
                held[place] = _Held(request)
            keys = engine.row_keys(streams.key, names)
            slots = engine.insert(slots, part[0][1].batch, keys, sources, places, mesh)
            started += len(part)
    return slots, started


def _harvest(
    slots: engine.Slots, held: list[_Held | None], watch: _Watch
) -> dict[_Request, Completion]:
    """What has been completed; frees its places in `held` and passes new tokens on."""
    tokens, logprobs, drawn, active, finished = jax.device_get(
        (slots.tokens, slots.logprobs, slots.drawn, slots.active, slots.finished)
    )
    if not np.isfinite(logprobs[np.arange(logprobs.shape[1]) < drawn[:, None]]).all():
        raise UserError(
            "the model's probabilities are not finite: its parameters are broken, or its training "
            "diverged; take an earlier checkpoint, or train it with a lower learning rate"
        )
    completions = {}
    for place, work in enumerate(held):
        if work is None or (active[place] and not watch.needed()):
            continue
        row = tokens[place, : drawn[place]].tolist()
        cut = watch.stop(row, work.looked)
        row = row[:cut]
        if watch.on_tokens is not None:
            watch.on_tokens(*work.request, row[work.looked :])
        work.looked = len(row)
        if cut is not None or not active[place]:
            ended = cut is not None or bool(finished[place])
            completions[work.request] = Completion(row, logprobs[place, : len(row)].copy(), ended)
            held[place] = None
    return completions


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _round_up(n: int) -> int:
    """The smallest 2ᵏ or 3·2ᵏ from n on."""
    power = _next_power(n)
    return power * 3 // 4 if n <= power * 3 // 4 else power
