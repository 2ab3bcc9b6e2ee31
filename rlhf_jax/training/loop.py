"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import Preempted, UserError
from rlhf_jax.malloc import give_back
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.mesh import shard_batch
from rlhf_jax.training.metrics import Means, MetricsWriter, fetch
from rlhf_jax.training.progress import Clock, Progress
from rlhf_jax.training.rundir import RunDirectory, fault_point
from rlhf_jax.training.state import release

Evaluation = tuple[int, Callable[[Any], Mapping[str, float]]]


def count_tokens(batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]) -> int:
    """Tokens of a packed batch that are not padding."""
    return int(np.count_nonzero(batch["segment_ids"]))


def train(
    state: Any,
    step: Callable,
    batches,
    *,
    steps: int,
    run: RunDirectory,
    mesh: Mesh | None = None,
    log_every: int = 10,
    checkpoint_every: int = 500,
    keep_last: int = 2,
    evaluations: Sequence[Evaluation] = (),
    max_skipped: int = 10,
    flops_per_token: float | None = None,
    tokens: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], int] = count_tokens,
    tokenizer_hash: str | None = None,
    tensorboard: bool = True,
    wandb: str | None = None,
) -> tuple[Any, dict[str, float]]:
    """Trains up to `steps` steps, from the newest checkpoint of the run if it has one.

    A line is written to metrics.jsonl for every step that is a multiple of `log_every`, is
    evaluated, or is the last. It holds `metrics.Means` of the steps since the line before, which
    checkpoints keep, so that it doesn't depend on where a run was interrupted; the evaluations of
    the state after the step; and under "time/" averages since the line before: tokens_per_second
    (padding not counted), step_seconds, data_share (the part of the time spent waiting for batches)
    and flops_per_second. Metrics are fetched one step late, so that the device never waits for the
    host.

    Args:
      state: from `init_state`, or any tree a step maps to the next; donated.
      step: from `make_step`, or another that returns (state, metrics).
      batches: iterator of host batches with `get_state() -> JSON` and `set_state`.
      steps: total, counted from the very first.
      run: the held run directory.
      mesh: of the step.
      evaluations: pairs (every, function): the function sees the state after each step that is a
        multiple of `every` (0: none is), and after the last, and returns numbers to log. It must
        not keep the state: the next step donates it.
      max_skipped: consecutive skipped updates that end the run.
      flops_per_token: for flops_per_second; None: not reported.
      tokens: (batch, metrics) → number trained on or sampled in a step.
      tokenizer_hash: kept in the checkpoints and compared on resume.
      tensorboard: also write TensorBoard files.
      wandb: also log to this W&B project.

    Returns:
      (state, rates): train/steps_per_second, train/tokens_per_second and train/flops_per_second of
      this process without its first step (compilation); empty when it took fewer than two.

    Raises:
      Preempted: SIGTERM or SIGINT; the current step is finished and saved.
      UserError: `max_skipped` updates in a row were skipped (it names the batches' rows), the data
        ended early, or the checkpoint belongs to another tokenizer or model.
    """
    checkpoints = Checkpoints(run.path / "checkpoints", keep_last=keep_last)
    run.defer_stop = True
    log = None
    try:
        state, done, means = _resume(state, batches, checkpoints, run, tokenizer_hash)
        writer = MetricsWriter(
            run.path, done, config=run.config, tensorboard=tensorboard, wandb=wandb
        )
        clock = Clock(flops_per_token)
        log = _Log(writer, clock, Progress(run.path.name, done, steps), means, max_skipped)
        step = _watched(step)
        number = done
        for number in range(done + 1, steps + 1):
            with clock.waiting():
                batch = next(batches, None)
            if batch is None:
                raise UserError(f"the data ended after {number - 1} of {steps} steps")
            state, metrics = step(state, shard_batch(mesh, batch))
            if number == done + 1:
                give_back()  # what compiling took
            fault_point("step", number)

            last = number == steps
            due = [f for every, f in evaluations if last or (every and number % every == 0)]
            stop = run.stop_requested
            save = last or stop or number % checkpoint_every == 0
            wanted = last or due or number % log_every == 0
            log.add(number, metrics, tokens(batch, metrics), batch.get("row_ids"), bool(wanted))
            if not due and not any(isinstance(x, jax.Array) for x in metrics.values()):
                log.settle({})  # a step that ends on the host has nothing to run ahead of
            if due or save:
                jax.block_until_ready(metrics)
                with clock.paused():
                    evaluated = {k: v for f in due for k, v in f(state).items()}
                log.settle(evaluated)
            if save:
                with clock.paused():
                    writer.sync()
                    meta = _meta(run, tokenizer_hash, means)
                    checkpoints.save(number, state, batches.get_state(), meta)
            if stop:
                break
        checkpoints.wait()
    finally:
        run.defer_stop = False
        if log is not None:
            log.close()
        checkpoints.close()
    if run.stop_requested:
        raise Preempted(f"{run.path} is saved at step {number}; run the same command to continue")
    return state, clock.rates()


