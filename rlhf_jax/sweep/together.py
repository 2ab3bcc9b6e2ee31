"""Runs that differ in their seed, trained as one program and finished as the runs that they are.

    python -m rlhf_jax.sweep.together --workdir=DIR -- FLAGS -- FLAGS …

has the flags of `rlhf_jax.main` for each run, and a directory whose lock it holds. The step is that
of one run under `jax.vmap`, over states and batches with an axis [runs] before their own, so that
each is trained as by itself but for rounding. It leaves in each run's directory what that would
have left there after its last step, a checkpoint and lines of metrics. From there each goes on as a
run does that was stopped, in this process, so that what is compiled for one serves all.

A run that has a checkpoint already goes on from that one. A run that skips so many updates that it
would end gets none: it is trained by itself, and says why it ends.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import main as command
from rlhf_jax.cache import keep_compilations
from rlhf_jax.commands import show_warnings
from rlhf_jax.config import Config, document, section_document
from rlhf_jax.devices import split_cores
from rlhf_jax.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, Preempted, UserError
from rlhf_jax.files import tolerate_full_logs
from rlhf_jax.malloc import tune_collector, tune_malloc
from rlhf_jax.stages.chain import prepare
from rlhf_jax.stages.defaults import module_of
from rlhf_jax.stages.fit import Training, settled_steps
from rlhf_jax.stages.identity import made_from
from rlhf_jax.stages.start import load_start
from rlhf_jax.stopping import listen, stop_point
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.loop import Log, meta
from rlhf_jax.training.mesh import mesh_of
from rlhf_jax.training.metrics import Means, Metrics
from rlhf_jax.training.metrics_writer import MetricsWriter
from rlhf_jax.training.progress import Clock, Progress, count_tokens
from rlhf_jax.training.run_lock import acquire
from rlhf_jax.training.rundir import SUMMARY, RunDirectory

STAGES = ("sft", "preference", "reward")  # whose steps neither sample nor draw


def check(config: Config) -> None:
    """UserError if runs of a prepared config cannot be trained together."""
    if config.stage not in STAGES:
        raise UserError(f"--vmap-seeds is for the stages {', '.join(STAGES)}, not {config.stage}")
    if config.train.eval_every:
        raise UserError("--vmap-seeds evaluates nothing on the way: set train.eval_every=0")


@dataclass
class _Run:
    """A run that is trained with others; `log` is None where nothing of it is kept."""

    training: Training
    learner: Learner
    options: Any  # of the training loop
    held: RunDirectory
    log: Log | None = None

    def take(self, *step: Any) -> None:
        """Hands a step to the log; without one lets the log settle the last."""
        if self.log is None:
            return
        try:
            if step:
                self.log.add(*step)
            else:
                self.log.settle()
        except UserError as error:
            print(f"{self.held.path} is trained by itself: {error}", flush=True)
            self.log = None


def train(lines: Sequence[Sequence[str]]) -> None:
    """Trains the runs of some flags of `rlhf_jax.main` to the end of their last step.

    Raises:
        UserError: they cannot be trained together, or at all.
        Preempted: a stop was asked for; nothing is kept.
    """
    began = time.monotonic()
    parsed = [command.parse([*line]) for line in lines]
    if all(_is_trained(Path(values.workdir)) for *_, values in parsed):
        return
    runs = [_prepared(prepare(given, stated), values) for given, _, stated, values in parsed]
    with ExitStack() as stack:
        for run in runs:
            if not _is_trained(run.held.path):
                stack.enter_context(run.held)
                run.log = stack.enter_context(closing(_log(run)))
        state = _take_steps(runs)
        seconds = (time.monotonic() - began) / len(runs)
        for i, run in enumerate(runs):
            if run.log is not None:
                _save(run, run.log, jax.tree.map(lambda x, i=i: x[i], state), seconds)


def _is_trained(directory: Path) -> bool:
    """Whether a run has a checkpoint, or is finished."""
    checkpoints = (directory / "checkpoints").glob("*")
    return (directory / SUMMARY).exists() or any(path.name.isdecimal() for path in checkpoints)


def _prepared(config: Config, values: Any) -> _Run:
    """A run before its first step, whose directory is not held yet."""
    check(config)
    if mesh_of(config) is not None:
        raise UserError("--vmap-seeds trains on one device")
    named = section_document(config, "init")
    parents = {role: Path(parent) for role, parent in named.items() if parent}
    origin = made_from(config, parents)
    held = RunDirectory(values.workdir, document(config), origin, rerun=values.rerun)
    stage = importlib.import_module(module_of(config.stage))
    training = stage.training(config, load_start(config, parents["policy"]), parents)
    options = settled_steps(config, training.batches.epoch)
    learner = make_learner(
        config, config.optimizer, training.model.params, training.loss_fn,
        updates=options.steps, ema_decay=config.train.ema_decay,
    )  # fmt: skip
    return _Run(training, learner, options, held)


def _log(run: _Run) -> Log:
    path, options = run.held.path, run.options
    writer = MetricsWriter(
        path, 0, config=run.held.config, tensorboard=options.tensorboard, wandb=options.wandb
    )
    clock = Clock(run.training.model.flops_per_token())
    progress = Progress(path.name, 0, options.steps)
    return Log(writer, clock, progress, Means(), options.max_skipped)


def _take_steps(runs: Sequence[_Run]) -> Any:
    """Takes every step of all runs; returns their states, with an axis [runs] before their own."""
    steps, every = runs[0].options.steps, runs[0].options.log_every
    step = jax.jit(jax.vmap(runs[0].learner.step), donate_argnums=0)
    state = jax.tree.map(lambda *each: jnp.stack(each), *(run.learner.init() for run in runs))
    for number in range(1, steps + 1):
        stop_point()
        batches = [next(run.training.batches.iterator) for run in runs]
        state, metrics = step(state, jax.tree.map(lambda *rows: np.stack(rows), *batches))
        has_line = number % every == 0 and number < steps
        for i, (run, batch) in enumerate(zip(runs, batches, strict=True)):
            own = Metrics(metrics, metrics.packed[i])
            run.take(number, own, count_tokens(batch, own), batch.get("row_ids"), has_line)
    for run in runs:
        run.take()
    return state


def _save(run: _Run, log: Log, state: Any, seconds: float) -> None:
    """Writes the checkpoint of a run after its last step, whose line is that of its evaluation."""
    tokenizer, data = run.training.model.tokenizer.hash, run.training.batches.iterator.get_state()
    log.writer.sync()
    with closing(Checkpoints(run.held.path / "checkpoints")) as checkpoints:
        document = meta(run.held, log, tokenizer, seconds)
        checkpoints.save(run.options.steps, state, data, document, wait=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and finishes the runs of a command line and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    (own,), *lines = (
        [*words] for is_end, words in groupby(argv, lambda word: word == "--") if not is_end
    )
    directory = Path(own.removeprefix("--workdir="))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        acquire(directory / "lock")  # to this process's end
        train(lines)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except Preempted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return EXIT_RESUMABLE
    for line in lines:
        sys.argv[1:] = line  # which its summary names
        if command.main(line) == EXIT_RESUMABLE:
            return EXIT_RESUMABLE
    return EXIT_DONE


if __name__ == "__main__":
    tune_malloc()
    tune_collector()
    listen()
    tolerate_full_logs()
    show_warnings()
    split_cores()
    keep_compilations()
    sys.exit(main())
