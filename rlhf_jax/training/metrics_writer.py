"""Where a run's metrics go: metrics.jsonl, TensorBoard, W&B; each line exactly once."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_jax import hosts
from rlhf_jax.errors import UserError
from rlhf_jax.files import append_whole, numbers, read_lines, room_for, write_whole
from rlhf_jax.training.rundir import TENSORBOARD, fault_point

MAX_WAITING = 1000  # lines that TensorBoard or W&B may be behind
CLOSE_SECONDS = 30  # that the end of a run waits for them
FLUSH_SECONDS = 10.0  # that TensorBoard's lines may wait for the next one to reach the disk
_FILES = itertools.count()  # of TensorBoard, in this process
Write = Callable[[int, dict[str, float]], object]
Close = Callable[[], object]


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps, atomically, the whole lines of steps up to `step`: the rest will be written again."""
    path = Path(path)
    if path.exists():
        lines = read_lines(path, numbers)
        write_whole(path, b"".join(text for text, line in lines if line["step"] <= step))


class MetricsWriter:
    """Appends to <run>/metrics.jsonl, and to TensorBoard and W&B when asked.

    A line is `{"step": int, name: number, …}`. Numbers are written unrounded; JSON has no spelling
    for what is not finite, so that is one of the strings "NaN", "Infinity", "-Infinity", which
    `float` reads. Names that start with "time/" are wall-clock measurements; all others are the
    same, bit for bit, in an interrupted run and in one that was not. Of the processes of a run the
    first one writes; another's writer does nothing.

    Args:
      run: the run directory.
      step: the step the run continues from; lines of later steps are dropped.
      unwritten: lines up to that step for which there was no room, as the attribute has them.
      config: plain config for W&B.
      tensorboard: whether to write <run>/tensorboard.
      wandb: W&B project, or None.

    Attributes:
      unwritten: the last lines, if there was no room for them.

    Raises:
      UserError: W&B is asked for and not installed.
      NoRoom: the disk is full.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        *,
        unwritten: Sequence[Mapping[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ):
        self._path = run / "metrics.jsonl"
        self._others: list[_Other] = []
        self.unwritten = [dict(line) for line in unwritten]
        hosts.by_first(lambda: self._open(run, step, config, tensorboard, wandb))

    def _open(
        self,
        run: Path,
        step: int,
        config: Mapping[str, Any] | None,
        tensorboard: bool,
        wandb: str | None,
    ) -> None:
        truncate_metrics(self._path, min([step, *(line["step"] - 1 for line in self.unwritten)]))
        with room_for(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._append()
        if tensorboard:
            board, earlier = run / TENSORBOARD, []
            if not board.exists():
                earlier = [line for _, line in read_lines(self._path, numbers)]
            start = functools.partial(_open_tensorboard, board, step, earlier)
            self._others.append(_Other("TensorBoard", start))
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError("W&B is asked for but not installed: pip install wandb") from None
            options = {"project": wandb, "name": run.name, "id": run.name, "dir": run}
            options |= {"config": config, "resume": "allow"}
            self._others.append(_Other("W&B", functools.partial(_open_wandb, client, options)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, whole; it is in the file when this returns.

        Raises:
          NoRoom: the disk is full. The line is kept, and written before the next one.
        """
        if not hosts.is_first():
            return
        for other in self._others:
            other.write(step, dict(values))
        line = {"step": step} | {name: _number(value) for name, value in values.items()}
        self.unwritten.append(line)
        self._append()

    def _append(self) -> None:
        while self.unwritten:
            line = self.unwritten[0]
            data = (json.dumps(line, allow_nan=False) + "\n").encode()
            half = len(data) // 2 if "FAULT" in os.environ else 0
            for part in (data[:half], data[half:]):
                append_whole(self._file, part, self._path)
                fault_point("metrics", line["step"])
            del self.unwritten[0]

    def sync(self) -> None:
        """Makes what is written durable, so that no checkpoint is ahead of its metrics.

        Raises:
          NoRoom: the disk is full.
        """
        if hosts.is_first():
            with room_for(self._path):
                os.fsync(self._file)

    def close(self) -> None:
        """Flushes and closes everything."""
        for other in self._others:
            other.close()
        try:
            self.sync()
        finally:
            if hosts.is_first():
                os.close(self._file)


class _Other:
    """A writer that the run doesn't depend on: it never blocks it and never ends it.

    It works in a thread of its own. One that fails, or that does not keep up, is dropped with a
    warning, and the run goes on without it.

    Args:
      name: what the warning calls it.
      start: returns what writes the values of a step, and what closes it.
    """

    def __init__(self, name: str, start: Callable[[], tuple[Write, Close]]):
        self._name, self._start, self._dropped = name, start, False
        self._lines: queue.Queue = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Has the values written, sooner or later."""
        self._put((step, values))

    def close(self) -> None:
        """Waits until all is written, but not for ever."""
        self._put(None)
        self._thread.join(0 if self._dropped else CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(f"it was not done within {CLOSE_SECONDS} s")

    def _put(self, line: tuple[int, dict[str, float]] | None) -> None:
        if not self._dropped:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self._drop(f"it is {MAX_WAITING} lines behind")

    def _work(self) -> None:
        try:
            write, close = self._start()
            while (line := self._lines.get()) is not None:
                write(*line)
            close()
        except Exception as error:
            self._drop(" ".join(f"{type(error).__name__}: {error}".split()))

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            logging.warning("%s is dropped, the run goes on without it: %s", self._name, why)


def _open_tensorboard(
    directory: Path, step: int, earlier: Sequence[Mapping[str, float]]
) -> tuple[Write, Close]:
    """Writes event files, the `earlier` lines of metrics.jsonl first.

    `tensorboardX.SummaryWriter` has a thread whose end it would not see.
    """
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    directory.mkdir(exist_ok=True)
    origin = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
    # The number parts files of one second, and keeps them in the order in which they are read.
    name = f"events.out.tfevents.{origin}.{next(_FILES):06d}"
    records = RecordWriter(str(directory / name))
    flushed = -FLUSH_SECONDS

    def add(**event) -> None:
        nonlocal flushed
        try:
            records.write(Event(wall_time=time.time(), **event).SerializeToString())
            if time.monotonic() - flushed >= FLUSH_SECONDS:
                records.flush()
                flushed = time.monotonic()
        except OSError:
            with suppress(OSError):  # else Python 3.13 prints that it can't be flushed
                records.close()
            raise

    def write(step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=n, simple_value=float(x)) for n, x in values.items()]
        add(step=step, summary=Summary(value=scalars))

    add(file_version="brain.Event:2")
    # Hides the steps that an interrupted run wrote and this one writes again.
    add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    for line in earlier:
        write(int(line["step"]), {name: x for name, x in line.items() if name != "step"})
    return write, records.close


def _open_wandb(client: Any, options: Mapping[str, Any]) -> tuple[Write, Close]:
    logged = client.init(**options)
    return lambda step, values: logged.log(values, step=step), logged.finish


def _number(value) -> int | float | str:
    number = value if isinstance(value, int) else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
