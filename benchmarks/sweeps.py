"""How much longer a sweep takes than its runs, and what --vmap-seeds and an earlier commit take.

    python -m benchmarks.sweeps --policy=runs/sft [--checkout=../before] [FLAGS of rlhf_jax.sweep]

Each line is of one sweep in an empty directory, with all compilations kept from a run before it.
The ratio is of its time to the sum of its runs' `wall_seconds` by --workers, which may be 1 at
best; CPU seconds are of all its processes.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import ROOT, markdown

SHORT = ("--config.train.steps=24", "--config.eval.count=96")  # as in docs/sweeps.md
FLAGS = ("--config=experiments/dpo.py", "--grid=loss.beta=0.05,0.5", "--seeds=2", *SHORT)
WORKERS = 2


def run_sweep(root: Path, folder: Path, flags: Sequence[str]) -> tuple[float, float, list[float]]:
    """(seconds, CPU seconds, `wall_seconds` of each run) of a sweep by a checkout.

    Raises:
        RuntimeError: it failed; what it said stands above.
    """
    begun = time.perf_counter()
    words = [sys.executable, "-m", "rlhf_jax.sweep", *flags, f"--workers={WORKERS}"]
    process = subprocess.Popen([*words, f"--workdir={folder}"], cwd=root, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the sweep ended with {process.returncode}")
    with open(folder / "runs.csv", newline="") as file:
        seconds = [float(row["wall_seconds"]) for row in csv.DictReader(file)]
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, seconds


def cells(name: str, seconds: float, cpu: float, runs: Sequence[float]) -> list[str]:
    """One line of the table."""
    share = sum(runs) / WORKERS
    return [
        name,
        f"{len(runs)}",
        f"{seconds:.0f} s",
        f"{share:.0f} s",
        f"{seconds / share:.2f}",
        f"{cpu:.0f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="the run that all start from")
    parser.add_argument("--checkout", type=Path, help="of an earlier commit")
    given, further = parser.parse_known_args()
    flags = [*FLAGS, *further, f"--config.init.policy={given.policy.resolve()}"]
    sides: list[tuple[str, Path, tuple[str, ...]]] = []
    if given.checkout:
        sides.append(("earlier commit", given.checkout, ()))
    sides += [("this one", ROOT, ()), ("this one, --vmap-seeds", ROOT, ("--vmap-seeds",))]
    lines = [["sweep", "runs", "seconds", "its runs' / 2", "ratio", "CPU"]]
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, root, more) in enumerate(sides):
            warm, folder = Path(temporary, f"warm-{i}"), Path(temporary, f"{i}")
            run_sweep(root, warm, [*flags, *more, "--grid="])
            lines.append(cells(name, *run_sweep(root, folder, [*flags, *more])))
            print(" | ".join(lines[-1]), flush=True)
    print("", *markdown(lines), sep="\n")


if __name__ == "__main__":
    main()
