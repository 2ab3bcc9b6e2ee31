"""AI feedback: a judge's report card against gold, and pairs that a judge labels.

    python -m rlhf_jax.judges card --judge=gold,sensitivity=0.9,specificity=0.8
    python -m rlhf_jax.judges examples --out=judging.jsonl
    python -m rlhf_jax.judges label --judge=runs/judge --workdir=runs/sft --out=pairs.jsonl

A judge is `gold` (the town's exact scorer, with mistakes of chosen rates: sensitivity, specificity,
position, gullibility), the directory of a language model or of a reward model, or a function of
yours as mine.py:function, called as f(prompts, responses, rivals, principles) for the probability
that a response is better than its rival. `card` measures one on pairs whose better side is known:
town's, a file's, or answers of two models to town's prompts. `examples` writes gold-labelled
comparisons, from which sft.py:own makes a judge of a language model. `label` has a judge compare
a model's own answers; reward.py:own and dpo.py:own read the file as it is.
Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.judges.constitution import Principle
    from rlhf_jax.judges.sampled import Pairs


def card(given: argparse.Namespace) -> None:
    """Prints the report card of a judge, and writes it as JSON if a file is named."""
    from rlhf_jax.files import write_json
    from rlhf_jax.judges.card import better_side, measure, table
    from rlhf_jax.judges.judge import ask
    from rlhf_jax.judges.kinds import open_judge
    from rlhf_jax.judges.sampled import read_pairs
    from rlhf_jax.report.tables import print_table

    if not 0 < given.calibrate < given.count:
        raise UserError(f"--calibrate={given.calibrate}: some of the {given.count} pairs, not all")
    principles = _principles(given)
    with open_judge(given.judge, given.seed) as judge:
        if given.workdir:
            pairs = _sampled(given, "validation")
        else:
            pairs = read_pairs(given.data, "validation", given.count, given.seed)
        truth = {each.name: better_side(pairs, each) for each in principles}
        cards = {
            each.name: measure(
                ask(judge, pairs.of, each), truth[each.name], pairs, given.calibrate
            )
            for each in principles
        }
    kind = f"answers of {' and '.join(pairs.models)}" if given.workdir else given.data
    title = f"{given.judge} on {given.count} pairs: {kind}; the first {given.calibrate} calibrate"
    print_table(title, ("", *cards), table(cards))
    for name, each in cards.items():
        for reason, count in each.masked.items():
            print(f"{name}: {count:,} pairs without a verdict: {reason}")
    if given.out:
        write_json(Path(given.out), {name: each.to_json() for name, each in cards.items()})


def examples(given: argparse.Namespace) -> None:
    """Writes gold-labelled comparisons as SFT data."""
    from rlhf_jax.judges.labels import examples as make
    from rlhf_jax.judges.sampled import read_pairs

    pairs = read_pairs(given.data, "train", given.count, given.seed)
    lines, counts = make(pairs, _principles(given), given.seed)
    _write(given, lines, counts, {})


def label(given: argparse.Namespace) -> None:
    """Writes a policy's pairs as a judge prefers them."""
    from rlhf_jax.judges import labels
    from rlhf_jax.judges.kinds import open_judge

    principles = _principles(given)
    with open_judge(given.judge, given.seed) as judge:
        pairs = _sampled(given, "train")
        lines, counts = labels.label(judge, given.judge, pairs, principles, given.seed)
    _write(given, lines, counts, labels.agreement(lines, pairs))


def _principles(given: argparse.Namespace) -> list[Principle]:
    from rlhf_jax.judges.constitution import DEFAULT, choose, read_constitution

    return choose(read_constitution(Path(given.constitution or DEFAULT)), given.principles)


def _sampled(given: argparse.Namespace, split: str) -> Pairs:
    from rlhf_jax.judges.sampled import Policy, read_prompts, sample_pairs

    drawn = {name: getattr(given, name) for name in ("max_new_tokens", "temperature", "seed")}
    first = Policy.load(given.workdir, **drawn)
    second = Policy.load(given.compare, **drawn) if given.compare else first
    prompts = read_prompts(
        given.prompts, [first, second], split, given.count, given.max_new_tokens
    )
    return sample_pairs(first, second, prompts)


def _write(
    given: argparse.Namespace, lines: list[dict], counts: dict[str, int], measured: dict[str, float]
) -> None:
    """Writes the lines, and beside them what they were made from and what became of the others."""
    from rlhf_jax.console import say
    from rlhf_jax.digests import file_digest
    from rlhf_jax.files import write_json, write_jsonl
    from rlhf_jax.judges.constitution import DEFAULT
    from rlhf_jax.training.saved_model import fingerprint

    out = Path(given.out)
    if not lines:
        raise UserError(f"nothing is left to be written to {out}: {counts}")
    made: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("run", "out")}
    named = {made.get(name) for name in ("judge", "workdir", "compare")} - {"", None}
    made["models"] = {name: fingerprint(Path(name)) for name in named if Path(name).is_dir()}
    files = [given.constitution or str(DEFAULT), *(name.rpartition(":")[0] for name in named)]
    made["files"] = {name: file_digest(Path(name)) for name in files if Path(name).is_file()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".made.json"), {"made_from": made, "counts": counts} | measured)
    write_jsonl(out, lines)
    say(str(out), counts | measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m rlhf_jax.judges", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(required=True, metavar="card, examples or label")
    default = "(default: %(default)s)"
    for command, count in ((card, 600), (examples, 400), (label, 1000)):
        about = command.__doc__
        option = commands.add_parser(
            command.__name__, help=about, description=about, allow_abbrev=False
        ).add_argument
        option("--constitution", default="", help="a file of principles (default: the packaged)")
        option("--principles", default="overall" if command is label else "",
               help="their names, a,b,… (default: %(default)s; empty: all)")  # fmt: skip
        option("--count", type=int, default=count, help=f"of pairs {default}")
        option("--seed", type=int, default=0, help=f"of all that is drawn {default}")
        if command is not examples:
            option("--judge", required=True, help="gold[,…], a directory, or file.py:function")
            option("--workdir", default="", required=command is label,
                   help="the model whose answers are compared: a run, or a Hub directory")  # fmt: skip
            option("--compare", default="", help="another, which gives the other answer")
            option("--prompts", default="town", help=f"a file or data set {default}")
            option("--max-new-tokens", type=int, default=64, help=f"of an answer {default}")
            option("--temperature", type=float, default=1.0, help=f"of answers {default}")
        if command is not label:
            option("--data", default="town", help=f"pairs whose better side is known {default}")
        if command is card:
            option("--calibrate", type=int, default=200, help=f"of the pairs {default}")
        option("--out", required=command is not card, default="", help="the file that is written")
        option("--run", default=command, help=argparse.SUPPRESS)
    return run(parser, lambda given: given.run(given), argv)


if __name__ == "__main__":
    sys.exit(main())
