"""metrics.jsonl, TensorBoard and W&B: one object a logged step, each step exactly once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.training.rundir import fault_point, sync_directory


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl as numbers; a torn last line is left out."""
    lines = []
    for text in _whole_lines(Path(path)):
        lines.append({name: float(value) for name, value in json.loads(text).items()})
    return lines


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps, atomically, the whole lines of steps up to `step`: the rest will be written again."""
    path = Path(path)
    if not path.exists():
        return
    kept = [text for text in _whole_lines(path) if json.loads(text)["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


class MetricsWriter:
    """Appends to <run>/metrics.jsonl, and to TensorBoard and W&B when asked.

    A line is `{"step": int, name: number, …}`. Numbers are written unrounded; JSON has no spelling
    for what is not finite, so that is one of the strings "NaN", "Infinity", "-Infinity", which
    `float` reads. Names that start with "time/" are wall-clock measurements; all others are the
    same, bit for bit, in an interrupted run and in one that was not.

    Args:
      run: the run directory.
      step: the step the run continues from; lines of later steps are dropped.
      config: plain config for W&B.
      tensorboard: whether to write <run>/tensorboard.
      wandb: W&B project, or None.

    Raises:
      UserError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        *,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ):
        self._path = run / "metrics.jsonl"
        truncate_metrics(self._path, step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._board = self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError("W&B is asked for but not installed: pip install wandb") from None
            self._wandb = client.init(
                project=wandb, name=run.name, id=run.name, dir=run, config=config, resume="allow"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; it is in the file when this returns."""
        line = {"step": step} | {name: _number(value) for name, value in values.items()}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        half = len(data) // 2 if "FAULT" in os.environ else 0
        for part in (data[:half], data[half:]):
            os.write(self._file, part)
            fault_point("metrics", step)
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def sync(self) -> None:
        """Makes what is written durable, so that no checkpoint is ahead of its metrics."""
        os.fsync(self._file)

    def close(self) -> None:
        """Flushes and closes everything."""
        self.sync()
        os.close(self._file)
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _number(value) -> int | float | str:
    number = value if isinstance(value, int) else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _whole_lines(path: Path) -> list[bytes]:
    """The lines up to the first one that is not a whole JSON object."""
    lines = []
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            whole = text.endswith(b"\n") and isinstance(json.loads(text), dict)
        except ValueError:
            whole = False
        if not whole:
            break
        lines.append(text)
    return lines
