"""Does it fit, before anyone pays: what a run's steps would take on chips that are not there.

    python -m rlhf_jax.plan --config=experiments/dpo.py --topology=v5e:4x4 [--config.mesh.fsdp=16]

Compiles every step of the config's stage by the chips' own compiler and prints its memory, its
messages and estimates of its time; nothing is run, and no weights are read: of a model from the Hub
a directory with its config.json will do. --search tries what would make it fit, or faster.
Topologies are TPUs by shape, "v5e:4x4", GPUs by number, "h100:8", and "cpu". What is needed beside
the package is in requirements-plan.txt.
"""

from __future__ import annotations

import argparse
import os
import sys

from rlhf_jax.commands import Parser, run
from rlhf_jax.plan.chips import ENVIRONMENT

# Flags of `rlhf_jax.main` that say what a run does: none is made here.
_OF_MAIN = (
    *("workdir", "parents", "version", "print", "preflight", "rerun"),
    *("coordinator", "processes", "process"),
)


class _Parser(Parser):
    """Keeps what it does not know as `rest`, for `rlhf_jax.main`."""

    def parse_args(self, args=None, namespace=None):
        given, rest = self.parse_known_args(args, namespace)
        given.rest = rest
        return given


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = _Parser(prog="python -m rlhf_jax.plan", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--topology", required=True, help="as v5e:4x4, h100:8, or cpu")
    parser.add_argument("--search", action="store_true", help="try what would make it fit")

    def command(flags) -> None:
        from rlhf_jax.main import parse
        from rlhf_jax.plan.plan import plan
        from rlhf_jax.stages.experiments import find_experiment, names_experiment

        config, source, stated, others = parse(flags.rest)
        for name in _OF_MAIN:
            if others[name].present:
                parser.error(f"--{name} is of rlhf_jax.main")
        for role, start in config.get("init", {}).items():
            if isinstance(start, str) and names_experiment(start):
                config.init[role] = find_experiment(start, source)
        plan(config, stated, flags.topology, search=flags.search)

    return run(parser, command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.exit(main())
