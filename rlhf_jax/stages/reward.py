"""Reward modelling: a chat model and preference pairs → a scalar score of (prompt, response).

The score is read at the response's last token and trained with the Bradley–Terry loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.preferences import preference_metrics, preference_plots
from rlhf_jax.evaluation.rows import in_record_order, map_rows
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.stages.common import Evaluated, batches_of, fit, parse_sources, write_evaluation
from rlhf_jax.stages.pairs import CHOSEN, REJECTED, pack_pairs
from rlhf_jax.training.model import Model, load_model, save_model
from rlhf_jax.training.rundir import RunDirectory


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Trains a reward model on the body of `init.policy`; returns the metrics of summary.json."""
    initial = with_score_head(load_model(parents["policy"], **config.compute), config.seed)
    sources = parse_sources(config.data.train)
    pack = partial(pack_pairs, config, tokenizer=initial.tokenizer)
    rows = [pack(source, "train") for source in sources]
    held_out = pack(config.data.validation, "validation")
    score = jax.jit(partial(sequence_scores, initial.config))

    def evaluate(params: Any) -> Evaluated:
        scores = map_rows(score, params, held_out, config.eval.batch_rows)
        return score_metrics(scores, held_out)

    batches = batches_of(config, initial, rows, [*sources.values()])
    loss_fn = partial(loss, config, initial.config)
    model, metrics, plots = fit(config, run, initial, loss_fn, batches, evaluate)
    save_model(run.path, model)
    write_evaluation(run.path, plots=plots)
    return metrics


def with_score_head(model: Model, seed: int) -> Model:
    """The same body under a fresh scalar head."""
    shape = dataclasses.replace(model.config, head="scalar")
    fresh = transformer.init(shape, jax.random.key(seed))
    params = {name: model.params.get(name, value) for name, value in fresh.items()}
    return Model(shape, params, model.tokenizer)


def loss(config: ConfigDict, shape: ModelConfig, params: Any, batch, rng):
    """Bradley–Terry over a batch of pairs: ((total, weight), metrics)."""
    scores = sequence_scores(shape, params, batch)
    scores = scores.reshape(-1, scores.shape[-1])
    return bradley_terry(
        scores[:, CHOSEN],
        scores[:, REJECTED],
        batch["valid"].reshape(-1),
        centering=config.loss.centering,
    )


def score_metrics(scores: np.ndarray, rows: Arrays) -> Evaluated:
    """(metrics, plots) of scores [B, P, 2] on held-out pairs."""
    ordered = in_record_order(scores, rows)
    lengths = in_record_order(rows["lengths"], rows)
    chosen, rejected = ordered[:, CHOSEN], ordered[:, REJECTED]
    metrics = preference_metrics(chosen, rejected, lengths)
    metrics |= {"eval/score_mean": float(ordered.mean()), "eval/score_std": float(ordered.std())}
    return metrics, preference_plots(chosen, rejected, lengths)
