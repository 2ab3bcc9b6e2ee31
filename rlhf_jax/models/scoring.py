"""A model's log-probs, scores and values of a packed batch: what trains, scores and evaluates.

Every stage gets its log-probs and scores here, so the ratio of a policy to itself is 1 exactly. On
a mesh each device computes them for its own rows: see `sharding.by_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses.cross_entropy import (
    TokenStatistics,
    Words,
    cross_entropy,
    token_statistics,
)
from rlhf_jax.losses.reductions import Reduction, segment_logprobs
from rlhf_jax.losses.shaping import exact_kl
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.sharding import FSDP, Shard, by_rows, split_words
from rlhf_jax.models.transformer import apply, logits, scores, unembedding

Batch = Mapping[str, Any]  # of arrays


def _hidden(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
    return apply(
        config,
        params,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        branch_ids=batch.get("branch_ids"),
    ).hidden


def _target_hidden(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
    """[B, M, width]: the states that predict the targets."""
    hidden = _hidden(config, params, batch)
    return jnp.take_along_axis(hidden, batch["sources"][..., None], axis=1)


def _unembedding(config: ModelConfig, params: Any) -> tuple[jax.Array, Words]:
    """The unembedding in the compute dtype, and how the losses are to read it.

    One that lies in parts is split by words: each device has its words' logits of all tokens.
    """
    table, layout = unembedding(config, params)
    if not isinstance(table, Shard):
        return table.astype(config.compute_dtype), Words(layout, config.unused)
    mine = split_words(table, -2 if layout == "vd" else -1, config.compute_dtype)
    count = mine.size // config.width * jax.lax.axis_size(FSDP)
    added = ((config.vocab_size, count),) if count > config.vocab_size else ()
    return mine, Words(layout, (*config.unused, *added), FSDP)


@by_rows
def target_statistics(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    *,
    temperature: float = 1.0,
    bias: jax.Array | None = None,
) -> TokenStatistics:
    """Returns log-probs (nats, f32) and what a loss needs beside them for each target of a batch.

    Args:
        batch: packed rows; hidden state `sources[b, m]` of row b predicts token `targets[b, m]`.
        temperature: the sampling temperature the log-probs are meant at.
        bias: [vocab_size] added to the logits; −1e9 where a token could not be drawn.

    Returns:
        TokenStatistics of [B, M] arrays; unused slots (weight 0) hold finite numbers.
    """
    hidden = _target_hidden(config, params, batch)
    table, words = _unembedding(config, params)
    if bias is not None and words.axis is not None:
        mine = words.ids(table.size // config.width)
        bias = jnp.take(bias, mine, mode="fill", fill_value=0)
    return token_statistics(
        hidden,
        table,
        batch["targets"],
        bias=bias,
        temperature=temperature,
        softcap=config.logit_softcap,
        words=words,
    )


@partial(by_rows, summed=True)
def target_cross_entropy(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Reduction, dict[str, Reduction]]:
    """Returns the cross-entropy of a batch's targets and its metrics, as `cross_entropy` does."""
    hidden = _target_hidden(config, params, batch)
    table, words = _unembedding(config, params)
    return cross_entropy(
        hidden,
        table,
        batch["targets"],
        batch["weights"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=config.logit_softcap,
        words=words,
    )


def sequence_logprobs(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
    """log π(response | prompt) of every branch, summed over its tokens and EOS: [B, P, K] nats."""
    logprobs = target_statistics(config, params, batch).logprobs
    rows, groups, branches = batch["last"].shape
    summed = segment_logprobs(logprobs, batch["weights"], batch["sequences"], groups * branches)
    return summed.reshape(rows, groups, branches)


@by_rows
def sequence_scores(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
    """The scalar head's score of every branch, read at its last token: [B, P, K] f32."""
    hidden = _hidden(config, params, batch)
    rows, groups, branches = batch["last"].shape
    last = batch["last"].reshape(rows, groups * branches, 1)
    return scores(config, params, jnp.take_along_axis(hidden, last, axis=1)).reshape(
        rows, groups, branches
    )


@by_rows
def target_values(config: ModelConfig, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """A critic's values of the state before each target [B, M], and after each branch [B, P·K].

    The state before a token is the hidden state that predicts it.
    """
    hidden = _hidden(config, params, batch)
    before = jnp.take_along_axis(hidden, batch["sources"][..., None], axis=1)
    last = batch["last"].reshape(len(hidden), -1, 1)
    after = jnp.take_along_axis(hidden, last, axis=1)
    return scores(config, params, before), scores(config, params, after)


@by_rows
def target_kl(
    config: ModelConfig, params: Any, reference: Any, batch: Batch, *, temperature: float = 1.0
) -> jax.Array:
    """KL of the whole next-token distributions at every target: [B, M] nats.

    It holds all B·M·V logits at once: use it for a few rows.
    """

    def at_targets(params):
        every = logits(config, params, _target_hidden(config, params, batch)) / temperature
        return jnp.where(config.words, every, -jnp.inf) if config.unused else every

    return exact_kl(at_targets(params), at_targets(reference))