class _Log:
    """Takes each step's metrics when the next step is on its way, so that nothing waits."""

    def __init__(
        self,
        writer: MetricsWriter,
        clock: Clock,
        progress: Progress,
        means: Means,
        max_skipped: int,
    ):
        self._writer, self._clock, self._progress = writer, clock, progress
        self._means, self._max_skipped = means, max_skipped
        self._rows: deque[tuple[int, Any]] = deque(maxlen=max_skipped + 1)
        self._late: tuple[int, dict[str, jax.Array], int, bool] | None = None

    def add(self, number: int, metrics, tokens: int, rows, wanted: bool) -> None:
        """Takes a step that was just dispatched, and settles the one before."""
        self.settle({})
        self._late = number, metrics, tokens, wanted
        self._rows.append((number, rows))

    def settle(self, evaluated: Mapping[str, float]) -> None:
        """Waits for the newest step and writes a line if due; ends a run that only skips."""
        if self._late is None:
            return
        (number, metrics, tokens, wanted), self._late = self._late, None
        values, weights = fetch(metrics)
        skipped = int(values["train/consecutive_skipped"])
        self._clock.settled(tokens)
        if skipped >= self._max_skipped:
            first = max(1, number - skipped + 1)
            rows = {n: np.asarray(ids).tolist() for n, ids in self._rows if first <= n <= number}
            raise UserError(
                f"steps {first} to {number} had no finite loss and gradient, or no weight; the "
                f"parameters are as before. Look at these row_ids of the data, by step: {rows}"
            )
        self._means.add(values, weights)
        if wanted:
            line = {**self._means.take(), **evaluated, **self._clock.line()}
            self._writer.write(number, line)
            self._progress.show(number, line)

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def _meta(run: RunDirectory, tokenizer_hash: str | None, means: Means) -> dict[str, Any]:
    """What a checkpoint keeps beside the state, for `_resume`."""
    return {
        "means": means.state(),
        "config": run.config,
        "tokenizer_hash": tokenizer_hash,
        "wall_seconds": run.wall_seconds(),
    }


def _resume(state, batches, checkpoints: Checkpoints, run: RunDirectory, tokenizer_hash):
    """Returns (state, steps done, means): the newest checkpoint's, or the given state and 0."""
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0, Means()
    meta = restored.meta
    if meta.get("tokenizer_hash") != tokenizer_hash:
        raise UserError(
            f"the checkpoints in {run.path} are for tokenizer {meta.get('tokenizer_hash')}, this "
            f"is {tokenizer_hash}; use another --workdir"
        )
    release(state)  # the caller still holds what the restored one replaces
    try:
        batches.set_state(restored.data)
        run.earlier_seconds = float(meta["wall_seconds"])
        means = Means(meta.get("means"))  # older versions kept none
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the data.json or meta.json of {run.path}'s checkpoint of step {meta['step']} is not "
            f"as this package writes it ({str(error)[:200]}); delete that checkpoint"
        ) from error
    print(f"{run.path}: continuing after step {meta['step']}", flush=True)
    return restored.state, meta["step"], means


def _watched(step: Any) -> Callable:
    """The same step, if it is one compiled function: it may move nothing between host and device.

    State and batch are there already, so an implicit transfer is a mistake, and an error. A second
    compilation for a batch of the same shapes prints a warning.
    """
    compiled = getattr(step, "func", step)  # under a partial
    if not hasattr(compiled, "_cache_size"):  # not one function, but a Python one of several
        return step
    seen: set[tuple] = set()

    def watched(state, batch):
        before = compiled._cache_size()
        with jax.transfer_guard("disallow"):
            result = step(state, batch)
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
        if shapes in seen and compiled._cache_size() > before:
            print(f"warning: the step was compiled again for batch shapes {shapes}", flush=True)
        seen.add(shapes)
        return result

    return watched
