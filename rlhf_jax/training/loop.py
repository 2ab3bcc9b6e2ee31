"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import NoRoom, Preempted, UserError
from rlhf_jax.malloc import give_back
from rlhf_jax.stopping import stop_asked, stop_point
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.mesh import shard_batch
from rlhf_jax.training.metrics import Means, MetricsWriter, fetch, read_metrics
from rlhf_jax.training.progress import Clock, Progress
from rlhf_jax.training.rundir import RunDirectory, fault_point
from rlhf_jax.training.state import release

# The squares of larger ones, summed over a batch, may overflow float32.
LARGEST_ADVANTAGE = 1e16
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
    checkpoint_minutes: float = 0.0,
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

    Checkpoints are written in the background: after steps that are a multiple of
    `checkpoint_every`, and after the first one that ends `checkpoint_minutes` (0: never) after the
    checkpoint before. That of the last step is whole before anything is evaluated. An evaluation
    that was interrupted is done again.

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
      max_skipped: consecutive skipped updates that end the run. A step that is several of them says
        how many as train/updates; val/… are its critic's.
      flops_per_token: for flops_per_second; None: not reported.
      tokens: (batch, metrics) → number trained on or sampled in a step.
      tokenizer_hash: kept in the checkpoints and compared on resume.
      tensorboard: also write TensorBoard files.
      wandb: also log to this W&B project.

    Returns:
      (state, rates): train/steps_per_second, train/tokens_per_second and train/flops_per_second of
      this process without its first step (compilation); empty when it took fewer than two.

    Raises:
      Preempted: SIGTERM or SIGINT. The current step is finished and saved, or, where it came to a
        `stop_point`, given up, and the one before is saved.
      NoRoom: the disk is full; the current step is finished, and saved if there is room for that.
      UserError: `max_skipped` updates in a row were skipped (it names the cause as far as the
        metrics tell it), the data ended early, or the checkpoint belongs to another tokenizer or
        model.
    """
    with closing(Checkpoints(run.path / "checkpoints", keep_last=keep_last)) as checkpoints:
        state, done, means, unwritten = _resume(state, batches, checkpoints, run, tokenizer_hash)
        writer = MetricsWriter(
            run.path,
            done,
            unwritten=unwritten,
            config=run.config,
            tensorboard=tensorboard,
            wandb=wandb,
        )
        clock, progress = Clock(flops_per_token), Progress(run.path.name, done, steps)
        with closing(_Log(writer, clock, progress, means, max_skipped)) as log:

            def due(number: int) -> list[Callable[[Any], Mapping[str, float]]]:
                last = number == steps
                return [f for every, f in evaluations if last or (every and number % every == 0)]

            def save(number: int, data: Mapping[str, Any], *, wait: bool = False) -> None:
                """Of the state after that step; one that is saved already stays."""
                with clock.paused():
                    writer.sync()
                    meta = _meta(run, tokenizer_hash, means, writer.unwritten)
                    checkpoints.save(number, state, data, meta, wait=wait)

            @contextmanager
            def kept(number: int, data: Mapping[str, Any]) -> Iterator[None]:
                """Saves the state after that step, if it is whole, before an end of the run."""
                try:
                    stop_point()
                    if log.full is not None:
                        raise log.full
                    yield
                except (Preempted, UserError) as end:
                    arrays = (x for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
                    if number and not any(x.is_deleted() for x in arrays):
                        log.settle()
                        save(number, data, wait=True)
                    if stop_asked() and not isinstance(end, NoRoom):
                        at = f"saved at step {number}" if number else "at its start"
                        raise Preempted(
                            f"{run.path} is {at}; run the same command to continue"
                        ) from end
                    raise

            def evaluate(number: int) -> None:
                with kept(number, batches.get_state()), clock.paused():
                    fault_point("evaluation", number)
                    evaluated = {k: v for f in due(number) for k, v in f(state).items()}
                log.write(number, evaluated)

            if any(line["step"] == done for line in read_metrics(run.path / "metrics.jsonl")):
                means.take()  # the checkpoint was begun before that line
            elif done and due(done):
                evaluate(done)
            step = _watched(step)
            saved = time.monotonic()
            for number in range(done + 1, steps + 1):
                data = batches.get_state()
                with kept(number - 1, data):
                    with clock.waiting():
                        batch = next(batches, None)
                    if batch is None:
                        raise UserError(f"the data ended after {number - 1} of {steps} steps")
                    state, metrics = step(state, shard_batch(mesh, batch))
                if number == done + 1:
                    give_back()  # what compiling took
                fault_point("step", number)

                last, evaluated = number == steps, bool(due(number))
                saves = last or checkpoints.lacks_room or number % checkpoint_every == 0
                minutes = (time.monotonic() - saved) / 60
                saves |= 0 < checkpoint_minutes <= minutes and not checkpoints.writing
                line = not evaluated and (last or number % log_every == 0)
                log.add(number, metrics, tokens(batch, metrics), batch.get("row_ids"), line)
                if not any(isinstance(x, jax.Array) for x in metrics.values()):
                    log.settle()  # a step that ends on the host has nothing to run ahead of
                if evaluated or saves:
                    jax.block_until_ready(metrics)
                    log.settle()
                if saves:
                    save(number, batches.get_state(), wait=last)
                    saved = time.monotonic()
                if evaluated:
                    evaluate(number)
            with kept(steps, batches.get_state()):
                pass
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
        self._moved = 0.0  # ‖update‖ / ‖parameters‖ of the newest step that moved them
        self.full: NoRoom | None = None  # if a line is unwritten

    def add(self, number: int, metrics, tokens: int, rows, wanted: bool) -> None:
        """Takes a step that was just dispatched, and settles the one before."""
        self.settle()
        self._late = number, metrics, tokens, wanted
        self._rows.append((number, rows))

    def settle(self) -> None:
        """Waits for the newest step and writes a line if wanted; ends a run that only skips."""
        if self._late is None:
            return
        (number, metrics, tokens, wanted), self._late = self._late, None
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
        self._means.add(values, weights)
        if wanted:
            self.write(number, {})

    def write(self, number: int, evaluated: Mapping[str, float]) -> None:
        """Writes the line of a step that is settled."""
        line = {**self._means.take(), **evaluated, **self._clock.line()}
        try:
            self._writer.write(number, line)
        except NoRoom as full:  # the step that is on its way is still worth saving
            self.full = full
        self._progress.show(number, line)

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def _cause(values: Mapping[str, float], model: str, moved: float, rows: Mapping[int, Any]) -> str:
    """Why the updates of the last step were skipped (see `make_step`), and what to look at.

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
        names = ("rewards/failures", "completions/masked", "rollout/zero_std_groups", "pairs/tied")
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


def _meta(
    run: RunDirectory, tokenizer_hash: str | None, means: Means, unwritten: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a checkpoint keeps beside the state, for `_resume`."""
    return {
        "means": means.state(),
        "unwritten": list(unwritten),
        "config": run.config,
        "tokenizer_hash": tokenizer_hash,
        "wall_seconds": run.wall_seconds(),
    }


def _resume(state, batches, checkpoints: Checkpoints, run: RunDirectory, tokenizer_hash):
    """Returns (state, steps done, means, lines of metrics that are not in their file yet).

    They are the newest checkpoint's, or the given state and none.
    """
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0, Means(), []
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
        means = Means(meta.get("means"))  # older versions kept neither
        unwritten = list(meta.get("unwritten", []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the data.json or meta.json of {run.path}'s checkpoint of step {meta['step']} is not "
            f"as this package writes it ({str(error)[:200]}); delete that checkpoint"
        ) from error
    print(f"{run.path}: continuing after step {meta['step']}", flush=True)
    return restored.state, meta["step"], means, unwritten


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
