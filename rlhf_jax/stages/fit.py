"""How a stage trains a model: rows to batches, and a loss handed to the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.batches import make_dataset, make_iterator
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.encode import encode_texts
from rlhf_jax.data.packing import Arrays, check_ids, pack_documents
from rlhf_jax.data.records import Text
from rlhf_jax.models.lora import has_adapter
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.loop import Loop
from rlhf_jax.training.mesh import mesh_of, placed
from rlhf_jax.training.progress import Clock
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model
from rlhf_jax.training.state import release

Figure = dict[str, Any]  # what `report.plots.draw` draws
Evaluated = tuple[dict[str, float], list[Figure]]


def pack_texts(
    config: Config, what: str, records: Sequence[Text], tokenizer: Tokenizer, over_long: str
) -> Arrays:
    """Raw text as packed rows in which every token is a target; says what became of the records."""
    documents, counts = encode_texts(
        records, tokenizer, config.data.row_length, over_long=over_long
    )
    rows, packing = pack_documents(documents, config.data.row_length)
    console.say_encoded(config, what, counts, packing)
    return rows


def batches_of(config: Config, model: Model, rows: Sequence[Arrays], weights: Sequence[float]):
    """An endless iterator of batches over the packed rows of each source, mixed by weight."""
    for arrays in rows:
        check_ids(arrays, model.config.vocab_size)
    mixed = weights if len(rows) > 1 else None
    return make_iterator(make_dataset(rows, config.batch.rows, seed=config.seed, weights=mixed))


def fit(
    config: Config,
    run: RunDirectory,
    model: Model,
    loss_fn: Callable,
    batches: Any,
    evaluate: Callable[[Any], Evaluated],
    *,
    keeps_start: bool = False,
) -> tuple[Model, dict[str, float], list[Figure]]:
    """Trains the model; returns (it, its evaluation's metrics and the loop's rates, its figures).

    The parameters of `model` are gone afterwards: training holds one copy, the one it changes.
    `keeps_start` lets them live. Under an adapter they do anyway, since what is frozen is shared.

    Args:
        loss_fn: (params, batch, rng) → ((total, weight), metrics).
        batches: an iterator of host batches whose state can be saved.
        evaluate: params → (metrics, figures), every `train.eval_every` steps and at the end.
    """
    mesh = mesh_of(config)
    start = placed(mesh, model.params)
    learner = make_learner(
        config,
        config.optimizer,
        start,
        loss_fn,
        updates=config.train.steps,
        mesh=mesh,
        ema_decay=config.train.ema_decay,
    )
    newest: Evaluated | None = None

    def evaluation(state):
        nonlocal newest
        newest = evaluate(learner.params(state))
        return newest[0]

    state = learner.init()
    if not keeps_start and not has_adapter(start):
        release((model.params, start))
    loop = Loop(
        config.train,
        run,
        learner.step,
        batches,
        evaluation,
        mesh=mesh,
        clock=Clock(model.flops_per_token()),
        tokenizer_hash=model.tokenizer.hash,
    )
    state, rates = loop.train(state)
    # None where the run was interrupted after its last evaluation.
    metrics, figures = newest or evaluate(learner.params(state))
    trained = dataclasses.replace(model, params=learner.params(state), normalization=None)
    return trained, metrics | rates, figures
