"""Jitted functions over all rows of a packed data set, a fixed number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import eval_batches, pad_rows
from rlhf_jax.data.packing import Arrays
from rlhf_jax.global_arrays import to_host
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_logprobs
from rlhf_jax.models.sharding import batch_shards
from rlhf_jax.training.mesh import mesh_under, shard_batch
from rlhf_jax.training.progress import tracked

PLACES = 16  # of groups in a row: a multiple of so many, so that data sets share compiled code
_logprobs = jax.jit(sequence_logprobs, static_argnums=0)  # one, so that stages share it compiled


def rows_of(tokens: int, length: int) -> int:
    """How many rows of `length` tokens a pass over `tokens` takes, one at least."""
    return max(1, tokens // length)


def map_rows(
    function: Callable, params: Any, rows: Arrays, tokens: int, name: str = "evaluation"
) -> Any:
    """Results of `function(params, batch)` for every row of `rows`, concatenated on the host.

    A pass that takes long says under `name` how far it is. If the parameters lie on a mesh, each of
    its devices has as many of a batch's rows.

    Args:
      function: returns a pytree of arrays whose leading axis is the row.
      tokens: of a batch, all its rows on one device together.
    """
    count, length = rows["tokens"].shape
    mesh = mesh_under(params)
    shards = batch_shards(mesh)
    size = min(rows_of(tokens, length), -(-count // shards)) * shards
    batches = tracked(eval_batches(rows, size), name, -(-count // size))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        results = [to_host(function(params, shard_batch(mesh, b))) for b in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def response_logprobs(
    config: ModelConfig, params: Any, rows: Arrays, tokens: int, name: str = "evaluation"
) -> np.ndarray:
    """log π of every response of packed groups, summed over its tokens: [B, P, K] nats.

    `tokens` and `name` as for `map_rows`.
    """
    padded = pad_rows(rows, rows=1, slots=1, groups=PLACES)
    logprobs = map_rows(partial(_logprobs, config.forward), params, padded, tokens, name)
    return logprobs[:, : rows["last"].shape[1]]


def in_record_order(values: np.ndarray, rows: Arrays) -> np.ndarray:
    """Takes [B, P, K] values of packed groups to [N, K], ordered by `example_ids`."""
    real = rows["valid"] > 0
    return values[real][np.argsort(rows["example_ids"][real], kind="stable")]
