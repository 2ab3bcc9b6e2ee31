"""The lock of a run directory, where processes come between each other's steps."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.run_lock import acquire

MINE = f"held by pid {os.getpid()} on host {socket.gethostname()}"


@pytest.fixture
def stale(tmp_path) -> Path:
    """A lock that names a dead process and that nobody holds."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": process.pid, "host": socket.gethostname()}))
    return lock


@pytest.mark.parametrize(
    ("module", "step", "call"), [(fcntl, "flock", 1), (fcntl, "flock", 2), (os, "kill", 2)]
)
def test_one_of_two_takes_over_a_stale_lock(stale, monkeypatch, module, step, call):
    """The other one comes before this one has locked the file, before its name is in it, or, where
    a dead process's child still holds it, when this one is about to take it away.
    """
    real, taken, calls = getattr(module, step), [], []
    child = os.open(stale, os.O_RDWR)
    if step == "kill":
        fcntl.flock(child, fcntl.LOCK_EX)

    def after_the_other(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            monkeypatch.setattr(module, step, real)
            taken.append(acquire(stale))
        return real(*arguments)

    monkeypatch.setattr(module, step, after_the_other)
    with pytest.raises(UserError, match=MINE):
        taken.append(acquire(stale))
    (other,) = taken
    assert os.path.samestat(os.fstat(other), os.stat(stale))
    os.close(other)
    os.close(child)


def test_who_only_looks_keeps_no_run_from_its_start(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    looking = os.open(lock, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as `is_held` has for a moment
    monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    os.close(acquire(lock))
    os.close(looking)


def test_a_holder_has_time_to_write_its_name(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    holder = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    name = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    monkeypatch.setattr(time, "sleep", lambda seconds: path.write_text(name))
    with pytest.raises(UserError, match=MINE):
        acquire(path)
    path.write_text("")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"held by a process whose name is not in .*lock; wait"):
        acquire(path)
    os.close(holder)
