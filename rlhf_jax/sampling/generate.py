"""Completions of prompts: the host's side, which keeps the slots of the engine filled."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.devices import decoding_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.global_arrays import put, to_host
from rlhf_jax.models import ModelConfig, decoding_params
from rlhf_jax.models.sharding import batch_shards
from rlhf_jax.sampling import engine
from rlhf_jax.sampling.arguments import Sampling, Turn, check_prompts, check_streams
from rlhf_jax.stopping import stop_point

OnTokens = Callable[[int, int, list[int]], object]

_SHORTEST_BUCKET = 32  # compiling for another length costs more than padding to this one
_REPLACEMENT = "\ufffd"  # half a character; the next token may complete it, and it is gone
_ROWS = 8  # prompts prefilled, or slots filled, by one call; fewer only if there are fewer slots


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt.

    Attributes:
      tokens: up to and including the stop token, or the one that completes a stop string.
      logprobs: f32, nats, of these tokens under the distribution they were drawn from.
      finished: ended by a stop token or string, not by the length limit.
      given: places of the tokens that were not drawn but answer a turn (see `Sampling.respond`);
        their log-probs are 0.
      unread: tokens of an answer to the last turn for which `max_new_tokens` left no room.
    """

    tokens: list[int]
    logprobs: np.ndarray
    finished: bool
    given: tuple[range, ...] = ()
    unread: int = 0

    @property
    def last_turn(self) -> list[int]:
        """The tokens after the last answer; all of them if there is none."""
        return self.turns[-1]

    @property
    def turns(self) -> list[list[int]]:
        """The tokens of each turn that was drawn."""
        begins = [0, *(given.stop for given in self.given)]
        ends = [*(given.start for given in self.given), len(self.tokens)]
        return [self.tokens[a:b] for a, b in zip(begins, ends, strict=True)]


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    prompt_ids: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
    chunk: int = 16,
) -> list[Completion]:
    """Completes every prompt, `sampling.samples_per_prompt` times.

    The random number behind a token is a function of (seed, prompt id, sample, token index) alone.
    With one `batch_size`, one `cache_length` and the same devices, tokens and log-probs are the
    same to the last bit whatever else is in the call, in whatever order; with others, log-probs may
    round differently. Devices that all have the parameters share the slots: see `devices.py`.

    Args:
        prompts: token ids; none may be empty.
        prompt_ids: whole numbers below 2³² that name the prompts in the random numbers, by
            default their indices.
        on_tokens: called with (prompt index, sample, new tokens) as they come: in order, and
            nothing after the end of a completion.
        chunk: tokens between two looks of the host at them, for stop_strings and on_tokens.

    Returns:
        Completions in the order of the prompts, the samples of a prompt together.

    Raises:
        UserError: arguments the model cannot follow, each named; a token was drawn whose
            probability is not finite.
        Preempted: a stop was asked for (see `stopping`).
    """
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    sampling.validate()
    if chunk < 1:
        raise UserError(f"chunk = {chunk}: at least 1")
    check_prompts(config, prompts, sampling)
    check_streams(seed, prompt_ids, len(prompts))
    drawing = engine.Drawing.of(sampling, *sampling.masks(config))
    if not len(prompts):
        return []
    decoder = _Decoder(config.forward, params, prompts, sampling, drawing)
    if sampling.stop_strings or on_tokens is not None:
        decoder.watch(on_tokens, chunk)
    return decoder.run(jax.random.key(seed), prompt_ids)


class _Request(NamedTuple):
    prompt: int
    sample: int


class _Waiting(NamedTuple):
    """A request whose prompt is row `row` of a prefilled batch."""

    number: int  # of the batch
    batch: engine.Prefilled
    row: int
    request: _Request


@dataclass
class _Held:
    """A request that a slot works on."""

    request: _Request
    looked: int = 0  # tokens the host has looked at
    given: list[range] = field(default_factory=list)  # places of what answered its turns


