"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.config import option
from rlhf_jax.errors import NoRoom, Preempted, UserError
from rlhf_jax.malloc import give_back
from rlhf_jax.stopping import stop_asked, stop_point
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.mesh import shard_batch
from rlhf_jax.training.metrics import Means, fetch, read_metrics
from rlhf_jax.training.metrics_writer import MetricsWriter
from rlhf_jax.training.progress import Clock, Progress
from rlhf_jax.training.rundir import RunDirectory, fault_point
from rlhf_jax.training.state import release

# The squares of larger ones, summed over a batch, may overflow float32.
LARGEST_ADVANTAGE = 1e16


@dataclass(frozen=True)
class Train:
    """The training loop: the section `train` of a config."""

    steps: int = option(100, least=1)  # updates, or iterations of a stage that samples
    log_every: int = option(10, least=1)  # steps
    eval_every: int = option(0, least=0)  # steps; 0: only at the end
    # Written in the background; a step waits while its state is copied to the host.
    checkpoint_every: int = option(200, least=1)  # steps
    # Since the one before; 0: by steps alone.
    checkpoint_minutes: float = option(5.0, within="[0, inf)")
    max_skipped: int = option(5, least=1)  # updates in a row that are not finite before it stops
    tensorboard: bool = True  # also write metrics for TensorBoard
    wandb: str = ""  # project, to follow the run on Weights & Biases too


def is_evaluated(options: Train, step: int) -> bool:
    """Whether the loop evaluates the state after that step."""
    return step == options.steps or (options.eval_every > 0 and step % options.eval_every == 0)


