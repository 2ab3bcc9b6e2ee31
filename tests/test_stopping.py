"""Signals: the first asks, where Python can't look at it too; the second ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

BUSY = {
    "Python": "while True: pass",
    "a library that swallows exceptions": """
while True:
    try:
        time.sleep(0.01)
    except Exception:
        pass
""",
    # As while XLA compiles, no handler has a turn.
    "C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


def listening(then: str) -> subprocess.Popen:
    code = f"""
import hashlib, time
from rlhf_jax.stopping import listen, stop_asked, stop_point
listen()
print("listens", flush=True)
{then}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    return process


@pytest.mark.parametrize("busy", BUSY)
def test_a_second_signal_ends_a_process_at_once_whatever_it_does(busy):
    process = listening(BUSY[busy])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert errors == (
        "stopped at once: the state on disk is valid; run the same command to continue\n"
    )


def test_a_first_signal_raises_at_the_next_point_alone():
    process = listening("""
while not stop_asked():
    try:
        time.sleep(0.01)
    except Exception:
        raise SystemExit(3)
try:
    stop_point()
except Exception as error:
    print(type(error).__name__, error)
""")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=5)
    assert output == "Preempted SIGTERM received; run the same command to continue\n"
    assert process.returncode == 0
