"""How fast training goes and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.stopping import stop_point

PLAIN_LINE_SECONDS = 5.0
Part = TypeVar("Part")


def count_tokens(batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]) -> int:
    """Tokens of a packed batch that are not padding."""
    return int(np.count_nonzero(batch["segment_ids"]))


class Clock:
    """Measures training time: evaluations and checkpoints are taken out with `paused`.

    Args:
      flops_per_token: for flops_per_second; None: not reported.
      tokens: (batch, metrics) → number of tokens that a step trains on or samples.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        tokens: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], int] = count_tokens,
    ):
        self.tokens, self._flops_per_token = tokens, flops_per_token
        self._paused = self._waited = 0.0
        self._settled = 0
        self._tokens = 0
        self._first: tuple[float, int, int] | None = None
        self._last = (0.0, 0, 0)
        self._line = (self._now(), 0, 0, 0.0)

    def _now(self) -> float:
        return time.monotonic() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time spent inside out of the training time."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def settled(self, tokens: int) -> None:
        """One more step is finished on the device, with this many tokens."""
        self._settled += 1
        self._tokens += tokens
        self._last = (self._now(), self._settled, self._tokens)
        if self._first is None:
            self._first = self._last

    def line(self) -> dict[str, float]:
        """Averages since the last call, as time/… metrics; none where no step was taken."""
        before, self._line = self._line, (self._now(), self._settled, self._tokens, self._waited)
        seconds, steps, tokens, waited = (
            new - old for new, old in zip(self._line, before, strict=True)
        )
        if not steps:
            return {}
        seconds = max(seconds, 1e-9)
        values = {
            "time/step_seconds": seconds / steps,
            "time/tokens_per_second": tokens / seconds,
            "time/data_share": waited / seconds,
        }
        if self._flops_per_token is not None:
            values["time/flops_per_second"] = tokens * self._flops_per_token / seconds
        return values

    def rates(self) -> dict[str, float]:
        """Averages of all steps after the first one, which holds the compilation."""
        if self._first is None or self._settled < 2:
            return {}
        seconds, steps, tokens = (
            last - first for first, last in zip(self._first, self._last, strict=True)
        )
        seconds = max(seconds, 1e-9)
        rates = {
            "train/steps_per_second": steps / seconds,
            "train/tokens_per_second": tokens / seconds,
        }
        if self._flops_per_token is not None:
            flops = rates["train/tokens_per_second"] * self._flops_per_token
            rates["train/flops_per_second"] = flops
        return rates


class Progress:
    """A bar on a terminal; elsewhere a line of text every few seconds."""

    def __init__(self, name: str, done: int, steps: int, unit: str = "step"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._name, self._steps, self._last_line = f"{name}  {unit}", steps, -PLAIN_LINE_SECONDS
        self._start, self._done = time.monotonic(), done
        self._bar = None
        if Console().is_terminal:
            text = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
            columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text[1])
            self._bar = Bar(*columns)
            self._task = self._bar.add_task(name, total=steps, completed=done, status="")
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step: what is known of loss and speed, time left."""
        parts = []
        if "train/loss" in values:
            parts.append(f"loss {values['train/loss']:.4f}")
        if "time/tokens_per_second" in values:
            parts.append(f"{values['time/tokens_per_second']:,.0f} tokens/s")
        if "time/flops_per_second" in values:
            parts.append(f"{values['time/flops_per_second'] / 1e9:,.1f} GFLOP/s")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status="  ".join(parts))
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_SECONDS or step == self._steps:
            self._last_line = now
            left = (now - self._start) / max(step - self._done, 1) * (self._steps - step)
            line = "  ".join([f"{self._name} {step}/{self._steps}", *parts])
            print(f"{line}  {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def tracked(parts: Iterable[Part], name: str, count: int) -> Iterator[Part]:
    """The `count` parts, one after the other, showing how far it is once that takes a while.

    Before each is a `stop_point`.
    """
    start, progress = time.monotonic(), None
    try:
        for done, part in enumerate(parts):
            if progress is None and time.monotonic() - start >= PLAIN_LINE_SECONDS:
                progress = Progress(name, done - 1, count, "pass")
            elif progress is not None:
                progress.show(done, {})
            stop_point(together=True)
            yield part
    finally:
        if progress is not None:
            progress.close()
