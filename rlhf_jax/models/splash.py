"""Splash attention, a Pallas kernel for TPUs, for packed rows whose answers may share a prompt.

The kernel knows causality, a window and segments, but no branches. Those are kept apart inside the
scores: queries and keys get a few numbers more (`branch_codes`), whose product is 0 exactly where a
query may see a key and below −10⁶ where their branches differ. On a TPU this is free for heads of
64 numbers, which fill a half of its 128 lanes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig

_LANES = 128  # of a TPU: rows are padded to a multiple of so many tokens
_APART = 2.0**20  # what a score loses, at least, for another branch; exact in bfloat16


class Rows(NamedTuple):
    """int32 [B, T] each, or None: one segment a row, no branches."""

    segment_ids: jax.Array | None
    branch_ids: jax.Array | None


def takes_branches(config: ModelConfig, length: int) -> bool:
    """Whether the kernel keeps branches apart in rows of `length` tokens."""
    return config.attention_softcap is None and _window(config, length) is None


def visible_rows(
    config: ModelConfig, segment_ids: jax.Array | None, branch_ids: jax.Array | None
) -> Rows:
    """Returns what `splash` needs to know of the rows.

    Raises:
        UserError: branches with a soft cap, which would cap what keeps them apart, or with a
            window, which the kernel measures along the row and not in positions.
    """
    if branch_ids is not None and not takes_branches(config, branch_ids.shape[1]):
        capped = config.attention_softcap is not None
        raise UserError(
            "attention = 'splash' cannot keep the answers to a shared prompt apart with "
            + ("an attention_softcap" if capped else "a sliding_window shorter than a row")
            + f": choose attention = {'reference' if capped else 'xla'!r} for this stage"
        )
    return Rows(segment_ids, branch_ids)


def branch_codes(branch_ids: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns what keeps branches apart: [B, T, 2m] beside queries, the same beside keys.

    A branch's number has m bits, enough for as many branches as a row has tokens. A key says each
    bit and its opposite, a query −2²⁰ for each of them that its own branch hasn't. So their product
    is −2²⁰ times the number of bits in which the branches differ, and within a branch a sum of
    zeros, which no rounding changes. Keys of a shared prompt say nothing.
    """
    bits = (branch_ids.shape[1]).bit_length()
    ones = branch_ids[..., None] >> jnp.arange(bits) & 1
    said = jnp.concatenate([ones, 1 - ones], -1)
    key = said * (branch_ids > 0)[..., None]
    return (-_APART * (1 - said)).astype(dtype), key.astype(dtype)


def splash(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Rows,
    interpret: bool = False,
) -> jax.Array:
    """Attention of scaled queries: query [B, kv_heads, G, T, d] → the same shape.

    Args:
        key, value: [B, kv_heads, T, d]; the kernel reads a key head once for its G query heads.
        seen: from `visible_rows`.
        interpret: runs without a TPU, slowly.

    Returns:
        [B, kv_heads, G, T, d] in the dtype of `value`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    batch, kv_heads, groups, length, _ = query.shape
    heads = query.reshape(batch, kv_heads * groups, length, -1)
    if seen.branch_ids is not None:
        codes = branch_codes(seen.branch_ids, query.dtype)
        heads, key = (_beside(x, code) for x, code in zip((heads, key), codes, strict=True))
    padding = -length % _LANES
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (heads, key, value)]
    segments = None
    if seen.segment_ids is not None:
        padded = jnp.pad(seen.segment_ids, ((0, 0), (0, padding)))
        segments = kernels.SegmentIds(padded, padded)
    kernel = _kernel(config, kv_heads * groups, length, interpret)
    mixed = jax.vmap(lambda *arrays: kernel(*arrays[:3], segment_ids=arrays[3]))(*arrays, segments)
    return mixed[:, :, :length].astype(value.dtype).reshape(query.shape)


def _beside(x: jax.Array, code: jax.Array) -> jax.Array:
    """[B, H, T, d] and the same [B, T, c] for every head: [B, H, T, d + c].

    As a sum of both with zeros it is computed in one pass; of a concatenation a TPU's compiler
    writes the code of every head into memory first.
    """
    width = x.shape[-1]
    coded = jnp.pad(code, ((0, 0), (0, 0), (width, 0)))[:, None]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, code.shape[-1]))) + coded


def _kernel(config: ModelConfig, heads: int, length: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    whole = length + -length % _LANES
    block = next(size for size in (512, 256, _LANES) if whole % size == 0)
    mask: Any = masks.CausalMask((whole, whole))
    window = _window(config, length)
    if window is not None:
        # Tokens of a segment are as far apart in the row as their positions are.
        mask = masks.LocalMask((whole, whole), (window - 1, 0), 0)
    sizes: dict[str, Any] = {
        field.name: block
        for field in dataclasses.fields(kernels.BlockSizes)
        if field.name.startswith("block")
    }
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=config.attention_softcap,
        residual_checkpoint_name="attention",  # remat = "dots" keeps them
        interpret=interpret,
    )


def _window(config: ModelConfig, length: int) -> int | None:
    """The tokens that are visible back, if that is less than a row."""
    window = config.sliding_window if config.windowed[0] else None
    return window if window is not None and window < length else None
