"""Who may attend to whom, and attention itself: plain products and a softmax."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite: a query that sees nothing (padding) stays free of NaN
LONG = 1024  # tokens: rows with more are `LongRows`
_BLOCK = 128  # queries of a long row whose scores are held together


class LongRows(NamedTuple):
    """Whom tokens may see, as what `attention_bias` takes in place of its result."""

    positions: jax.Array
    segment_ids: jax.Array | None
    branch_ids: jax.Array | None
    sliding_window: jax.Array  # int32, the greatest there is for none


def attention_bias(
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """Returns what is added to the scores: 0 where query i may see key j, MASKED elsewhere.

    Key j is visible when j <= i in row order, both lie in the same nonzero segment, key j is
    of the shared prompt (branch 0) or of query i's own branch and, given a sliding window w,
    position[i] - position[j] < w.

    Args:
        positions: int32 [B or 1, T].
        segment_ids, branch_ids: int32 [B, T].
        sliding_window: tokens.

    Returns:
        f32 [B or 1, T, T].
    """
    ids = _ids(positions, segment_ids, branch_ids)
    return _bias(ids, ids, sliding_window)


def _ids(
    positions: jax.Array, segment_ids: jax.Array | None, branch_ids: jax.Array | None
) -> dict[str, jax.Array]:
    """Each [B or 1, T]; those that are None are left out."""
    given = {"position": positions, "segment": segment_ids, "branch": branch_ids}
    known = {name: ids for name, ids in given.items() if ids is not None}
    return {"row": jnp.arange(positions.shape[1])[None], **known}


def _bias(
    queries: dict[str, jax.Array],
    keys: dict[str, jax.Array],
    sliding_window: int | jax.Array | None,
) -> jax.Array:
    queries = {name: ids[:, :, None] for name, ids in queries.items()}
    keys = {name: ids[:, None, :] for name, ids in keys.items()}
    visible = queries["row"] >= keys["row"]
    if "segment" in keys:
        visible &= (queries["segment"] == keys["segment"]) & (keys["segment"] != 0)
    if "branch" in keys:
        visible &= (queries["branch"] == keys["branch"]) | (keys["branch"] == 0)
    if sliding_window is not None:
        visible &= queries["position"] - keys["position"] < sliding_window
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)


def cached_attention_bias(
    positions: jax.Array, slots: int, sliding_window: int | None = None
) -> jax.Array:
    """As `attention_bias`, for a cache whose slot s holds the key of position s.

    A query at positions [B, T], int32, sees the slots up to its own. Returns f32 [B, T, slots].
    """
    back = positions[:, :, None] - jnp.arange(slots)
    visible = back >= 0
    if sliding_window is not None:
        visible &= back < sliding_window
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Causal attention of scaled queries; heads come before tokens so that no product copies.

    Queries are taken in up to eight blocks, each against the keys up to its own end, which spares
    almost half of the scores, those above the diagonal. What a softmax sums is named "attention":
    a backward pass that recomputes scores finds it there.

    Args:
        query: [B, kv_heads, G, T, d], G query heads per key head, scaled by 1/√d already.
        key, value: [B, kv_heads, T, d].
        bias: f32 [B or 1, T, T] from `attention_bias`.
        softcap: c of c·tanh(scores / c).

    Returns:
        [B, kv_heads, G, T, d] in the dtype of `value`.
    """
    length, width = query.shape[3:]
    block = max(128, -(-length // 8))
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = _scores(
            query[:, :, :, start:end], key[:, :, :end], bias[:, start:end, :end], softcap
        )
        blocks.append(_average(scores, value[:, :, :end]).reshape(*query.shape[:3], -1, width))
    return jnp.concatenate(blocks, axis=3)


def attend_long(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: LongRows,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """As `attend`, for long rows: of the scores of a few queries at a time, none is kept.

    A backward pass computes them again. Queries are taken one block after the other, those of each
    quarter of a row against the keys up to its end. "Self-attention Does Not Need O(n²) Memory",
    https://arxiv.org/abs/2112.05682.
    """
    length, ids = query.shape[3], _ids(*rows[:3])
    count = -(-length // _BLOCK)

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        """Its blocks of tokens [count, …, _BLOCK, …]; the last is made full with zeros."""
        missing = [(0, 0)] * x.ndim
        missing[axis] = 0, count * _BLOCK - length
        whole = jnp.pad(x, missing).reshape(*x.shape[:axis], count, _BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(whole, axis, 0)

    queries = blocks(query, 3), {name: blocks(x, 1) for name, x in ids.items()}
    quarter, mixed = -(-count // 4), []
    for start in range(0, count, quarter):
        end = min((start + quarter) * _BLOCK, length)
        keys = key[:, :, :end], value[:, :, :end], {name: x[:, :end] for name, x in ids.items()}

        @partial(jax.checkpoint, prevent_cse=False)  # a loop's passes are apart as it is
        def mix(keys, block, window):
            (key, value, of_keys), (query, of_queries) = keys, block
            scores = _scores(query, key, _bias(of_queries, of_keys, window), softcap)
            return _average(scores, value).reshape(query.shape)

        part = jax.tree.map(lambda x, start=start: x[start : start + quarter], queries)
        mixed.append(jax.lax.map(partial(mix, keys, window=rows.sliding_window), part))
    together = jnp.moveaxis(jnp.concatenate(mixed), 0, 3)
    return together.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :length]


def attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """As `attend`, for a few queries and all slots of a cache: bias f32 [B, T, slots]."""
    return _average(_scores(query, key, bias, softcap), value).reshape(query.shape)


def write_cached(cached: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, kv_heads, T, d] into a cache [B, kv_heads, slots, d] at int32 [B, T].

    The positions of a row follow each other and fit.
    """
    # For a scatter a TPU's compiler lays the cache out in another way, in which it takes up to
    # twice the memory, and copies all of it there and back at every call.
    return jax.lax.platform_dependent(cached, new, positions, tpu=_write_rows, default=_scatter)


def _scatter(cached: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    rows = jnp.arange(len(new))[:, None]
    return cached.at[rows, :, positions].set(new.swapaxes(1, 2))


def _write_rows(cached: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    for row in range(len(new)):
        place = (row, 0, positions[row, 0], 0)
        cached = jax.lax.dynamic_update_slice(cached, new[row : row + 1], place)
    return cached


def _scores(query: jax.Array, key: jax.Array, bias: jax.Array, softcap: float | None) -> jax.Array:
    """f32 [B, kv_heads, G·T, S]: the queries of a group are just more rows of its product."""
    batch, heads, groups, length, width = query.shape
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk",
        query.reshape(batch, heads, groups * length, width),
        key,
        preferred_element_type=jnp.float32,
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    grouped = scores.reshape(batch, heads, groups, length, -1) + bias[:, None, None]
    return grouped.reshape(scores.shape)


def _average(scores: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(scores) @ value; dividing the product, not the weights, is cheaper."""
    # Not named "attention" as the sums below are: if the maximum is kept for the backward pass, XLA
    # rounds these weights differently than in scoring, which has no backward pass.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    product = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    mass = checkpoint_name(weights.sum(-1, keepdims=True), "attention")
    return (checkpoint_name(product, "attention") / mass).astype(value.dtype)
