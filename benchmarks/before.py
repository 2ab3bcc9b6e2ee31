"""Ours beside ours of an earlier commit, on the same work, in one run.

    git worktree add ../before COMMIT
    python -m benchmarks.before --checkout=../before [--only=sft,dpo,README] [--rounds=5]

Both checkouts are processes of their own that are warm before the first round and then work in
turns, as in `benchmarks.run`; a ratio is the median over rounds of the earlier one's time by unit
of work to this one's: above 1 this one is faster. The row "README" is the first command of the
README, each time from an empty cache and run directory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.run import ROOT, ROWS, Row, Side, markdown

README = "README"  # the row of its first command


def in_turns(row: Row, before: Path, rounds: int) -> list[tuple[float, float]]:
    """(our rate, the earlier commit's) of each round, in units a second."""
    words = (row.work, row.shape, *row.both, *row.ours)
    sides: list[Side] = []
    try:
        for root in (ROOT, before):
            sides.append(Side(sys.executable, "benchmarks.ours", words, root))
        return [tuple(rate(side.round()) for side in sides) for _ in range(rounds)]
    finally:
        for side in sides:
            side.end()


def first_commands(before: Path, rounds: int) -> list[tuple[float, float]]:
    """(our rate, the earlier commit's) of README's first command in each round, per second."""
    return [(1 / run_command(ROOT), 1 / run_command(before)) for _ in range(rounds)]


def run_command(root: Path) -> float:
    """Seconds of README's first command in a checkout, as on a fresh machine.

    Raises:
        CalledProcessError: the command failed; what it said stands above.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {"RLHF_JAX_CACHE": f"{folder}/cache", "HOME": folder, "XDG_CACHE_HOME": folder}
        workdir = f"--workdir={folder}/runs/dpo"
        words = [sys.executable, "-m", "rlhf_jax.main", "--config=experiments/dpo.py", workdir]
        begun = time.perf_counter()
        subprocess.run(
            words, cwd=root, env=os.environ | caches, stdout=subprocess.DEVNULL, check=True
        )
        return time.perf_counter() - begun


def rate(said: dict) -> float:
    """Units a second of a round."""
    return said["units"] / said["seconds"]


def cells(name: str, rates: Sequence[tuple[float, float]]) -> list[str]:
    """One line of the table."""
    ours, before = (median(each) for each in zip(*rates, strict=True))
    ratios = [a / b for a, b in rates]
    spread = f"({min(ratios):.3f}–{max(ratios):.3f})"
    return [name, f"{ours:,.4g}", f"{before:,.4g}", f"{median(ratios):.3f}× {spread}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="of the earlier commit")
    parser.add_argument("--only", default="README,pretrain,sft,dpo,reward,grpo,ppo")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    wanted = given.only.split(",")
    lines = [["work", "ours, units/s", "before", "ratio (spread)"]]
    if README in wanted:
        lines.append(cells("README's first command", first_commands(given.checkout, given.rounds)))
        print(" | ".join(lines[-1]), flush=True)
    of_ours = {(r.work, r.shape, r.both, r.ours): r for r in reversed(ROWS) if r.work != "start"}
    for row in reversed(of_ours.values()):
        if row.work in wanted or row.name in wanted:
            lines.append(cells(row.name, in_turns(row, given.checkout, given.rounds)))
            print(" | ".join(lines[-1]), flush=True)
    print("", *markdown(lines), sep="\n")


if __name__ == "__main__":
    main()
