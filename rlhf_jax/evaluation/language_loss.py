"""Held-out loss of a language model: nats per token, bits per byte, token accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.before_after import Evaluated, Values
from rlhf_jax.evaluation.row_passes import map_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_statistics


def language_evaluation(
    config: ModelConfig, rows: Arrays, *, tokens: int, text_bytes: int | None = None
) -> Callable[[Any], Evaluated]:
    """Returns `evaluate(params)` over held-out rows, compiled on first use.

    Args:
        rows: packed rows; only targets of weight > 0 count.
        tokens: of a forward pass.
        text_bytes: UTF-8 bytes of the text the targets stand for, for bits per byte.

    Returns:
        A function giving no figures; eval/loss (nats per target token), eval/token_accuracy
        and, with `text_bytes`, eval/bpb = Σ nats / (ln 2 · bytes), which no vocabulary changes;
        and loss and token_accuracy by document.
    """
    places = np.take_along_axis(rows["segment_ids"], rows["sources"], axis=1)
    longest = int(places.max()) + 1
    documents = places + longest * np.arange(len(places))[:, None]  # of each target, by number

    @jax.jit
    def per_row(params, batch):
        stats = target_statistics(config, params, batch)
        weights = batch["weights"]
        return -stats.logprobs * weights, stats.correct * weights, weights

    def evaluate(params: Any) -> Evaluated:
        parts = map_rows(per_row, params, rows, tokens)
        nats, correct, targets = (np.bincount(documents.ravel(), x.ravel()) for x in parts)
        there = targets > 0
        values = {
            "loss": Values.of(nats[there], targets[there]),
            "token_accuracy": Values.of(correct[there], targets[there]),
        }
        metrics = {f"eval/{name}": each.mean for name, each in values.items()}
        if text_bytes:
            metrics["eval/bpb"] = float(nats.sum() / (np.log(2) * text_bytes))
        return Evaluated(metrics, [], values)

    return evaluate
