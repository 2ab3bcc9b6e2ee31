"""Makes a training set of a model's own answers to seed prompts, less those that filters leave out.

    python -m rlhf_jax.synthesize --workdir=runs/sft --seeds=town/prompt --count=500 --samples=4 \\
        --scorer=gold --score=0.9.. --finished --out=synthetic

Each seed is answered --samples times; with --write the model first writes further prompts after the
seeds, as self-instruct does. What is rejected is said by the options of rlhf_jax.filter, whose
verifiers, reward models and functions judge the answers, and the directory --out is as it writes
it: kept.jsonl, lineage.jsonl with the seed of each answer, report.html and report.json. A prompt
that leaves no room for an answer, and a written one that is empty or a copy, is counted as not
read. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.commands import Parser, run
from rlhf_jax.filter.__main__ import add_filters


def _parser() -> Parser:
    parser = Parser(prog="python -m rlhf_jax.synthesize", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--workdir", required=True, help="the run of the model that answers")
    option("--seeds", required=True, help="prompts: files and data sets as data.train names them")
    option("--count", type=int, help="seeds to answer, the first ones (default: all)")
    option("--samples", type=int, default=4, help="answers of a prompt (default: %(default)s)")
    option("--write", type=int, default=0, help="prompts that the model writes (default: none)")
    option("--temperature", type=float, default=1.0, help="default: %(default)s")
    option("--max-new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    option("--seed", type=int, default=0, help="of all that is drawn")
    add_filters(parser)
    return parser


def command(given: argparse.Namespace) -> None:
    """Samples, filters and writes, and prints what went."""
    from rlhf_jax.errors import UserError
    from rlhf_jax.filter.pipeline import run_filters, steps_of
    from rlhf_jax.filter.records import read_items
    from rlhf_jax.filter.report import check_out, write_report
    from rlhf_jax.synthesize.sampling import Draw, sample_answers, write_prompts
    from rlhf_jax.training.saved_model import load_speaker

    check_out(Path(given.out))
    for name, least in (("count", 1), ("samples", 1), ("write", 0), ("max_new_tokens", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    steps = steps_of(given)
    seeds, bad = read_items(given.seeds, "prompt")
    draw = Draw(given.max_new_tokens, given.temperature, given.seed)
    if given.count is not None and given.count > len(seeds):
        raise UserError(f"--count={given.count}: there are {len(seeds)} seeds in {given.seeds}")
    model = load_speaker(given.workdir)
    prompts = seeds[: given.count]
    if given.write:
        written, failed = write_prompts(model, given.workdir, seeds, given.write, draw)
        print(f"{len(written):,} of {given.write:,} prompts that the model wrote are new")
        prompts, bad = prompts + written, bad + failed
    items, failed = sample_answers(model, given.workdir, prompts, given.samples, draw)
    fates = run_filters(items, steps)
    write_report(Path(given.out), given.seeds, items, bad + failed, steps, fates)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    return run(_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
