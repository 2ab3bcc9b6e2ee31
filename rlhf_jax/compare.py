"""Compares runs: `python -m rlhf_jax.compare runs/ppo runs/grpo runs/dpo [--out=compare.html]`.

Prints a table and writes a self-contained page. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from rlhf_jax.errors import EXIT_DONE, EXIT_USER, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"in the command line: {message}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line: `runs`, the run directories, and `out`, the page to write."""
    parser = _Parser(prog="python -m rlhf_jax.compare", description="Sets runs side by side.")
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--out", default="compare.html", help="the page (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        from rlhf_jax.evaluation.compare import compare, print_comparison, write_comparison

        comparison = compare(arguments.runs)
        path = write_comparison(comparison, arguments.out)
        print_comparison(comparison)
        print(f"comparison: {path}", flush=True)
        return EXIT_DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
