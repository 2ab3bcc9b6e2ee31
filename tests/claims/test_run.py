"""Claims on the command line: whatever is killed, the table is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = """
from rlhf_jax.claims.claim import Arm, Claim, Comparison, Measure

WEAK, STRONG = (
    Arm(f"beta{beta}", "TINY:preference", {"loss.beta": beta}) for beta in ("0.1", "0.5")
)
CLAIMS = (
    Claim(
        "alike", "Alike.", (Comparison(Measure(WEAK, "gold"), Measure(STRONG, "gold"),
        "equivalent", 0.2),), beside=(Measure(WEAK, "memory"), Measure(WEAK, "seconds")), seeds=2,
    ),
    Claim("right", "Right.", (Comparison(Measure(WEAK, "right"), 0.9, "superior"),), seeds=2),
)
"""


def start(file: Path, directory: Path) -> subprocess.Popen:
    cache = os.path.join(tempfile.gettempdir(), "rlhf_jax_test_derived")
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax.claims", str(file), f"--workdir={directory}"],
        cwd=ROOT,
        env={"RLHF_JAX_CACHE": cache} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(happened: Callable[[], bool], driver: subprocess.Popen) -> None:
    while not happened():
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.02)


def is_held_by(lock: Path, process: int) -> bool:
    with suppress(ValueError, OSError):  # it is not written yet
        return json.loads(lock.read_text())["pid"] == process
    return False


@pytest.mark.slow
def test_whatever_is_killed_the_table_is_the_same(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(CLAIMS.replace("TINY", tiny))
    whole, killed = tmp_path / "whole" / "claims", tmp_path / "killed" / "claims"
    driver = start(tmp_path / "mine.py", whole)
    output, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, output
    assert "memory of beta0.1" in output and " MiB" in output

    for number in (signal.SIGKILL, signal.SIGTERM):
        driver = start(tmp_path / "mine.py", killed)
        wait_for(lambda pid=driver.pid: is_held_by(killed / "lock", pid), driver)
        done = len([*killed.glob("*/summary.json")])
        wait_for(lambda n=done: len([*killed.glob("*/summary.json")]) > n, driver)
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == (75 if number == signal.SIGTERM else -number), output
    driver = start(tmp_path / "mine.py", killed)
    output, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, output
    for name in ("claims.csv", "claims.md", "registered.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
