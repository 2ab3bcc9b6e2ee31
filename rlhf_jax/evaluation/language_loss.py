"""Held-out loss of a language model: nats per token, bits per byte, token accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.row_passes import map_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_statistics


def language_evaluation(
    config: ModelConfig, rows: Arrays, *, tokens: int, text_bytes: int | None = None
) -> Callable[[Any], tuple[dict[str, float], list[Any]]]:
    """Returns `evaluate(params) -> (metrics, [])` over held-out rows, compiled on first use.

    Args:
        rows: packed rows; only targets of weight > 0 count.
        tokens: of a forward pass.
        text_bytes: UTF-8 bytes of the text the targets stand for, for bits per byte.

    Returns:
        A function giving no figures, but eval/loss (nats per target token), eval/token_accuracy
        and, with `text_bytes`, eval/bpb = Σ nats / (ln 2 · bytes), which no vocabulary changes.
    """

    @jax.jit
    def per_row(params, batch):
        stats = target_statistics(config, params, batch)
        weights = batch["weights"]
        return {
            "nats": -(stats.logprobs * weights).sum(-1),
            "correct": (stats.correct * weights).sum(-1),
            "targets": weights.sum(-1),
        }

    def evaluate(params: Any) -> tuple[dict[str, float], list[Any]]:
        sums = jax.tree.map(
            lambda x: float(x.sum(dtype=np.float64)), map_rows(per_row, params, rows, tokens)
        )
        metrics = {
            "eval/loss": sums["nats"] / sums["targets"],
            "eval/token_accuracy": sums["correct"] / sums["targets"],
        }
        if text_bytes:
            metrics["eval/bpb"] = sums["nats"] / (np.log(2) * text_bytes)
        return metrics, []

    return evaluate
