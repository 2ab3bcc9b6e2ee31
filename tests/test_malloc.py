"""Freed memory is kept for the next step, and given back once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from rlhf_jax import malloc

FAULTS = """
import resource, numpy
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(1 << 23)
before = faults()
for _ in range(8):
    numpy.ones(1 << 23)
print(faults() - before)
"""


def printed(code: str, tunables: str) -> int:
    """By a process with these settings."""
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    settings = {"kept": malloc.MALLOC, "mapped": "glibc.malloc.hugetlb=0"}
    found = {name: printed(FAULTS, value) for name, value in settings.items()}
    assert found["kept"] < 100 < found["mapped"]


RETURNED = """
from pathlib import Path
import numpy
def resident():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) >> 10
before = resident()
numpy.ones(75 << 20)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_one_large_buffer_took_does_not_stay():
    assert printed(RETURNED, malloc.MALLOC) < 100  # of 600 MiB


def test_it_restarts_once_and_respects_what_is_set(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    malloc.tune_malloc()
    assert os.environ["GLIBC_TUNABLES"] == malloc.MALLOC
    malloc.tune_malloc()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


RESIDENT = """
from pathlib import Path
from rlhf_jax.malloc import give_back
def resident():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) >> 10
many = [bytearray(1 << 16) for _ in range(1 << 12)]
del many
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_free_is_given_back_under_these_settings_only():
    freed = {
        value: printed(RESIDENT, value)
        for value in (malloc.MALLOC, malloc.MALLOC + ":glibc.malloc.tcache_count=7")
    }
    given_back, *kept = freed.values()
    assert given_back > 200 and abs(kept[0]) < 20  # of 256 MiB; the kernel counts in batches


COLLECTIONS = """
import gc
from rlhf_jax.malloc import tune_collector
tune_collector()
before = gc.get_stats()[0]["collections"]
many = [[] for _ in range(20_000)]
print(gc.get_stats()[0]["collections"] - before)
"""
START = "import sys; sys.argv = ['m']; import rlhf_jax.main; print('jax' in sys.modules or 0)"


def test_python_looks_for_cycles_less_often():
    assert printed(COLLECTIONS, malloc.MALLOC) <= 2


def test_nothing_slow_is_imported_before_the_interpreter_restarts():
    assert printed(START, malloc.MALLOC) == 0
