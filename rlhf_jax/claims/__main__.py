"""Puts claims to the test: arms and seeds are run, and a rule stated beforehand gives the verdict.

    python -m rlhf_jax.claims experiments/claims.py[:name,name] [--workers=2]

The file states each claim with its arms, the metric that is compared, the margin and the rule; what
was stated is kept before the first run, and a claim that was changed since is refused. The runs are
ordinary ones, of a sweep's kind: parents are shared, and claims that have an arm in common have its
runs in common. The verdict is "supported", "refuted" or "undecided", by the 97.5 % interval
over seeds and prompts of the difference on the same seeds and prompts.

Whatever is killed, the same command goes on and comes to the same table, claims.md and claims.csv.
Exit codes: 0 done, whatever the verdicts; 75 stopped but resumable, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import listen


def _parser() -> Parser:
    parser = Parser(prog="python -m rlhf_jax.claims", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("claims", help="a file of claims, and after a colon the names of some; none: all")
    option("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    option("--workdir", type=Path, help="of all their runs (default: runs/<file>)")
    option("--rerun", action="store_true", help="run again what has changed")
    return parser


def command(given: argparse.Namespace) -> None:
    """Runs what is missing of some claims, and shows what they came to."""
    from rlhf_jax.claims.run import run_claims

    if given.workers < 1:
        raise UserError("--workers must be at least 1")
    file = Path(given.claims.partition(":")[0])
    directory = given.workdir or Path("runs", file.stem)
    run_claims(given.claims, directory, given.workers, ("--rerun",) if given.rerun else ())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    return run(_parser(), command, argv)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # the runs need what other devices there are
    listen()
    sys.exit(main())
