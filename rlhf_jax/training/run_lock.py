"""The lock of a run directory: one process at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError


def acquire(path: Path) -> int:
    """Locks the file and returns its descriptor, which holds the lock as long as it is open.

    Raises:
      OSError: the file cannot be written.
      UserError: another process holds it, on this host or another one.
    """
    here, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
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
        again = job and holder.get("job") == job  # which SLURM has put on other hosts
        if holder and holder.get("host") != here and not again:
            os.close(descriptor)
            raise UserError(f"{by}; if that run is dead, delete {path}")
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": here, "since": since, "job": job}
        try:
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def is_held(path: Path) -> bool:
    """Whether a living process of this host holds the lock that a file is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _alive(_holder(path).get("pid"))
    finally:
        os.close(descriptor)
    return False


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
