"""The lock of a run directory: one process at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

_LOOKS = 20  # at a lock that is held and names nobody, as for a moment it does
_PAUSE = 0.05  # seconds between two looks


def acquire(path: Path) -> int:
    """Locks the file and returns its descriptor, which holds the lock as long as it is open.

    Raises:
      OSError: the file cannot be written.
      UserError: another process holds it, on this host or another one.
    """
    here, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
    seen: dict[str, Any] = {}
    looks = 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor, fcntl.LOCK_EX):
            taken = not _lock(descriptor, fcntl.LOCK_SH)  # who only looks has a shared one
            holder, looks = _holder(path), looks + 1
            dead = holder.get("host") == here and not _alive(holder.get("pid"))
            if taken and not dead and (holder or looks >= _LOOKS):
                os.close(descriptor)
                raise UserError(f"{_held(path, holder)}; wait or stop it")
            # A child that outlived the holder inherited the lock: leave it the old file. But look
            # twice, since whoever has locked it just now is about to write another name.
            if taken and dead and holder == seen:
                with _alone(path):
                    if _is_file(path, descriptor) and _holder(path) == holder:
                        path.unlink(missing_ok=True)
            os.close(descriptor)
            seen = holder
            time.sleep(_PAUSE)
            continue
        holder = _holder(path)
        again = job and holder.get("job") == job  # which SLURM has put on other hosts
        if holder and holder.get("host") != here and not again:
            os.close(descriptor)
            raise UserError(f"{_held(path, holder)}; if that run is dead, delete {path}")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": here, "since": since, "job": job}
        try:
            with _alone(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
                if _is_file(path, descriptor):  # it was not unlinked by another process meanwhile
                    return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def release(descriptor: int) -> None:
    """Lets go of a lock that was acquired: its file names nobody then."""
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process of this host holds the lock that a file is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH) and _alive(_holder(path).get("pid"))
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the file could be locked at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside is one process of this host at a time: one that writes its name into the lock, or one
    that takes a dead one's away, which nobody may have locked since it was looked at.
    """
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks nothing that is open for reading only
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held(path: Path, holder: Mapping[str, Any]) -> str:
    if not holder:
        return f"{path.parent} is held by a process whose name is not in {path}"
    pid, host, since = (holder.get(key) for key in ("pid", "host", "since"))
    return f"{path.parent} is held by pid {pid} on host {host} since {since}"


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
