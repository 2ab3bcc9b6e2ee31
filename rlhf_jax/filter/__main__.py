"""Filters a training set: copies, contamination, repetition, length, truncation, likelihood, worth.

    python -m rlhf_jax.filter --data=chats.jsonl --against=town/prompt@validation --near=0.85 \\
        --finished --repetition=0.3 --words=1..400 --out=filtered

Copies always go; each other filter is asked for by its option. They follow one another in the
order in which --help lists them, and a record goes for the first reason that it meets, so that the
counts of the reasons and of what is kept add up to what was read. The directory --out has
kept.jsonl, which every stage reads as it is; lineage.jsonl, which says of every line that was read
where it is kept or why it went; report.html and report.json, counts and three examples a reason. Of
a pair the chosen reply is looked at, of a text all of it. Exit codes: 0 done, 2 the user's mistake,
1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.commands import Parser, run

KINDS = ("conversation", "text", "pair", "prompt", "preference", "hh")


def _parser() -> Parser:
    parser = Parser(prog="python -m rlhf_jax.filter", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--data", required=True, help="files and data sets as data.train names them")
    option("--kind", choices=KINDS, default="conversation", help="of record (default: %(default)s)")
    option("--columns", default="", help="field:column,… where a file's names differ")
    option("--max-bad-fraction", type=float, default=0.0, help="of lines that are no records")
    add_filters(parser)
    return parser


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ask for filters, in the filters' order, and --out."""
    option = parser.add_argument
    option("--out", required=True, help="the directory to write")
    option("--against", default="", help="evaluation sets whose prompts are not to be trained on")
    option("--overlap", type=float, help="share of a prompt's words that makes it one "
           "(default: 0.5; 1: all of them)")  # fmt: skip
    option("--finished", action="store_true", help="what stops in mid-sentence goes")
    option("--repetition", type=float, help="share of n-grams of words that may come before: 0.3")
    option("--words", help="LOW..HIGH, how many a reply may have")
    option("--perplexity", help="LOW..HIGH, or shares as in ..95%%, of a reply under --model")
    option("--model", help="the run of a language model")
    option("--score", help="LOW..HIGH, or shares as in 50%%.., of a reply by --scorer")
    option("--scorer", help="a reward model's run, gold, math, …, or file.py:function")
    option("--near", type=float, help="Jaccard similarity of near duplicates, of which one is kept")


def command(given: argparse.Namespace) -> None:
    """Reads, filters and writes, and prints what went."""
    from rlhf_jax.data.shapes import parse_columns
    from rlhf_jax.errors import UserError
    from rlhf_jax.filter.pipeline import run_filters, steps_of
    from rlhf_jax.filter.records import read_items
    from rlhf_jax.filter.report import check_out, write_report

    check_out(Path(given.out))
    try:
        columns = parse_columns(given.columns)
    except ValueError as error:
        raise UserError(str(error)) from None
    steps = steps_of(given)
    items, bad = read_items(given.data, given.kind, given.max_bad_fraction, columns)
    fates = run_filters(items, steps)
    write_report(Path(given.out), given.data, items, bad, steps, fates)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    return run(_parser(), command, argv)


if __name__ == "__main__":
    sys.exit(main())