class _Decoder:
    """Fills free slots, lets all advance and takes out the completions that have ended, in turn."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        drawing: engine.Drawing,
    ):
        self.config, self.prompts, self.sampling, self.drawing = config, prompts, sampling, drawing
        length = sampling.cache_length
        if length is None:
            longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
            length = min(_round_up(longest), config.max_length)
        self.cache_length = length
        self.mesh = decoding_mesh(params, sampling.batch_size)
        groups = batch_shards(self.mesh)
        slots = -(-sampling.batch_size // groups) * groups
        params = decoding_params(config, params)
        self.penalised = sampling.repetition_penalty is not None
        answered = sampling.respond is not None
        self.slots = engine.empty(config, slots, length, self.penalised, self.mesh, answered)
        # Where a CPU's cores decode, the prompts are read by the one device that trains.
        self.cores = self.mesh is not None and len(_devices_of(params)) == 1
        self.params = self._on_mesh(params)
        self.reader = params if self.cores else self.params
        self.held: list[_Held | None] = [None] * slots
        self.rows = -(-min(_ROWS, slots) // groups) * groups
        self.on_tokens: OnTokens | None = None
        self.watches, self.steps = False, sampling.max_new_tokens  # until the host looks again

    def watch(self, on_tokens: OnTokens | None, chunk: int) -> None:
        """The host looks at new tokens every `chunk` steps."""
        self.watches, self.steps, self.on_tokens = True, chunk, on_tokens

    def run(self, key: jax.Array, prompt_ids: Sequence[int]) -> list[Completion]:
        """All completions, in the order of the requests."""
        waiting = self._prefill()
        completions: dict[_Request, Completion] = {}
        requests = unstarted = len(self.prompts) * self.sampling.samples_per_prompt
        while len(completions) < requests:
            stop_point(together=True)
            unstarted -= self._refill(waiting, key, prompt_ids)
            # Refilling costs a little: let a quarter of the slots end first, if any wait for them.
            count = len(self.held)
            ended = min(max(1, count // 4), unstarted) if unstarted else count
            live = np.array([work is not None for work in self.held])
            if self.sampling.respond is not None:  # any that ends may go on
                count = int(live.sum())
                ended = max(1, count // 4)
            self.slots = engine.advance(
                self.config, self.params, self.slots, self.drawing, live,
                count - ended, self.steps, self.mesh,
            )  # fmt: skip
            completions.update(self._harvest())
        return [completions[request] for request in sorted(completions)]

    def _prefill(self) -> Iterator[_Waiting]:
        """All requests, those of a prompt together; their prompts are prefilled as they are taken.

        A batch has one number of rows, and one length, the next power of two to those of its
        prompts, so that what a prompt gets does not depend on the others and few lengths are
        compiled.
        """
        buckets: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            length = min(max(_SHORTEST_BUCKET, _next_power(len(prompt))), self.cache_length)
            buckets.setdefault(length, []).append(i)
        number = itertools.count()
        for length, indices in sorted(buckets.items()):
            for start in range(0, len(indices), self.rows):
                part, which = indices[start : start + self.rows], next(number)
                tokens = np.zeros((self.rows, length), np.int32)
                lengths = np.zeros(self.rows, np.int32)
                for row, i in enumerate(part):
                    tokens[row, : len(self.prompts[i])] = self.prompts[i]
                    lengths[row] = len(self.prompts[i])
                batch = engine.prefill(
                    self.config, self.reader, tokens, lengths, self.penalised,
                    None if self.cores else self.mesh,
                )  # fmt: skip
                if self.cores:
                    batch = self._on_mesh(batch)
                for row, i in enumerate(part):
                    for sample in range(self.sampling.samples_per_prompt):
                        yield _Waiting(which, batch, row, _Request(i, sample))

    def _refill(
        self, waiting: Iterator[_Waiting], key: jax.Array, prompt_ids: Sequence[int]
    ) -> int:
        """Fills free slots with as many of the waiting requests as fit, and says how many."""
        free = [place for place, work in enumerate(self.held) if work is None]
        started = 0
        # `free` comes first: zip must not take a request that it has no place for.
        pairs = zip(free, waiting, strict=False)
        for _, group in itertools.groupby(pairs, lambda pair: pair[1].number):
            while part := list(itertools.islice(group, self.rows)):
                sources = np.zeros(self.rows, np.int32)
                places = np.full(self.rows, len(self.held), np.int32)  # beyond the slots
                names = np.zeros((self.rows, 2), np.uint32)
                for i, (place, (_, _, row, request)) in enumerate(part):
                    sources[i], places[i] = row, place
                    names[i] = prompt_ids[request.prompt], request.sample
                    self.held[place] = _Held(request)
                keys = engine.row_keys(key, names)
                batch = part[0][1].batch
                self.slots = engine.insert(
                    self.slots, batch, keys, sources, places, self.mesh, self.cores
                )
                started += len(part)
        return started

    def _harvest(self) -> dict[_Request, Completion]:
        """The completions that have ended; frees their slots and passes new tokens on."""
        slots = self.slots
        tokens, logprobs, drawn, active, finished = to_host(
            (slots.tokens, slots.logprobs, slots.drawn, slots.active, slots.finished)
        )
        if not np.isfinite(logprobs[np.arange(logprobs.shape[1]) < drawn[:, None]]).all():
            raise UserError(
                "the model's probabilities are not finite: its parameters are broken, or its "
                "training diverged; take an earlier checkpoint, or train it with a lower learning "
                "rate"
            )
        completions, paused = {}, dict[int, Completion]()
        for place, work in enumerate(self.held):
            if work is None or (active[place] and not self.watches):
                continue
            row = tokens[place, : drawn[place]].tolist()
            cut = first_stop(self.sampling, row, work.looked)
            row = row[:cut]
            if self.on_tokens is not None:
                self.on_tokens(*work.request, row[work.looked :])
            work.looked = max(work.looked, len(row))
            if cut is not None or not active[place]:
                ended = cut is not None or bool(finished[place])
                nats = logprobs[place, : len(row)].copy()
                completion = Completion(row, nats, ended, tuple(work.given))
                if ended and self.sampling.respond is not None:
                    paused[place] = completion
                    continue
                completions[work.request] = completion
                self.held[place] = None
        return completions | self._answer(paused) if paused else completions

    def _answer(self, paused: dict[int, Completion]) -> dict[_Request, Completion]:
        """Has the completions in some slots go on after what answers them; returns the others."""
        respond, ended = self.sampling.respond, dict[_Request, Completion]()
        assert respond is not None
        held = {place: work for place, work in enumerate(self.held) if work is not None}
        turns = [Turn(*held[place].request, each.last_turn) for place, each in paused.items()]
        tokens = np.zeros(self.slots.tokens.shape, np.int32)
        begin, end = np.zeros((2, len(tokens)), np.int32)
        for (place, completion), answer in zip(paused.items(), respond(turns), strict=True):
            work, start = held[place], len(completion.tokens)
            if answer and start + len(answer) < self.sampling.max_new_tokens:
                begin[place], end[place] = start, start + len(answer)
                tokens[place, begin[place] : end[place]] = answer
                work.given.append(range(start, start + len(answer)))
                continue
            ended[work.request] = dataclasses.replace(
                completion, finished=answer == [], unread=len(answer or ())
            )
            self.held[place] = None
        if end.any():
            self.slots = engine.resume(self.slots, end > 0, tokens, begin, end)
        return ended

    def _on_mesh(self, tree: Any) -> Any:
        """The tree on the devices of the mesh, split over its axis tensor alone as it was."""
        mesh = self.mesh
        if mesh is None:
            return tree

        def place(leaf: jax.Array) -> NamedSharding:
            return NamedSharding(mesh, getattr(leaf.sharding, "spec", PartitionSpec()))

        return jax.tree.map(lambda leaf: put(leaf, place(leaf)), tree)


def first_stop(sampling: Sampling, tokens: list[int], looked: int) -> int | None:
    """How many tokens a stop string leaves, if one ends after the first `looked`."""
    decode = sampling.decode
    if not sampling.stop_strings or decode is None:
        return None

    def stopped(end: int) -> bool:
        text = decode(tokens[:end])
        return any(string in text for string in sampling.stop_strings)

    ends = range(looked + 1, len(tokens) + 1)
    if any(_REPLACEMENT in string for string in sampling.stop_strings):
        return next(filter(stopped, ends), None)
    if not ends or not stopped(len(tokens)):
        return None
    return ends[bisect.bisect_left(ends, True, key=stopped)]


def _devices_of(tree: Any) -> set[jax.Device]:
    return jax.tree.leaves(tree)[0].sharding.device_set


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _round_up(n: int) -> int:
    """The smallest 2ᵏ or 3·2ᵏ from n on."""
    power = _next_power(n)
    return power * 3 // 4 if n <= power * 3 // 4 else power
