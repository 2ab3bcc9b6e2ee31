"""Compilations are found again by a later process, in a folder of the processor's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILES = """
import jax
from rlhf_jax.cache import keep_compilations
keep_compilations()
events = set()
jax.monitoring.register_event_listener(lambda event, **_: events.add(event.rpartition("/")[2]))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
print(*sorted({"cache_hits", "cache_misses"} & events))
"""


def compiles(before: str = "", **environment: str) -> str:
    kept = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", before + COMPILES]
    run = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def files(path: Path, pattern: str = "*") -> list[Path]:
    return [file for file in path.rglob(pattern) if file.is_file()]


def test_compilations_are_found_again(tmp_path):
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_misses"
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_hits"
    (folder,) = {file.parent for file in files(tmp_path)}
    assert folder.parent == tmp_path / "compilations"


def test_they_are_found_from_another_path(tmp_path):
    compiles(RLHF_JAX_CACHE=str(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "at home/.cache/rlhf_jax")
    assert compiles(HOME=str(tmp_path / "at home"), RLHF_JAX_CACHE="") == "cache_hits"


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "sealed"),
    [
        (flipped, True),
        (lambda data: b"", True),
        (lambda data: data[:40], False),  # the process that wrote it was killed
    ],
    ids=["flipped", "empty", "torn"],
)
def test_damaged_ones_are_made_anew(tmp_path, damage, sealed):
    compiles(RLHF_JAX_CACHE=str(tmp_path))
    for file in files(tmp_path, "*-cache"):
        file.write_bytes(damage(file.read_bytes()))
    for seal in files(tmp_path, "*.sha256"):
        if not sealed:
            seal.unlink()
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_misses"
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_hits"


def test_one_that_the_disk_has_no_room_for_is_not_kept(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"
    ignore = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    compiles(before=f"{limit}\n{ignore}", RLHF_JAX_CACHE=str(tmp_path))
    assert not files(tmp_path)
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_misses"
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_hits"


def test_what_is_set_for_jax_is_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    environment = {"RLHF_JAX_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(elsewhere)}
    assert compiles(**environment) == "cache_misses"
    assert files(tmp_path) == files(elsewhere) != []
