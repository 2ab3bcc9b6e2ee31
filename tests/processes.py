"""Processes that a test has started."""

from __future__ import annotations

import time


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a killed grandchild waits for init, which may not reap it."""
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False
