"""Runs as child processes: an ordinary `python -m rlhf_jax.main` for each, some at a time.

A job is done when its directory holds a finished run that is made from the same; nothing else is
remembered of it, so that a sweep can be killed anywhere and go on. A job whose directory another
process holds, such as one that a killed sweep has left, is waited for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rlhf_jax.config import document, section_document
from rlhf_jax.errors import EXIT_AT_ONCE, EXIT_DONE, EXIT_RESUMABLE, UserError
from rlhf_jax.main import parse
from rlhf_jax.stages.chain import parent_directory, prepare
from rlhf_jax.stages.experiments import names_experiment
from rlhf_jax.stages.identity import made_from
from rlhf_jax.stopping import stop_point
from rlhf_jax.sweep.engines import Engine, Process, on_cores
from rlhf_jax.training.origin import config_hash
from rlhf_jax.training.run_lock import is_held
from rlhf_jax.training.rundir import SUMMARY
from rlhf_jax.training.summary import read_summary

MODULE, TOGETHER = "rlhf_jax.main", "rlhf_jax.sweep.together"
TRIES = 5  # of a run that was killed or stopped from outside, before it counts as failed
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """A run: its name, the flags of `rlhf_jax.main`, its directory, and the runs it starts from.

    Or what runs the `runs` together, before each of them is looked at by itself.
    """

    name: str
    flags: tuple[str, ...]
    directory: Path
    needs: tuple[Job, ...] = ()
    runs: tuple[Job, ...] = ()

    def words(self, further: Sequence[str]) -> list[str]:
        """What stands after `python -m` for it, where `further` flags are of every run."""
        own = f"--workdir={self.directory}"
        if not self.runs:
            return [MODULE, *self.flags, *further, own]
        lines = (["--", *run.words(further)[1:]] for run in self.runs)
        return [TOGETHER, own, *chain.from_iterable(lines)]

    def is_done(self) -> bool:
        """Whether its directory holds a finished run that is made from the same."""
        if self.runs:
            return all(run.is_done() for run in self.runs)
        if not (self.directory / SUMMARY).exists():
            return False
        given, _, stated, _ = parse([*self.flags])
        config = prepare(given, stated)
        named = section_document(config, "init") if config.init else {}
        parents = {
            role: parent_directory(name, self.directory) if names_experiment(name) else Path(name)
            for role, name in named.items()
            if name
        }
        made = config_hash(document(config), made_from(config, parents))
        return read_summary(self.directory)["config_hash"] == made


def cores_of(workers: int) -> list[set[int]]:
    """As many of this process's cores for each worker, at least one, which workers share if there
    are more of them than cores; empty sets where the cores can't be asked."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // workers)
    return [{cores[(i * each + j) % len(cores)] for j in range(each)} for i in range(workers)]


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    logs: Path,
    tell: Callable[[Job], None],
    further: Sequence[str] = (),
    engine: Engine = on_cores,
) -> dict[Job, str]:
    """Runs what is not done yet, and what it needs first; returns why each one failed that did.

    Every worker has the same number of cores, to itself where there are enough, so that a result
    does not depend on what runs beside it.

    Args:
        logs: the folder of what each run prints, by the job's name.
        tell: called with each job that is done.
        further: flags of every run that is started.
        engine: starts them.

    Raises:
        Preempted: a stop was asked for; the children have stopped too, and can be continued.
    """
    pending, failed, done = list(jobs), dict[Job, str](), set[Job]()
    free, running = cores_of(workers), list[_Running]()
    try:
        while pending or running:
            stop_point()
            for job in list(pending):
                lost = next((need for need in job.needs if need in failed), None)
                if lost is not None:
                    failed[job] = f"{lost.name} failed: {failed[lost]}"
                    pending.remove(job)
                elif free and done.issuperset(job.needs):
                    pending.remove(job)
                    log = logs / f"{job.name}.log"
                    running.append(_Running(job, free.pop(0), log, further, engine))
            for each in list(running):
                if (why := each.look()) is not None:
                    running.remove(each)
                    free.append(each.cores)
                    if why and each.job.runs:
                        print(f"{each.job.name}, one by one: {why}", flush=True)
                        done.add(each.job)
                    elif why:
                        failed[each.job] = why
                    else:
                        done.add(each.job)
                        tell(each.job)
            time.sleep(_POLL_SECONDS if running else 0)
    finally:
        children = [each.child for each in running if each.child is not None]
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()
    return failed


class _Running:
    """A job that takes place: in a child, or in another process that holds its directory."""

    def __init__(
        self, job: Job, cores: set[int], log: Path, further: Sequence[str], engine: Engine
    ) -> None:
        self.job, self.cores, self.log, self.further = job, cores, log, further
        self.engine, self.tries = engine, 0
        self.child: Process | None = None

    def look(self) -> str | None:
        """None while it goes on, "" once it is done, or why it failed."""
        if self.child is None:
            if is_held(self.job.directory / "lock"):
                return None
            try:
                if self.job.is_done():
                    return ""
            except UserError as error:
                return str(error)
            self._start()
        assert self.child is not None
        code = self.child.poll()
        if code is None:
            return None
        self.child = None
        if code == EXIT_DONE:
            return ""
        if is_held(self.job.directory / "lock"):
            return None
        if (code < 0 or code in (EXIT_RESUMABLE, EXIT_AT_ONCE)) and self.tries < TRIES:
            return None
        return last_words(self.log) or f"ended with {code}"

    def _start(self) -> None:
        self.tries += 1
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.child = self.engine(self.job.words(self.further), self.log, self.cores)


def last_words(log: Path) -> str:
    """The last line of a log that says why, else the last one; "" without any."""
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    why = [line for line in lines if line.startswith(("error: ", "stopped: "))]
    return (why or lines or [""])[-1]
