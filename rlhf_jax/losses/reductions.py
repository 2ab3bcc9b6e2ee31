"""Sums with their weights: what losses return in place of means.

A reduction is a pair `(total, weight)` of scalars, total = Σ wᵢ·vᵢ and weight = Σ wᵢ. Reductions of
microbatches, devices and hosts add; the one division happens after the last addition, so how a
batch was split never changes the result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_rank, check_same_shape

Reduction = tuple[jax.Array, jax.Array]


def at_least_f32(*arrays: jax.Array) -> jnp.dtype:
    """The dtype to compute in: that of the arrays, but never under float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def weighted_sum(values: jax.Array, weights: jax.Array) -> Reduction:
    """(Σ wᵢ·vᵢ, Σ wᵢ) over all axes; a value of weight 0 is ignored, even a NaN.

    Args:
      values: any shape. weights: the same shape.

    Returns:
      (total, weight), scalars of at least float32.
    """
    check_same_shape(values=values, weights=weights)
    dtype = at_least_f32(values, weights)
    weights = weights.astype(dtype)
    values = jnp.where(weights != 0, values, 0).astype(dtype)
    return jnp.sum(values * weights), jnp.sum(weights)


def weighted_sums(
    values: dict[str, jax.Array], weights: jax.Array
) -> tuple[Reduction, dict[str, Reduction]]:
    """`weighted_sum` of each metric; the one named "loss" is also returned in front."""
    reductions = {name: weighted_sum(value, weights) for name, value in values.items()}
    return reductions["loss"], reductions


def keep_weighted(weights: jax.Array, *arrays: jax.Array | None) -> list[Any]:
    """Arrays in at least float32 with 0 where the weight is 0; None stays None.

    Losses call it before any arithmetic: a NaN masked later is still a NaN in the gradient.
    """
    return [
        None if x is None else jnp.where(weights != 0, x, 0).astype(at_least_f32(x)) for x in arrays
    ]


def segment_logprobs(
    logprobs: jax.Array, weights: jax.Array, sequences: jax.Array, num_sequences: int
) -> jax.Array:
    """Log-probability of each sequence of a packed row: lp[b,s] = Σ_m w[b,m]·logprobs[b,m]·[seq=s].

    A masked sum rather than a scatter: its order is fixed, so results repeat bitwise on any device.

    Args:
      logprobs: [B, M] nats. weights: [B, M], 0 = unused slot (ignored even if its log-prob is NaN).
      sequences: [B, M] integers in [0, num_sequences): the sequence of each slot.

    Returns:
      [B, num_sequences] nats, 0 for a sequence without slots.
    """
    check_rank("logprobs", logprobs, 2)
    check_same_shape(logprobs=logprobs, weights=weights, sequences=sequences)
    dtype = at_least_f32(logprobs, weights)
    values = jnp.where(weights != 0, logprobs, 0).astype(dtype) * weights.astype(dtype)
    member = sequences[:, :, None] == jnp.arange(num_sequences)
    return jnp.sum(jnp.where(member, values[:, :, None], 0), axis=1)


def mean(reduction: Reduction) -> jax.Array:
    """total / weight; 0 where the weight is 0, as in a batch without a single target."""
    total, weight = reduction
    empty = weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, weight))
