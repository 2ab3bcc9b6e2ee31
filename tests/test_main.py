"""What the front door arranges before anything runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from rlhf_jax import main

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    settings = {"kept": main.MALLOC, "mapped": "glibc.malloc.hugetlb=0"}
    found = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS],
                env=os.environ | {"GLIBC_TUNABLES": value},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for name, value in settings.items()
    }
    assert found["kept"] < 100 < found["mapped"]


def test_it_restarts_once_and_respects_what_is_set(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    main.tune_malloc()
    assert os.environ["GLIBC_TUNABLES"] == main.MALLOC
    main.tune_malloc()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
