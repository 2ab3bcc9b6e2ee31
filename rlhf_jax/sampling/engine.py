"""Slots that decode together: prompts are prefilled, copied into slots and continued there.

On a mesh each group of devices that has a model (one device, unless the axis tensor splits it) has
as many of the rows and their caches, and decodes by itself. Where the cores of a CPU decode,
nothing may make them wait for each other: XLA's CPU devices share a few threads, and those of one
program that wait can keep another program's from ever arriving.

A slot's numbers depend on its own prompt and random stream alone, not on the slot or on what the
others hold: products and sums are row by row, and what an earlier completion left in the cache lies
behind the mask with weight 0 exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import ModelConfig, apply, init_cache, logits
from rlhf_jax.models.sharding import BATCH_AXES, batch_shards
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.samplers import penalise, sample, uniforms


class Drawing(NamedTuple):
    """How compiled code draws tokens: see `samplers.sample`. None leaves a step out of it."""

    temperature: Any  # None: the most likely token
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    allowed: Any  # bool [V] or None
    stop: Any  # bool [V], the tokens that end a completion
    limit: int  # tokens of a completion

    @staticmethod
    def of(sampling: Sampling, allowed: np.ndarray | None, stop: np.ndarray) -> Drawing:
        """Returns the part of a `Sampling` that compiled code reads, with its masks."""
        return Drawing(
            float(sampling.temperature) or None,
            *(sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty),
            *(allowed, stop, sampling.max_new_tokens),
        )


class Prefilled(NamedTuple):
    """P prompts, ready to be copied into slots; their caches are as long as their bucket."""

    cache: dict[str, Any]
    hidden: jax.Array  # [P, width] at each prompt's last token
    seen: jax.Array | None  # bool [P, V], the prompt's tokens


class Slots(NamedTuple):
    """B completions under way, in caches of S positions."""

    cache: dict[str, Any]
    hidden: jax.Array  # [B, width], which the next token is drawn from
    seen: jax.Array | None  # bool [B, V], the tokens so far, for the repetition penalty
    keys: jax.Array  # [B] random keys from `row_keys`
    drawn: jax.Array  # int32 [B], tokens of the completion
    active: jax.Array  # bool [B]
    finished: jax.Array  # bool [B], ended by a stop token
    tokens: jax.Array  # int32 [B, S], the first `drawn` of each row
    logprobs: jax.Array  # f32 [B, S], nats
    steps: jax.Array  # int32 [B], steps of the latest `advance` on the slot's device
    given: jax.Array | None  # int32 [B], tokens before this one are read, not drawn; see `resume`


_WHOLE, _ROWS = P(), P(BATCH_AXES)


def _on_each(mesh: Mesh | None, function: Callable, *kinds: P) -> Callable:
    """The function on each group's part of those arguments that are split by rows.

    What an axis tensor of several devices splits is left to XLA.
    """
    if batch_shards(mesh) == 1:
        return function
    assert mesh is not None
    manual = mesh.axis_names if mesh.shape["tensor"] == 1 else BATCH_AXES
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=kinds,
        out_specs=_ROWS,
        axis_names=set(manual),
        check_vma=False,
    )


def _split_heads(mesh: Mesh | None, slots: Slots) -> Slots:
    """Keeps the heads of the caches where an axis tensor has them, if it divides them."""
    keys = slots.cache["keys"]
    if mesh is None or mesh.shape["tensor"] == 1 or keys[0].shape[1] % mesh.shape["tensor"]:
        return slots
    inside = jax.sharding.get_abstract_mesh()
    rows = None if inside.manual_axes else BATCH_AXES
    place = NamedSharding(inside if inside.manual_axes else mesh, P(rows, "tensor"))
    held = jax.lax.with_sharding_constraint((keys, slots.cache["values"]), place)
    return slots._replace(cache={**slots.cache, "keys": held[0], "values": held[1]})


@partial(jax.jit, static_argnames=("config", "batch", "length", "penalised", "mesh", "answered"))
def empty(
    config: ModelConfig,
    batch: int,
    length: int,
    penalised: bool,
    mesh: Mesh | None = None,
    answered: bool = False,
) -> Slots:
    """`batch` idle slots with caches of `length` positions; if `answered` they can `resume`."""
    slots = Slots(
        cache=init_cache(config, batch, length),
        hidden=jnp.zeros((batch, config.width), config.compute_dtype),
        seen=jnp.zeros((batch, config.vocab_size), bool) if penalised else None,
        keys=jnp.broadcast_to(jax.random.key(0), (batch,)),
        drawn=jnp.zeros(batch, jnp.int32),
        active=jnp.zeros(batch, bool),
        finished=jnp.zeros(batch, bool),
        tokens=jnp.zeros((batch, length), jnp.int32),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        steps=jnp.zeros(batch, jnp.int32),
        given=jnp.zeros(batch, jnp.int32) if answered else None,
    )
    if mesh is None:
        return slots
    return _split_heads(mesh, jax.lax.with_sharding_constraint(slots, NamedSharding(mesh, _ROWS)))


@partial(jax.jit, static_argnames=("config", "penalised", "mesh"))
def prefill(
    config: ModelConfig,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    penalised: bool,
    mesh: Mesh | None = None,
) -> Prefilled:
    """Reads prompts int32 [P, T], padded on the right, of lengths int32 [P]; 0 is an unused row.

    With a mesh its groups read some rows each, and keep what they have read.
    """
    run = _on_each(mesh, partial(_prefill, config, penalised), _WHOLE, _ROWS, _ROWS)
    return run(params, prompts, lengths)


def _prefill(
    config: ModelConfig, penalised: bool, params: Any, prompts: jax.Array, lengths: jax.Array
) -> Prefilled:
    rows, longest = prompts.shape
    bare = init_cache(config, rows, longest)
    hidden, cache = apply(config, params, prompts, cache=bare, prompt_lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    seen = None
    if penalised:
        real = jnp.where(jnp.arange(longest) < lengths[:, None], prompts, config.vocab_size)
        seen = jnp.zeros((rows, config.vocab_size), bool)
        seen = seen.at[jnp.arange(rows)[:, None], real].set(True, mode="drop")
    return Prefilled(cast(dict, cache), jnp.take_along_axis(hidden, last, axis=1)[:, 0], seen)


@jax.jit
def row_keys(key: jax.Array, streams: jax.Array) -> jax.Array:
    """Random keys [R] of the streams uint32 [R, 2]: prompt id and sample."""
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s[0]), s[1]))(streams)


@partial(jax.jit, static_argnames=("mesh", "everywhere"), donate_argnames="slots")
def insert(
    slots: Slots,
    prefilled: Prefilled,
    keys: jax.Array,
    sources: jax.Array,
    places: jax.Array,
    mesh: Mesh | None = None,
    everywhere: bool = False,
) -> Slots:
    """Copies prompts sources[r] into slots places[r], to be continued there under keys[r].

    keys [R], sources and places int32 [R]. A place beyond the slots is dropped. Of a mesh's groups
    each has the prompts that it has read, or all of them `everywhere`.
    """
    exchange = batch_shards(mesh) > 1 and not everywhere
    run = _on_each(
        mesh, partial(_insert, mesh, exchange), _ROWS, _ROWS if exchange else _WHOLE, *[_WHOLE] * 3
    )
    return run(slots, prefilled, keys, sources, places)


def _insert(
    mesh: Mesh | None,
    exchange: bool,
    slots: Slots,
    prefilled: Prefilled,
    keys: jax.Array,
    sources: jax.Array,
    places: jax.Array,
) -> Slots:
    if batch_shards(mesh) > 1:  # this group's places; others are beyond its slots
        count, group = len(slots.active), jax.lax.axis_index(BATCH_AXES)
        places = places - count * group
        places = jnp.where(places < 0, count, places)
    if exchange:
        read = len(prefilled.hidden)
        sources = sources - read * group
        here = (sources >= 0) & (sources < read)
        sources = jnp.clip(sources, 0, read - 1)

    def take(new: jax.Array) -> jax.Array:
        taken = new[sources]
        if not exchange:
            return taken
        mask = here.reshape(-1, *[1] * (new.ndim - 1))
        # One group has the row and the others add zeros, so that nothing is rounded.
        return jax.lax.psum(jnp.where(mask, taken, 0), BATCH_AXES).astype(new.dtype)

    def put(old: Any, new: Any) -> jax.Array:
        return old.at[places].set(new, mode="drop")

    def put_cached(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[places, :, : new.shape[2]].set(take(new), mode="drop")

    cache, new = slots.cache, prefilled.cache
    slots = slots._replace(
        cache={
            "tokens": cache["tokens"]
            .at[places, : new["tokens"].shape[1]]
            .set(take(new["tokens"]), mode="drop"),
            "keys": jax.tree.map(put_cached, cache["keys"], new["keys"]),
            "values": jax.tree.map(put_cached, cache["values"], new["values"]),
            "lengths": put(cache["lengths"], take(new["lengths"])),
        },
        hidden=put(slots.hidden, take(prefilled.hidden)),
        seen=None if prefilled.seen is None else put(slots.seen, take(prefilled.seen)),
        keys=put(slots.keys, keys),
        drawn=put(slots.drawn, 0),
        active=put(slots.active, True),
        finished=put(slots.finished, False),
        given=None if slots.given is None else put(slots.given, 0),
    )
    return _split_heads(mesh, slots)


@partial(jax.jit, donate_argnames="slots")
def resume(
    slots: Slots, paused: jax.Array, tokens: jax.Array, begin: jax.Array, end: jax.Array
) -> Slots:
    """Goes on with completions that a stop token ended: what answers them is read, then drawn on.

    `advance` reads the answer as it decodes the other slots, one token a step, after the stop token
    itself, which nothing has read yet.

    Args:
        paused: bool [B], the slots that go on; the others' values are ignored.
        tokens: int32 [B, S], completions with their answers in the places begin … end − 1.
        begin, end: int32 [B].
    """
    assert slots.given is not None
    place = jnp.arange(slots.tokens.shape[1])
    new = paused[:, None] & (place >= begin[:, None]) & (place < end[:, None])
    return slots._replace(
        tokens=jnp.where(new, tokens, slots.tokens),
        logprobs=jnp.where(new, 0, slots.logprobs),
        drawn=jnp.where(paused, begin - 1, slots.drawn),
        given=jnp.where(paused, end, slots.given),
        active=slots.active | paused,
        finished=slots.finished & ~paused,
    )


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="slots")
def advance(
    config: ModelConfig,
    params: Any,
    slots: Slots,
    drawing: Drawing,
    live: jax.Array,
    enough: jax.Array | int,
    steps: jax.Array | int,
    mesh: Mesh | None = None,
) -> Slots:
    """Draws tokens until at most `enough` slots are still active or `steps` tokens were drawn.

    live: bool [B]; a slot where it is False stops being active at once. Each group of a mesh goes
    on by itself until it has its share of `enough`, rounded down; groups of several devices until
    all have. What the axis tensor splits they exchange by collective permutes, and these are of all
    devices: a group that had left its loop would keep the others waiting for ever.
    """
    enough = enough // batch_shards(mesh)
    run = _on_each(
        mesh, partial(_advance, config, mesh), _WHOLE, _ROWS, _WHOLE, _ROWS, _WHOLE, _WHOLE
    )
    return run(params, slots, drawing, live, enough, steps)


def _advance(
    config: ModelConfig,
    mesh: Mesh | None,
    params: Any,
    slots: Slots,
    drawing: Drawing,
    live: jax.Array,
    enough: jax.Array | int,
    steps: jax.Array | int,
) -> Slots:
    together = batch_shards(mesh) > 1 and mesh is not None and mesh.shape["tensor"] > 1

    def going(slots: Slots) -> jax.Array:
        mine = (slots.steps[0] < steps) & (slots.active.sum() > enough)
        return jax.lax.pmax(mine.astype(jnp.int32), BATCH_AXES) > 0 if together else mine

    slots = slots._replace(active=slots.active & live, steps=jnp.zeros_like(slots.steps))

    def step(slots: Slots) -> Slots:
        return _split_heads(mesh, _step(config, params, drawing, slots))

    return jax.lax.while_loop(going, step, slots)


def _step(config: ModelConfig, params: Any, drawing: Drawing, slots: Slots) -> Slots:
    """One token more in each active slot; an idle one repeats itself at a place that is masked."""
    # Not one with the softmax: XLA's CPU backend would compute that product on a single core.
    scores = jax.lax.optimization_barrier(logits(config, params, slots.hidden))
    if slots.seen is not None:
        scores = penalise(scores, slots.seen, drawing.repetition_penalty)
    greedy = drawing.temperature is None
    token, logprob = sample(
        scores,
        None if greedy else uniforms(slots.keys, slots.drawn),
        1.0 if greedy else drawing.temperature,
        drawing.allowed,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
        min_p=drawing.min_p,
    )
    batch, room = slots.tokens.shape
    rows, new = jnp.arange(batch), slots.active
    if slots.given is not None:
        new = slots.active & (slots.drawn >= slots.given)
        token = jnp.where(new, token, slots.tokens[rows, slots.drawn])
    place = (rows, jnp.where(new, slots.drawn, room))
    drawn = slots.drawn + slots.active
    finished = slots.finished | (new & drawing.stop[token])
    active = slots.active & ~finished & (drawn < drawing.limit)
    hidden, grown = apply(config, params, token[:, None], cache=slots.cache)
    # A token that ends its completion is never read back: its cache does not grow.
    cache = {**cast(dict, grown), "lengths": slots.cache["lengths"] + active}
    seen = slots.seen
    return slots._replace(
        cache=cache,
        hidden=hidden[:, 0],
        seen=None if seen is None else seen.at[rows, token].set(True),
        drawn=drawn,
        active=active,
        finished=finished,
        tokens=slots.tokens.at[place].set(token, mode="drop"),
        logprobs=slots.logprobs.at[place].set(logprob, mode="drop"),
        steps=slots.steps + 1,
    )
