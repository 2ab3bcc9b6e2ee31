"""Eight fake CPU devices for every test, and a compilation cache that all processes share."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "rlhf_jax_test_cache")
)
# By default only what took a second to compile is kept; most of the tests' programs take less, and
# many tests compile the same one.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Most of the tests' time is XLA's, and most of that LLVM's optimizations of programs that are run
# for milliseconds.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
).strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, which only root can have."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
