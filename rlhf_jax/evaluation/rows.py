"""Jitted functions over all rows of a packed data set, a fixed number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.data.pipeline import eval_batches
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_logprobs

_logprobs = jax.jit(sequence_logprobs, static_argnums=0)  # one, so that stages share it compiled


def map_rows(function: Callable, params: Any, rows: Arrays, batch_rows: int) -> Any:
    """Results of `function(params, batch)` for every row of `rows`, concatenated on the host.

    `function` returns a pytree of arrays whose leading axis is the row.
    """
    count = len(rows["row_ids"])
    batches = eval_batches(rows, min(batch_rows, count))
    results = [jax.device_get(function(params, batch)) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def response_logprobs(
    config: ModelConfig, params: Any, rows: Arrays, batch_rows: int
) -> np.ndarray:
    """log π of every response of packed groups, summed over its tokens: [B, P, K] nats."""
    return map_rows(partial(_logprobs, config), params, rows, batch_rows)


def in_record_order(values: np.ndarray, rows: Arrays) -> np.ndarray:
    """Takes [B, P, K] values of packed groups to [N, K], ordered by `example_ids`."""
    real = rows["valid"] > 0
    return values[real][np.argsort(rows["example_ids"][real], kind="stable")]
