"""Where the runs of a sweep take place: on cores of this machine, or in the queue of a cluster.

An engine is a function (words, log, cores) that starts `python -m` of these words, whose output
goes to a file, and returns what can be polled, signalled and waited for, as `subprocess.Popen` can.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf_jax.errors import UserError

NEEDED = "pip install -r requirements-sweep.txt"


class Process(Protocol):
    """What an engine has started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Sends a signal."""

    def wait(self) -> int:
        """Its exit code, once it has ended."""


Engine = Callable[[Sequence[str], Path, set[int]], Process]


def on_cores(words: Sequence[str], log: Path, cores: set[int]) -> Process:
    """Starts a process on some cores of this machine."""
    with pinned(cores), open(log, "wb") as file:
        return subprocess.Popen(
            _command(words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for the sweep, which tells it
        )


def on_cluster(folder: Path, options: Mapping[str, Any], cluster: str = "slurm") -> Engine:
    """Starts processes as jobs of a cluster, by submitit.

    Args:
        folder: for submitit's files, on a disk that all nodes share.
        options: submitit's, such as slurm_partition, timeout_min, gpus_per_node.
        cluster: "slurm"; "local" is a process of this machine, for tests.

    Raises:
        UserError: submitit is not installed or does not know an option.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(f"--engine=slurm needs submitit: {NEEDED}") from None
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**options)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from error
    return lambda words, log, cores: _Submitted(executor.submit(_run, _command(words), str(log)))


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", *words]


def _run(command: list[str], log: str) -> int:
    """On a node: runs a command and returns its exit code."""
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
        return child.wait()


class _Submitted:
    """A job of submitit as a `Process`."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        return self.wait() if self._job.done() else None

    def send_signal(self, number: int, /) -> None:
        """Takes it from the queue, or ends it with SIGTERM, on which a run saves what it has."""
        self._job.cancel(check=False)

    def wait(self) -> int:
        """Its exit code; that of a kill where the job is gone without one."""
        try:
            return int(self._job.result())
        except Exception:  # of submitit's own kinds, or what the node raised
            return -signal.SIGKILL


@contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """Within it this process, and what it starts, may use these cores only; any if there are none.

    They are inherited: a child that set its own could have started its threads already.
    """
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
