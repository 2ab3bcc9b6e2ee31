"""The run directory: one writer, one configuration, files that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import Preempted, UserError

# What a resumed run may find changed in its config, by prefix of the field's dotted name.
# Everything else would silently make it another run, and is refused.
FREE = (
    "eval",
    "report",
    "samples",
    "train.checkpoint_every",
    "train.eval_every",
    "train.keep_last",
    "train.log_every",
    "train.max_skipped",
    "train.tensorboard",
    "train.wandb",
)
ALLOWED_WITH_FLAG = ("mesh", "optimizer", "train.mesh", "train.optimizer", "train.steps")


def fault_point(name: str, step: int | None = None) -> None:
    """Kills this process if the environment says FAULT=name or FAULT=name:step. For tests."""
    fault = os.environ.get("FAULT")
    if fault and fault in (name, f"{name}:{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def sync_directory(path: Path) -> None:
    """Makes renames inside the directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def plain(config) -> dict[str, Any]:
    """A ConfigDict or mapping as JSON has it: dicts, lists, numbers, strings."""
    text = config.to_json() if hasattr(config, "to_json") else json.dumps(dict(config))
    return json.loads(text)


def config_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (old value, new value)} of what differs; a missing field is "absent"."""
    old, new = _flatten(old), _flatten(new)
    pairs = {k: (old.get(k, "absent"), new.get(k, "absent")) for k in {**old, **new}}
    return {k: pair for k, pair in sorted(pairs.items()) if pair[0] != pair[1]}


class RunDirectory:
    """A run directory held by this process: `with RunDirectory(path, config) as run: …`

    Entering takes the lock, checks config.json against `config` and starts listening for SIGTERM
    and SIGINT. The first signal raises `Preempted` at once, or, inside `train`, after the current
    step is saved; a second one ends the process with 130.

    Attributes:
      path: the directory.
      config: the configuration as plain JSON values.
      defer_stop: set while a signal must not interrupt; `stop_requested` says that one came.

    Raises (on entering):
      UserError: another process holds the directory, or the config changed in a way that would
        silently change the run. `allow_changes` accepts optimizer, steps and mesh.
    """

    def __init__(self, path: str | os.PathLike, config, *, allow_changes: bool = False):
        self.path = Path(path)
        self.config = plain(config)
        self.allow_changes = allow_changes
        self.stop_requested = False
        self.defer_stop = False
        self.earlier_seconds = 0.0

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _acquire(self.path / "lock")
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a run directory: {error}") from error
        try:
            self._check_config()
        except BaseException:
            os.close(self._lock)
            raise
        self._start = time.monotonic()
        self._handlers = _listen(self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def wall_seconds(self) -> float:
        """Seconds spent on this run, before its last checkpoint and since this process's start."""
        return self.earlier_seconds + time.monotonic() - self._start

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the last file of a run: with it the run is done."""
        fault_point("summary")
        write_json(self.path / "summary.json", summary)

    def _check_config(self) -> None:
        path = self.path / "config.json"
        if path.exists():
            try:
                old = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not JSON ({error}); not a run directory?") from error
            changes = config_changes(old, self.config)
            for name, (before, after) in changes.items():
                print(f"config changed: {name}: {before!r} -> {after!r}", flush=True)
            accepted = FREE + (ALLOWED_WITH_FLAG if self.allow_changes else ())
            refused = [name for name in changes if not _has_prefix(name, accepted)]
            if refused:
                shown = ", ".join("{}: {!r} -> {!r}".format(n, *changes[n]) for n in refused[:5])
                raise UserError(
                    f"{self.path} holds a run with another config ({shown}"
                    f"{', …' if len(refused) > 5 else ''}); "
                    "use another --workdir, or delete this one to start again"
                )
            if not changes:
                return
        write_json(path, self.config)

    def _on_signal(self, number, frame) -> None:
        if self.stop_requested:
            os._exit(130)
        self.stop_requested = True
        if not self.defer_stop:
            raise Preempted(
                f"{signal.Signals(number).name} received; run the same command to continue"
            )


def _listen(handler) -> dict[int, Any]:
    """Installs the handler for SIGTERM and SIGINT and returns the previous ones."""
    try:
        return {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are someone else's business
        return {}


def _acquire(path: Path) -> int:
    """Locks the file and returns its descriptor, which holds the lock as long as it is open."""
    here = socket.gethostname()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _holder(path)
        by = f"{path.parent} is held by pid {holder.get('pid')} on host {holder.get('host')}"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if holder.get("host") == here and not _alive(holder.get("pid")):
                # A child that outlived the holder inherited the lock: leave it the old file.
                path.unlink(missing_ok=True)
                continue
            raise UserError(f"{by} since {holder.get('since')}; wait or stop it") from None
        if os.fstat(descriptor).st_nlink == 0:  # unlinked by another process meanwhile
            os.close(descriptor)
            continue
        if holder and holder.get("host") != here:
            os.close(descriptor)
            raise UserError(f"{by}; if that run is dead, delete {path}")
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": here, "since": since}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        return descriptor


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= (
            _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        )
    return flat


def _has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
