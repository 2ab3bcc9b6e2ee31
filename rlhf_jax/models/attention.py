"""Who may attend to whom, and attention itself: plain products and a softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite: a query that sees nothing (padding) stays free of NaN


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
    row = jnp.arange(positions.shape[1])
    visible = (row[:, None] >= row)[None]
    if segment_ids is not None:
        keys = segment_ids[:, None, :]
        visible &= (segment_ids[:, :, None] == keys) & (keys != 0)
    if branch_ids is not None:
        keys = branch_ids[:, None, :]
        visible &= (branch_ids[:, :, None] == keys) | (keys == 0)
    if sliding_window is not None:
        visible &= positions[:, :, None] - positions[:, None, :] < sliding_window
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

    def scatter(cached: jax.Array, new: jax.Array) -> jax.Array:
        rows = jnp.arange(len(new))[:, None]
        return cached.at[rows, :, positions].set(new.swapaxes(1, 2))

    def row_by_row(cached: jax.Array, new: jax.Array) -> jax.Array:
        for row in range(len(new)):
            place = (row, 0, positions[row, 0], 0)
            cached = jax.lax.dynamic_update_slice(cached, new[row : row + 1], place)
        return cached

    # For a scatter a TPU's compiler lays the cache out in another way, in which it takes up to
    # twice the memory, and copies all of it there and back at every call.
    return jax.lax.platform_dependent(cached, new, tpu=row_by_row, default=scatter)


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
