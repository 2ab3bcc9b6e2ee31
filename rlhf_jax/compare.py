"""Compares runs: `python -m rlhf_jax.compare runs/ppo runs/grpo 'runs/abl/*' [--out=compare.html]`.

Prints a table and writes a self-contained page. Runs that differ in their seed alone stand as one;
what a pattern matches that is no run is left out. Exit codes: 0 done, 2 the user's mistake, 1 a
bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf_jax.commands import Parser, run


def compare_runs(given: argparse.Namespace) -> None:
    """Prints the comparison of the runs and writes its page."""
    from rlhf_jax.report.comparison import compare, print_comparison, write_comparison

    comparison = compare(given.runs)
    path = write_comparison(comparison, given.out)
    print_comparison(comparison)
    print(f"comparison: {path}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = Parser(prog="python -m rlhf_jax.compare", description="Sets runs side by side.")
    parser.add_argument("runs", nargs="+", help="run directories, or patterns")
    parser.add_argument("--out", default="compare.html", help="the page (default: %(default)s)")
    return run(parser, compare_runs, argv)


if __name__ == "__main__":
    sys.exit(main())
