"""Runs one config with other values of some fields and with several seeds, and says what that is.

    python -m rlhf_jax.sweep --config=experiments/dpo.py \\
        --grid "loss.beta=0.05,0.1,0.5; loss.name=sigmoid,ipo" --seeds=5 [--workers=2]

Every cell of the grid is an ordinary run for each seed, in a directory named after what differs.
Parents are run once, beside the sweep's directory, and shared; a seed changes the order of the
data, what is sampled and what is initialised, not them. The best cell is run again on seeds that it
was not chosen by. Flags of `rlhf_jax.main`, such as --config.train.steps=40, are of every run.

With --vmap-seeds all seeds of a cell are trained by one vmapped step, equal to runs by themselves
but for rounding. With --search optuna proposes the cells, and with --engine=slurm runs are jobs of
a cluster (requirements-sweep.txt); --workers is how many are in its queue.

Whatever is killed, the same command goes on. Exit codes: 0 done, also where runs have failed, of
which the table says why; 75 stopped but resumable, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import listen


class _Parser(Parser):
    """Keeps what it does not know as `rest`, for `rlhf_jax.main`."""

    def parse_args(self, args=None, namespace=None):
        given, rest = self.parse_known_args(args, namespace)
        given.rest = rest
        return given


def _parser() -> _Parser:
    parser = _Parser(prog="python -m rlhf_jax.sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--grid", default="", help='"field=value,value; field=value,value"; none: seeds only')
    option("--seeds", type=int, default=5, help="of every cell (default: %(default)s)")
    option("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    option("--workdir", help="the sweep's directory (default: runs/<config>-sweep, -2, …)")
    option("--seeds-from", default="", help="the stage from which on seeds differ: pretrain")
    option("--vmap-seeds", action="store_true", help="train the seeds of a cell in one program")
    option("--metric", default="", help="what is compared (default: the report's first)")
    option("--baseline", default="", help="the cell that others are compared with: the first")
    option("--max-cells", type=int, default=64, help="more are refused (default: %(default)s)")
    option("--search", default="", help='"field=low..high[:log]; field=value,value", by optuna')
    option("--trials", type=int, default=20, help="of a search (default: %(default)s)")
    option("--storage", help="a journal that searches share (default: search.journal)")
    option("--engine", choices=("cores", "slurm"), default="cores", help="where runs take place")
    option("--slurm", default="", help="slurm_partition=gpu,timeout_min=60, … of submitit")
    option("--rerun", action="store_true", help="run again what has changed")
    return parser


def command(given: argparse.Namespace) -> None:
    """Runs what is missing of a sweep, and shows what it came to."""
    from rlhf_jax.sweep.sweep import run_sweep

    for name, least in (("seeds", 1), ("workers", 1), ("max_cells", 1), ("trials", 1)):
        if getattr(given, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    run_sweep(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    return run(_parser(), command, argv)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # the runs need what other devices there are
    listen()
    sys.exit(main())
