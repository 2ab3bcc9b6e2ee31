"""Memory as training wants it: glibc's malloc, which XLA's CPU buffers come from, and Python's."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys

# Huge pages, and freed memory kept for the next step's buffers: both in the one arena that can grow
# to any size, and not mapped anew, page fault by page fault. Buffers from half a GiB on are mapped,
# and unmapped when they are freed: in the arena a small allocation soon lies in what the last step
# freed, the next step's buffer fits no more, and up to four of them stay.
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "arena_max": 1,
        "mmap_threshold": 1 << 29,
        "trim_threshold": 1 << 34,
    }.items()
)


def tune_malloc() -> None:
    """Restarts the interpreter with `MALLOC`, on Linux.

    This saves up to a third of a training step, and glibc reads its tunables only when a process
    starts. A GLIBC_TUNABLES that is set is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def tune_collector() -> None:
    """Has Python look for unreachable cycles of objects less often, and not while it exits.

    With records and traces in the hundreds of thousands every look is long, and JAX has work of its
    own done at each.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def give_back() -> None:
    """Returns what is free to the system, under `MALLOC`: after compiling, half a GiB or more."""
    if os.environ.get("GLIBC_TUNABLES") == MALLOC:
        ctypes.CDLL(None).malloc_trim(0)
