"""How a stage trains a model: rows to batches, and a loss handed to the training loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rlhf_jax import console, hosts
from rlhf_jax.config import Config
from rlhf_jax.data.batches import make_dataset, make_iterator
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.encode import Stats, encode_texts
from rlhf_jax.data.packing import Arrays, check_ids, pack_documents
from rlhf_jax.data.records import Text
from rlhf_jax.devices import training_devices
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.evaluation.before_after import Evaluated, Measured, changes, from_json, to_json
from rlhf_jax.files import check_fields, read_object, write_json
from rlhf_jax.models.lora import has_adapter, param_count, split
from rlhf_jax.training.best import Best
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.loop import Loop
from rlhf_jax.training.mesh import mesh_of, placed
from rlhf_jax.training.progress import Clock
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, load_like, save_model
from rlhf_jax.training.state import release
from rlhf_jax.trees import matches, named_leaves

Figure = dict[str, Any]  # what `report.plots.draw` draws


class Batches(NamedTuple):
    """Batches without end, and the rows of each source that they are drawn from by weight."""

    iterator: Any
    rows: Mapping[str, int]
    weights: Sequence[float]

    @property
    def epoch(self) -> int:
        """The rows of all sources together."""
        return sum(self.rows.values())


def pack_texts(
    config: Config, what: str, records: Sequence[Text], tokenizer: Tokenizer, over_long: str
) -> tuple[Arrays, Stats]:
    """Raw text as packed rows in which every token is a target, and the counts of `encode_texts`.

    Says what became of the records.
    """
    documents, counts = encode_texts(
        records, tokenizer, config.data.row_length, over_long=over_long
    )
    rows, packing = pack_documents(documents, config.data.row_length)
    console.say_encoded(config, what, counts, packing)
    return rows, counts


def batches_of(
    config: Config, model: Model, rows: Mapping[str, Arrays], weights: Sequence[float]
) -> Batches:
    """Batches over the packed rows of each source, mixed by weight."""
    for arrays in rows.values():
        check_ids(arrays, model.config.vocab_size)
    mixed = weights if len(rows) > 1 else None
    dataset = make_dataset([*rows.values()], config.batch.rows, seed=config.seed, weights=mixed)
    counts = {name: len(arrays["tokens"]) for name, arrays in rows.items()}
    return Batches(make_iterator(dataset), counts, weights)


class Training(NamedTuple):
    """What `fit` trains, by which loss and on which batches: its arguments of these names."""

    model: Model
    loss_fn: Callable
    batches: Batches


def fit(
    config: Config,
    run: RunDirectory,
    model: Model,
    loss_fn: Callable,
    batches: Batches,
    evaluate: Callable[[Any], Evaluated],
    *,
    before: Callable[[Any], Measured] | None = None,
    keeps_start: bool = False,
) -> tuple[Model, dict[str, float], list[Figure]]:
    """Trains the model; returns (it, its evaluation's metrics and the loop's rates, its figures).

    The parameters of `model` are gone afterwards: training holds one copy, the one it changes.
    `keeps_start` lets them live. Under an adapter they do anyway, since what is frozen is shared.

    Args:
        loss_fn: (params, batch, rng) → ((total, weight), metrics).
        batches: see `batches_of`.
        evaluate: of params, every `train.eval_every` steps and at the end.
        before: what is to be compared of `evaluate` of the params that training starts from; None
            for what starts from nothing.
    """
    mesh = mesh_of(config)
    start = placed(mesh, model.params)
    options = settled_steps(config, batches.epoch)
    say_start(config, start, mesh, batches, options.steps)
    started = from_json(kept_before(run, lambda: to_json(before(start)))) if before else {}
    learner = make_learner(
        config, config.optimizer, start, loss_fn,
        updates=options.steps, mesh=mesh, ema_decay=config.train.ema_decay,
    )  # fmt: skip
    newest: Evaluated | None = None
    best = Best(run.path, options.best, options.patience)

    def evaluation(state):
        nonlocal newest
        newest = evaluate(learner.params(state))
        if best.is_found(int(state.step), newest.metrics):
            save_model(best.path, dataclasses.replace(model, params=learner.params(state)))
        return newest.metrics

    state = learner.init()
    if not keeps_start and not has_adapter(start):
        release((model.params, start))
    loop = Loop(
        options, run, learner.step, batches.iterator, evaluation, mesh=mesh,
        clock=Clock(model.flops_per_token()), tokenizer_hash=model.tokenizer.hash, ends=best.ends,
    )  # fmt: skip
    state, rates = loop.train(state)
    params = learner.params(state)
    if options.best:
        params, newest = load_like(config, best.path).params, None
        rates |= best.tell()
    # None where the run was interrupted after its last evaluation, too.
    metrics, figures, values = newest or evaluate(params)
    trained = dataclasses.replace(model, params=params, normalization=None)
    return trained, metrics | rates | changes(started, values, config.seed), figures


def settled_steps(config: Config, epoch: int) -> Any:
    """The options of the loop, with the steps that `train.epochs` are if it is set."""
    options = config.train
    if not options.epochs:
        return options
    return dataclasses.replace(options, steps=math.ceil(options.epochs * epoch / config.batch.rows))


def say_start(config: Config, params: Any, mesh: Mesh | None, batches: Batches, steps: int) -> None:
    """Prints on what a run trains, how much of the model, and how far its steps carry."""
    rows, length = config.batch.rows, config.data.row_length
    say_devices(config, params, mesh)
    drawn = steps * rows / sum(batches.weights)
    shares = zip(batches.rows.items(), batches.weights, strict=True)
    epochs = ", ".join(
        f"{drawn * weight / count:.3g} epochs of {count:,} rows{f' of {name}' if name else ''}"
        for (name, count), weight in shares
    )
    print(
        f"a step is {rows} rows of {length} tokens, {rows * length:,} together; {steps:,} steps "
        f"are {epochs}",
        flush=True,
    )


def say_devices(config: Config, params: Any, mesh: Mesh | None) -> None:
    """Prints the devices, the mesh, and how many of the parameters are trained.

    Raises:
        UserError: optimizer.freeze is of no parameter, or leaves none to train.
    """
    devices = training_devices()
    where = f"{len(devices)} × {devices[0].device_kind}"
    if mesh is not None:
        where += f" ({', '.join(f'{name} {size}' for name, size in mesh.shape.items())})"
    leaves, frozen = named_leaves(split(params)[0]), config.optimizer.freeze
    trained = sum(x.size for name, x in leaves.items() if not matches(name, frozen))
    names = named_leaves(params)
    for pattern in frozen:
        if not any(matches(name, [pattern]) for name in names):
            hint = nearest(pattern, sorted({part for name in names for part in name.split("/")}))
            raise UserError(
                f"config: optimizer.freeze: {pattern!r} is in no parameter's name; did you mean "
                f"{hint!r}? A name is like {min(names)}"
            )
    if not trained:
        raise UserError(f"config: optimizer.freeze={frozen!r} leaves nothing to train")
    whole = param_count(params) + sum(x.size for name, x in leaves.items() if "/lora/" in name)
    print(f"training on {where}: {trained:,} of {whole:,} parameters", flush=True)


def kept_before(run: RunDirectory, make: Callable[[], Any]) -> Any:
    """The JSON that `make` returns, kept in before.json for the next process of the same run."""
    path = run.path / "before.json"

    def read() -> Any:
        if not path.exists():
            return {}
        before = read_object(path)
        check_fields(path, before, {"config_hash": str, "measured": dict})
        return before

    before = hosts.by_first(read)
    if before.get("config_hash") != run.config_hash:
        before = {"config_hash": run.config_hash, "measured": make()}
        write_json(path, before)
    return before["measured"]
