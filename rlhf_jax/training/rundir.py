"""The run directory: one writer, one run, files that are whole or absent.

A run is what it was made from: config.json, and made_from.json (see `stages/identity.py`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax import hosts
from rlhf_jax.errors import UserError
from rlhf_jax.files import (
    check_fields,
    numbers,
    read_lines,
    read_object,
    room_for,
    sync_directory,
    write_json,
    write_jsonl,
    write_whole,
)
from rlhf_jax.stopping import listening
from rlhf_jax.training.origin import (
    changes,
    config_hash,
    decaying,
    deciding,
    lengthens,
    plain,
    tell_changes,
)
from rlhf_jax.training.run_lock import acquire, release

CONFIG, MADE_FROM, SUMMARY = "config.json", "made_from.json", "summary.json"
_METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_MADE_FROM_FIELDS = {
    "version": str,
    "commit": str,
    "code": {"file": str},
    "contents": {"input": str},
    "parents": {"role": str},
}


def fault_point(name: str, step: int | None = None) -> None:
    """Kills this process if the environment says FAULT=name or FAULT=name:step. For tests.

    With a FAULT_SIGNAL, the name of another one, that is sent.
    """
    fault = os.environ.get("FAULT")
    if fault and fault in (name, f"{name}:{step}"):
        os.kill(os.getpid(), signal.Signals[os.environ.get("FAULT_SIGNAL", "SIGKILL")])


class AnotherRun(UserError):
    """A directory holds a run that was made from something else."""


class RunDirectory:
    """A run directory held by this process: `with RunDirectory(path, config) as run: …`

    Entering takes the lock, checks what the directory says of its run against `config` and
    `made_from`, and listens for SIGTERM and SIGINT, if that isn't done already (see `stopping`). Of
    several processes the first one holds the directory for all.

    A run that differs is not continued, nor a finished one replaced, but for one thing: under a
    constant learning rate a run goes on to more steps than it had. With `rerun` its directory is
    kept under another name, <path>.1 or the next that is free, and a new one begun; where all that
    differs is free (see `origin`), a copy is kept and the run goes on from its last checkpoint, to
    another evaluation. metrics.jsonl and what TensorBoard shows then have no numbers of the older
    one, and are kept beside with them. A run that has neither a checkpoint nor a summary is set
    aside without being asked: a first try that failed is not to stand in the way.

    Attributes:
      path: the directory.
      config: the configuration as plain JSON values.

    Raises (on entering):
      AnotherRun: what the run is made from has changed.
      UserError: another process holds the directory, or its files are not a run's.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config,
        made_from: Mapping[str, Any] | None = None,
        *,
        rerun: bool = False,
    ):
        self.path = Path(path)
        self.config = plain(config)
        self.made_from = dict(made_from or {})
        self.rerun = rerun
        self.earlier_seconds = 0.0

    def __enter__(self) -> RunDirectory:
        hosts.by_first(self._begin)
        self._start = time.monotonic()
        self._listening = listening()
        self._listening.__enter__()
        return self

    def _begin(self) -> None:
        self._hold()
        try:
            changed = self._keep_another_run()
            if any(name.startswith(("eval.", "contents.eval.")) for name in changed):
                self._keep_evaluations()
            write_json(self.path / MADE_FROM, self.made_from)
            write_json(self.path / CONFIG, self.config)
        except BaseException:
            release(self._lock)
            raise

    def __exit__(self, *error) -> None:
        if hosts.is_first():
            release(self._lock)
        self._listening.__exit__(*error)

    def wall_seconds(self) -> float:
        """Seconds spent on this run, before its last checkpoint and since this process's start."""
        return self.earlier_seconds + time.monotonic() - self._start

    @property
    def config_hash(self) -> str:
        """See `config_hash`."""
        return config_hash(self.config, self.made_from)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the last file of a run: with it the run is done."""
        fault_point("summary")
        write_json(self.path / SUMMARY, summary)

    def _hold(self) -> None:
        try:
            with room_for(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = acquire(self.path / "lock")
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a run directory: {error}") from error

    def _keep_another_run(self) -> Mapping[str, tuple[Any, Any]]:
        """Sets aside what is there if this is another run, a copy where it goes on from there.

        Returns what differs from the run that was there, if that goes on.
        """
        held = (self.path / name for name in (CONFIG, MADE_FROM))
        config, made_from = (read_object(path) if path.exists() else {} for path in held)
        check_fields(self.path / MADE_FROM, made_from, _MADE_FROM_FIELDS, required=False)
        if config and "stage" not in config and not (self.path / MADE_FROM).exists():
            raise UserError(f"{self.path} is no run directory: its {CONFIG} is something else's")
        changed = changes(made_from | config, self.made_from | self.config)
        changed.pop("commit", None)
        decides = deciding(changed, self.config)
        done = (self.path / SUMMARY).exists()
        checkpoints = (self.path / "checkpoints").glob("*")
        if not done and not any(path.name.isdigit() for path in checkpoints):
            left = {path.name for path in self.path.iterdir()} - {"lock", CONFIG, MADE_FROM}
            if config and decides and left:  # without a config it is no run, and not ours to move
                self._set_aside(move=True)
            return {}
        refused = changed if done else decides  # a finished run's results are not replaced
        longer, decays = lengthens(decides), decaying(self.config)
        if longer and not decays and not self.rerun:
            self._extend(changed, done)
            return changed
        if refused and not self.rerun:
            why = f"; {decays[0]} depends on the number of steps" if longer else ""
            raise AnotherRun(
                f"{self.path} holds {'a finished' if done else 'an unfinished'} run that was made "
                f"from something else ({tell_changes(refused)}{why}); --rerun keeps it under "
                "another name and runs this one, or use another --workdir"
            )
        if changed:
            print(f"{self.path}: {tell_changes(changed, limit=len(changed))}", flush=True)
        if refused:
            self._set_aside(move=bool(decides))
        return changed

    def _extend(self, changed: Mapping[str, tuple[Any, Any]], done: bool) -> None:
        """Lets the run go on for more steps; the summary of a finished one is kept beside."""
        print(f"{self.path} goes on: {tell_changes(changed, limit=len(changed))}", flush=True)
        if done:
            decides = deciding(changed, self.config)
            before = "-".join(str(old) for old, _ in decides.values())
            os.rename(self.path / SUMMARY, self.path / f"summary-{before}.json")
            sync_directory(self.path)

    def _keep_evaluations(self) -> None:
        """Takes the numbers of an older evaluation out of metrics.jsonl, which is kept beside.

        So is TensorBoard's directory: the writer begins another with what is left in the file. One
        curve is of one evaluation. The line of the newest checkpoint, if it has such numbers,
        is taken out whole, so that the loop evaluates that step and writes it again.
        """
        path, checkpoints = self.path / _METRICS, (self.path / "checkpoints").glob("*")
        newest = max((int(each.name) for each in checkpoints if each.name.isdigit()), default=0)
        lines = read_lines(path, lambda line: numbers(line) and line)
        found = [line for _, line in lines if any(name.startswith("eval/") for name in line)]
        if not found:
            return
        pairs = (
            (self.path / f"metrics.{n}.jsonl", self.path / f"{TENSORBOARD}.{n}")
            for n in itertools.count(1)
        )
        aside, board = next(pair for pair in pairs if not any(path.exists() for path in pair))
        write_whole(aside, b"".join(text for text, _ in lines))
        if (self.path / TENSORBOARD).exists():
            os.rename(self.path / TENSORBOARD, board)
        kept = [line for _, line in lines if line not in found or line["step"] != newest]
        write_jsonl(
            path, [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in kept]
        )
        print(f"the evaluations of {self.path} so far are kept in {aside}", flush=True)

    def _set_aside(self, *, move: bool) -> None:
        """Renames or copies the directory to <path>.1, or the next number that is free.

        Raises:
          UserError: this process works in it.
        """
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(
                f"{self.path} is the working directory, or holds it; use another --workdir"
            )
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        if move:
            os.rename(self.path, aside)
            before = self._lock
            self._hold()
            release(before)
        else:
            whole = aside.with_name(f"{aside.name}.tmp")
            with room_for(whole):
                try:
                    shutil.copytree(self.path, whole, ignore=shutil.ignore_patterns("lock"))
                except BaseException:
                    shutil.rmtree(whole, ignore_errors=True)
                    raise
            os.rename(whole, aside)
        sync_directory(self.path.parent)
        print(f"{self.path} is kept as {aside}", flush=True)