@dataclass
class Loop:
    """Trains up to `options.steps` steps, from the newest checkpoint of the run if it has one.

    A line is written to metrics.jsonl for every step that is a multiple of `log_every`, is
    evaluated, or is the last. It holds `metrics.Means` of the steps since the line before, which
    checkpoints keep, so that it doesn't depend on where a run was interrupted; the evaluation of
    the state after the step; and under "time/" averages since the line before: tokens_per_second
    (padding not counted), step_seconds, data_share (the part of the time spent waiting for batches)
    and flops_per_second. Metrics are fetched one step late, so that the device never waits for the
    host.

    Checkpoints are written in the background: after steps that are a multiple of
    `checkpoint_every`, and after the first one that ends `checkpoint_minutes` after the checkpoint
    before. That of the last step is whole before anything is evaluated. An evaluation that was
    interrupted is done again, and so is the newest one if the run's evaluation is another since.

    Attributes:
      options: of the training loop.
      run: the held run directory.
      step: from `make_step`, or another that returns (state, metrics). A step that is several
        updates says how many as train/updates; val/… are its critic's metrics.
      batches: iterator of host batches with `get_state() -> JSON` and `set_state`.
      evaluation: a state → numbers to log. It must not keep the state: the next step donates it.
      mesh: of the step.
      clock: counts the tokens and the time of the steps.
      tokenizer_hash: kept in the checkpoints and compared on resume.
      ends: a function that takes the number of an evaluated step and says whether the run stops
        there.
    """

    options: Train
    run: RunDirectory
    step: Callable
    batches: Any
    evaluation: Callable[[Any], Mapping[str, float]]
    mesh: Mesh | None = None
    clock: Clock = field(default_factory=Clock)
    tokenizer_hash: str | None = None
    ends: Callable[[int], bool] = lambda step: False

    def train(self, state: Any) -> tuple[Any, dict[str, float]]:
        """Trains a state from `init_state`, or any tree a step maps to the next; it is donated.

        Returns:
          (state, rates): train/steps_per_second, train/tokens_per_second and
          train/flops_per_second of this process without its first step (compilation); empty when it
          took fewer than two.

        Raises:
          Preempted: SIGTERM or SIGINT. The current step is finished and saved, or, where it came to
            a `stop_point`, given up, and the one before is saved.
          NoRoom: the disk is full; the current step is finished, and saved if there is room.
          UserError: `max_skipped` updates in a row were skipped (it names the cause as far as the
            metrics tell it), the data ended early, or the checkpoint belongs to another tokenizer
            or model.
        """
        options, path = self.options, self.run.path
        self._guard = _Guard(self.step)
        with closing(Checkpoints(path / "checkpoints")) as self._checkpoints:
            self._state, done, means, unwritten = self._resume(state)
            has_line = hosts.by_first(lambda: _has_line(path / "metrics.jsonl", done))
            has_line |= any(line["step"] == done for line in unwritten)
            writer = MetricsWriter(
                path,
                done if has_line else max(0, done - 1),
                unwritten=unwritten,
                config=self.run.config,
                tensorboard=options.tensorboard,
                wandb=options.wandb,
            )
            progress = Progress(path.name, done, options.steps)
            log = Log(writer, self.clock, progress, means, options.max_skipped)
            with closing(log) as self._log:
                if has_line:
                    means.take()  # the checkpoint was begun before that line
                elif done and is_evaluated(options, done):
                    self._evaluate(done)
                self._saved_at, last = time.monotonic(), options.steps
                if done and is_evaluated(options, done) and self.ends(done):
                    last = done
                for number in range(done + 1, last + 1):
                    with self._saved_at_the_end(number - 1, self.batches.get_state()):
                        batch = self._next_batch(number)
                        rows = shard_batch(self.mesh, batch)
                        with self._guard.around(rows):
                            self._state, metrics = self.step(self._state, rows)
                    if number == done + 1:
                        give_back()  # what compiling took
                    self._finish_step(number, batch, metrics)
                    if is_evaluated(options, number) and self.ends(number):
                        last = number
                        self._save(number, self.batches.get_state(), wait=True)
                        break
                with self._saved_at_the_end(last, self.batches.get_state()):
                    pass
        return self._state, self.clock.rates()

    def _next_batch(self, number: int) -> Any:
        with self.clock.waiting():
            batch = next(self.batches, None)
        if batch is None:
            raise UserError(f"the data ended after {number - 1} of {self.options.steps} steps")
        return batch

    def _finish_step(self, number: int, batch: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Does what is due after a step: its line of metrics, a checkpoint, an evaluation."""
        fault_point("step", number)
        options = self.options
        last, evaluated = number == options.steps, is_evaluated(options, number)
        saved = last or self._is_save_due(number)
        line = not evaluated and (last or number % options.log_every == 0)
        self._log.add(
            number, metrics, self.clock.tokens(batch, metrics), batch.get("row_ids"), line
        )
        if evaluated or saved:
            jax.block_until_ready(metrics)
        if evaluated or saved or not any(isinstance(x, jax.Array) for x in metrics.values()):
            self._log.settle()  # a step that ends on the host has nothing to run ahead of
        if saved:
            self._save(number, self.batches.get_state(), wait=last)
            self._saved_at = time.monotonic()
        if evaluated:
            self._evaluate(number)

    def _is_save_due(self, number: int) -> bool:
        if number % self.options.checkpoint_every == 0:
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        due = 0 < self.options.checkpoint_minutes <= minutes and not self._checkpoints.writing
        return hosts.anyone("save", due or self._checkpoints.lacks_room)

    def _save(self, number: int, data: Mapping[str, Any], *, wait: bool) -> None:
        """Saves the state after that step; one that is saved already stays."""
        with self.clock.paused():
            self._log.writer.sync()
            self._checkpoints.save(number, self._state, data, self._meta(), wait=wait)

    @contextmanager
    def _saved_at_the_end(self, number: int, data: Mapping[str, Any]) -> Iterator[None]:
        """Saves the state after that step, if it is whole, should the run end in here."""
        try:
            stop_point(together=True)
            if hosts.anyone("full", self._log.full is not None):
                raise self._log.full or Preempted("another process has no room for its files")
            yield
        except (Preempted, UserError) as end:
            arrays = (x for x in jax.tree.leaves(self._state) if isinstance(x, jax.Array))
            if number and not any(x.is_deleted() for x in arrays):
                self._log.settle()
                self._save(number, data, wait=True)
            if stop_asked() and not isinstance(end, NoRoom):
                at = f"saved at step {number}" if number else "at its start"
                raise Preempted(
                    f"{self.run.path} is {at}; run the same command to continue"
                ) from end
            raise

    def _evaluate(self, number: int) -> None:
        with self._saved_at_the_end(number, self.batches.get_state()), self.clock.paused():
            fault_point("evaluation", number)
            evaluated = self.evaluation(self._state)
        self._log.write(number, evaluated)

    def _meta(self) -> dict[str, Any]:
        return meta(self.run, self._log, self.tokenizer_hash, self.run.wall_seconds())

    def _resume(self, state: Any) -> tuple[Any, int, Means, list[dict[str, Any]]]:
        """Returns (state, steps done, means, lines of metrics that are not in their file yet).

        They are the newest checkpoint's, or the given state and none.
        """
        restored = self._checkpoints.restore(state)
        if restored is None:
            return state, 0, Means(), []
        run, meta = self.run, restored.meta
        if meta.get("tokenizer_hash") != self.tokenizer_hash:
            raise UserError(
                f"the checkpoints in {run.path} are for tokenizer {meta.get('tokenizer_hash')}, "
                f"this is {self.tokenizer_hash}; use another --workdir"
            )
        release(state)  # the caller still holds what the restored one replaces
        try:
            self.batches.set_state(restored.data)
            run.earlier_seconds = float(meta["wall_seconds"])
            means = Means(meta.get("means"))  # older versions kept neither
            unwritten = list(meta.get("unwritten", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the data.json or meta.json of {run.path}'s checkpoint of step {meta['step']} is "
                f"not as this package writes it ({str(error)[:200]}); delete that checkpoint"
            ) from error
        print(f"{run.path}: continuing after step {meta['step']}", flush=True)
        return restored.state, meta["step"], means, unwritten


def meta(run: RunDirectory, log: Log, tokenizer: str | None, seconds: float) -> dict[str, Any]:
    """The document that a checkpoint keeps beside the state, with which a run goes on."""
    return {
        "means": log.means.state(),
        "unwritten": list(log.writer.unwritten),
        "config": run.config,
        "tokenizer_hash": tokenizer,
        "wall_seconds": seconds,
    }


def _has_line(path: Path, step: int) -> bool:
    return any(line["step"] == step for line in read_metrics(path))


class Log:
    """Takes each step's metrics when the next step is on its way, so that nothing waits."""

    def __init__(
        self,
        writer: MetricsWriter,
        clock: Clock,
        progress: Progress,
        means: Means,
        max_skipped: int,
    ):
        self.writer, self.means = writer, means
        self._clock, self._progress, self._max_skipped = clock, progress, max_skipped
        self._rows: deque[tuple[int, Any]] = deque(maxlen=max_skipped + 1)
        self._late: tuple[int, dict[str, jax.Array], int, bool] | None = None
        self._moved = 0.0  # ‖update‖ / ‖parameters‖ of the newest step that moved them
        self.full: NoRoom | None = None  # set while a line is unwritten

    def add(self, number: int, metrics, tokens: int, rows, has_line: bool) -> None:
        """Takes a step that was just dispatched, and settles the one before."""
        self.settle()
        self._late = number, metrics, tokens, has_line
        self._rows.append((number, rows))

    def settle(self) -> None:
        """Waits for the newest step and writes its line, if any; ends a run that only skips."""
        if self._late is None:
            return
        (number, metrics, tokens, has_line), self._late = self._late, None
        values, weights = fetch(metrics)
        self._clock.settled(tokens)
        for model in ("train", "val"):
            skipped = values.get(f"{model}/consecutive_skipped", 0.0)
            if skipped >= self._max_skipped:
                first = max(1, number - math.ceil(skipped / values.get("train/updates", 1.0)) + 1)
                rows = {n: np.asarray(ids).tolist() for n, ids in self._rows if n >= first}
                what = "the parameters" if model == "train" else "the critic's"
                raise UserError(
                    f"steps {first} to {number} end in {skipped:.0f} skipped updates, which left "
                    f"{what} as they were: {_cause(values, model, self._moved, rows)}"
                )
        if update := values.get("train/update_norm"):
            self._moved = update / (values["train/param_norm"] or update)
        self.means.add(values, weights)
        if has_line:
            self.write(number, {})

    def write(self, number: int, evaluated: Mapping[str, float]) -> None:
        """Writes the line of a step that is settled."""
        line = {**self.means.take(), **evaluated, **self._clock.line()}
        try:
            self.writer.write(number, line)
        except NoRoom as full:  # the step that is on its way is still worth saving
            self.full = full
        self._progress.show(number, line)

    def close(self) -> None:
        self._progress.close()
        self.writer.close()


def _cause(values: Mapping[str, float], model: str, moved: float, rows: Mapping[int, Any]) -> str:
    """Says why the last step's updates were skipped (see `make_step`), and what to look at.

    Args:
      values: the step's metrics.
      model: "train", or "val" for the critic.
      moved: ‖update‖ / ‖parameters‖ of the newest step that moved them.
      rows: the data's row_ids, by step.
    """
    loss = values.get("train/loss" if model == "train" else "loss/value_avg")
    rate = ("optimizer" if model == "train" else "critic") + ".learning_rate"
    look = f"Look at these row_ids of the data, by step: {rows}"
    if loss is None or values.get("train/weight", 1) <= 0:
        names = (
            *("rewards/failures", "tools/failures", "completions/masked"),
            *("rollout/zero_std_groups", "pairs/tied"),
        )
        told = ", ".join(f"{name} = {values[name]:g}" for name in names if name in values)
        return f"nothing in them has weight{told and f' ({told})'}. {look}"
    largest, kl = values.get("advantages/max", 0.0), values.get("objective/kl", 0.0)
    if math.isfinite(kl) and not largest < LARGEST_ADVANTAGE:
        return (
            f"advantages of {largest:.2g} are too large for float32. Look at the scores "
            f"(objective/scores = {values['objective/scores']:.2g}), at what rollout takes off "
            "them, and at kl.coefficient"
        )
    if math.isfinite(loss) and math.isfinite(values.get(f"{model}/grad_norm", 0.0)):
        return f"loss and gradient are finite, the update is not. Lower {rate}"
    text = f"{'the gradient' if math.isfinite(loss) else 'the loss'} is not finite"
    if model == "train" and moved > 0.9:
        return f"{text} since an update as large as the parameters. Lower {rate}"
    return f"{text}. {look}"


class _Guard:
    """Sees to it that a step, if it is one compiled function, moves nothing and compiles once.

    State and batch are on the device already, so an implicit transfer is a mistake, and an error. A
    second compilation for a batch of the same shapes prints a warning.
    """

    def __init__(self, step: Any):
        compiled = getattr(step, "func", step)  # under a partial
        # None: the step is not one function, but a Python one of several.
        self._cache_size: Callable[[], int] | None = getattr(compiled, "_cache_size", None)
        self._seen: set[tuple] = set()

    @contextmanager
    def around(self, batch: Mapping[str, jax.Array]) -> Iterator[None]:
        """Guards a step on that batch, which is taken inside."""
        if self._cache_size is None:
            yield
            return
        before = self._cache_size()
        with jax.transfer_guard("disallow"):
            yield
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
        if shapes in self._seen and self._cache_size() > before:
            print(f"warning: the step was compiled again for batch shapes {shapes}", flush=True)
        self._seen.add(shapes)
