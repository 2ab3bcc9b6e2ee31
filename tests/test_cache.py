"""Compilations are found again by a later process, in a folder of the processor's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPILES = """
import jax
from rlhf_jax.cache import keep_compilations
keep_compilations()
events = set()
jax.monitoring.register_event_listener(lambda event, **_: events.add(event.rpartition("/")[2]))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
print(*sorted({"cache_hits", "cache_misses"} & events))
"""


def compiles(**environment: str) -> str:
    kept = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", COMPILES]
    run = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def test_compilations_are_found_again(tmp_path):
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_misses"
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_hits"
    (folder,) = {file.parent for file in files(tmp_path)}
    assert folder.parent == tmp_path / "compilations"


def test_a_damaged_one_is_compiled_again(tmp_path):
    compiles(RLHF_JAX_CACHE=str(tmp_path))
    for file in files(tmp_path):
        file.write_bytes(file.read_bytes()[:40])
    assert compiles(RLHF_JAX_CACHE=str(tmp_path)) == "cache_misses"


def test_what_is_set_for_jax_is_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    environment = {"RLHF_JAX_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(elsewhere)}
    assert compiles(**environment) == "cache_misses"
    assert files(tmp_path) == files(elsewhere) != []
