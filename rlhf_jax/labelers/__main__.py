"""Says who the labelers of a file of votes are: how sharp, how biased and how attentive each is.

    python -m rlhf_jax.labelers votes.jsonl [--out=labelers.html]
    python -m rlhf_jax.labelers town/votes
    python -m rlhf_jax.labelers --ratings town/ratings

A vote is a line {"prompt", "chosen", "rejected", "labeler"}, and optionally "order" (what was shown
first, "chosen_first" or "rejected_first"), "tie" (true) and "pair", a name that all votes about the
same two replies share; `rlhf_jax.label` writes such files, and "town/votes" has those of a
simulated crowd. Either may be sliced, "votes.jsonl[:100]". Votes on the same reply twice are left
out. It prints a table and writes a page with a figure for each labeler. What the votes don't tell
"cannot be told", and the page says why.

Where a task's verifier knows the prompts, how good replies are is known; else it is fitted with the
labelers, from pairs that several of them judged. With --ratings it reads conversations with a
"label", how good the last reply is from 0 to 1, and says how far those agree who rated them. Exit
codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf_jax.commands import Parser, run


def describe(given: argparse.Namespace) -> None:
    """Prints what the votes say of their labelers, and writes the page."""
    from rlhf_jax.labelers import page
    from rlhf_jax.labelers.estimates import estimate
    from rlhf_jax.labelers.read import arrays_of, comparing, read_votes, truths_of
    from rlhf_jax.report.tables import make_printable, print_table

    read = comparing(read_votes(given.votes), given.votes)
    votes = arrays_of(read, judged=True)
    report = estimate(votes)
    believed = page.beliefs(votes, report)
    truths = truths_of(read)
    path = page.write_page(given.out, given.votes, votes, report, believed, truths)
    for line in page.sentences(votes, report):
        print(make_printable(line), flush=True)
    # In two parts, so that a terminal of 80 columns has room.
    rows, count = page.table(votes, report), len(votes.effects)
    for part in (slice(1, count), slice(count, None)):
        shown = [[make_printable(x) for x in (row[0], *row[part])] for row in rows]
        shown = [
            [x.replace(page.CANNOT, "–").replace("\u00a0±\u00a0", "±") for x in row]
            for row in shown
        ]
        print_table(given.votes, ("labeler", *page.columns(votes)[part]), shown)
    headings, beliefs, told = believed
    print_table("what to believe of a pair", headings, beliefs)
    for line in told:
        print(line, flush=True)
    print(f"page: {path}", flush=True)


def describe_ratings(given: argparse.Namespace) -> None:
    """Prints how far people agree who rate replies one by one."""
    from rlhf_jax.labelers.ratings import COLUMNS, alphas, read_ratings, rows
    from rlhf_jax.report.tables import make_printable, print_table

    labelers, table = read_ratings(given.votes)
    shown = [[make_printable(cell) for cell in row] for row in rows(labelers, table)]
    print_table(given.votes, COLUMNS, shown)
    for level, alpha in alphas(table).items():
        told = f"undefined: {alpha.why}" if alpha.value is None else f"{alpha.value:.3f}"
        print(f"Krippendorff's α, {level}: {told}, over {alpha.of:,} replies", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = Parser(prog="python -m rlhf_jax.labelers", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("votes", help="a JSON lines file, or a data set of votes")
    parser.add_argument("--ratings", action="store_true", help="they are ratings of single replies")
    parser.add_argument("--out", default="labelers.html", help="the page (default: %(default)s)")

    def command(given: argparse.Namespace) -> None:
        (describe_ratings if given.ratings else describe)(given)

    return run(parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())
