"""Does it fit, before anyone pays: what a run's steps would take on chips that are not there.

    python -m rlhf_jax.plan --config=experiments/dpo.py --topology=v5e:4x4 [--config.mesh.fsdp=16]

Compiles every step of the config's stage by the chips' own compiler and prints its memory, its
messages and estimates of its time; nothing is run, and no weights are read: of a model from the Hub
a directory with its config.json will do. --search tries what would make it fit, or faster.
Topologies are TPUs by shape, "v5e:4x4", GPUs by number, "h100:8", and "cpu". What is needed beside
the package is in requirements-plan.txt.
"""

from __future__ import annotations

import os
import sys

from rlhf_jax.commands import Parser, run
from rlhf_jax.plan.chips import ENVIRONMENT


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="rlhf_jax.plan", description=__doc__, add_help=False)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--search", action="store_true")
    known = [arg for arg in given if arg.partition("=")[0] in ("--topology", "--search")]
    rest = [arg for arg in given if arg not in known]

    def command(flags) -> None:
        from rlhf_jax.main import parse
        from rlhf_jax.plan.plan import plan
        from rlhf_jax.stages.experiments import find_experiment, names_experiment

        config, source, stated, others = parse(rest)
        if others.workdir or others.preflight or others.rerun:
            parser.error("--workdir, --preflight and --rerun are of rlhf_jax.main")
        start = config.get("init", {}).get("policy", "")
        if names_experiment(start):
            config.init.policy = find_experiment(start, source)
        plan(config, stated, flags.topology, search=flags.search)

    return run(parser, command, known)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.exit(main())
