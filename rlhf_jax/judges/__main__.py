"""AI feedback: a judge's report card, what its labels are worth, labelled pairs, revised answers.

    python -m rlhf_jax.judges card --judge=gold,sensitivity=0.9,specificity=0.8
    python -m rlhf_jax.judges examples --out=judging.jsonl
    python -m rlhf_jax.judges label --judge=runs/judge --workdir=runs/sft --out=pairs.jsonl
    python -m rlhf_jax.judges critique --workdir=runs/sft --critic=runs/critic --out=revised.jsonl
    python -m rlhf_jax.judges worth --judge=runs/judge --workdir=runs/sft --out=worth

A judge is `gold` (the town's exact scorer, with mistakes of chosen rates: sensitivity, specificity,
position, gullibility), `people` (the town's labelers), the directory of a language model or of a
reward model, a function of yours as mine.py:function, called as f(prompts, responses, rivals,
principles) for the probability that a response is better than its rival, or a chat model behind an
OpenAI-compatible address, https://host/v1,model=name, whose key is $OPENAI_API_KEY. `card` measures
one on pairs whose better side is known: town's, a file's, or answers of two models to town's
prompts. `examples` writes gold-labelled comparisons, from which sft.py:own makes a judge of a
language model (with --of=critique a critic). `label` has a judge compare a model's own answers;
reward.py:own and dpo.py:own read the file as it is. `critique` has a critic find fault with a
model's answers and revise them, for sft.py:own. `worth` trains reward models from a judge's labels
and from gold ones, and says how many of these one of those is worth.
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
    from rlhf_jax.data.records import Prompt
    from rlhf_jax.judges.constitution import Principle
    from rlhf_jax.judges.sampled import Pairs, Policy


def card(given: argparse.Namespace) -> None:
    """Prints the report card of a judge, and writes it as JSON and a page if a file is named."""
    from rlhf_jax.console import say
    from rlhf_jax.files import write_json
    from rlhf_jax.judges.card import report, table
    from rlhf_jax.judges.kinds import open_judge
    from rlhf_jax.judges.page import write_card
    from rlhf_jax.judges.sampled import read_pairs
    from rlhf_jax.report.tables import print_table

    principles = _principles(given)
    with open_judge(given.judge, given.seed) as judge:
        if given.workdir:
            pairs = _sampled(given, "validation")
        else:
            pairs = read_pairs(given.data, "validation", given.count, given.seed)
        count = len(pairs.of)
        if not 0 < given.calibrate < count:
            raise UserError(
                f"--calibrate={given.calibrate} must be at least 1 and less than the {count} "
                "pairs: those tell how often the judge is wrong, the others are corrected by it"
            )
        cards = {each.name: report(judge, pairs, each, given.calibrate) for each in principles}
    kind = f"answers of {' and '.join(pairs.models)}" if given.workdir else given.data
    title = f"{given.judge} on {count} pairs: {kind}; the first {given.calibrate} calibrate"
    print_table(title, ("", *cards), table(cards))
    if pairs.left_out:
        say("left out", pairs.left_out)
    for name, each in cards.items():
        for reason, count in each.masked.items():
            print(f"{name}: {count:,} pairs without a verdict: {reason}")
    if given.out:
        out = Path(given.out)
        write_json(out, {name: each.to_json() for name, each in cards.items()})
        write_card(out.with_suffix(".html"), given.judge, title, cards)


def examples(given: argparse.Namespace) -> None:
    """Writes gold-labelled comparisons, or critiques, as SFT data."""
    from rlhf_jax.judges import labels, revision
    from rlhf_jax.judges.sampled import read_pairs

    pairs = read_pairs(given.data, "train", given.count, given.seed)
    make = labels.examples if given.of == "judging" else revision.examples
    _write(given, *make(pairs, _principles(given), given.seed), {})


def label(given: argparse.Namespace) -> None:
    """Writes a policy's pairs as a judge prefers them."""
    from rlhf_jax.judges import labels
    from rlhf_jax.judges.kinds import open_judge

    principles = _principles(given)
    with open_judge(given.judge, given.seed) as judge:
        pairs = _sampled(given, "train")
        made = labels.label(judge, given.judge, pairs, principles, given.seed)
    _write(given, *made)


def worth(given: argparse.Namespace) -> None:
    """Says how many gold labels a judge's label is worth, by reward models from both."""
    import numpy as np

    from rlhf_jax.files import read_object, write_json
    from rlhf_jax.judges.kinds import open_judge
    from rlhf_jax.judges.page import write_worth
    from rlhf_jax.judges.worth import Worth, accuracies, label_both, reward_config, table
    from rlhf_jax.report.tables import print_table

    principles, counts = _principles(given), _counts(given.counts)
    out = Path(given.out)
    found: list[dict[str, list[float]]] = []
    for seed in range(given.seed, given.seed + given.seeds):
        given.seed = seed  # of all that this turn draws
        folder = out / f"seed-{seed}"
        kept = folder / "accuracies.json"
        if not kept.exists():
            with open_judge(given.judge, seed) as judge:
                pairs = _sampled(given, "train")
                both = label_both(judge, pairs, principles, counts[-1])
            folder.mkdir(parents=True, exist_ok=True)
            config = reward_config(given.workdir, given.data, seed, given.steps)
            labels = dict(zip(("gold", "judge"), both, strict=True))
            write_json(kept, accuracies(folder, labels, counts, config))
        found.append(read_object(kept))
    measured = Worth(counts, *(np.array([e[k] for e in found]).T for k in ("gold", "judge")))
    write_json(out / "worth.json", measured.to_json())
    print_table(f"Accuracy on {given.data}, and what a label of {given.judge} is worth in gold "
                f"labels; {given.seeds} seeds", *table(measured))  # fmt: skip
    value, low, high = measured.whole
    told = f"Over all counts a label is worth {value:.2f} gold labels ({low:.2f} to {high:.2f})."
    print(told)
    write_worth(out / "report.html", given.judge, told, measured)


def _counts(text: str) -> list[int]:
    """The counts of "60,120": two or more, each larger than the one before."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(counts) < 2 or counts[0] < 1 or sorted({*counts}) != counts:
        raise UserError(f"--counts={text}: two numbers or more, each larger than that before it")
    return counts


def critique(given: argparse.Namespace) -> None:
    """Writes a policy's answers as a critic revises them, as SFT data."""
    from rlhf_jax.judges.revision import gold_table, revise
    from rlhf_jax.report.tables import print_table

    principles = _principles(given)
    policy = _policy(given, given.workdir)
    critic = _policy(given, given.critic or given.workdir, temperature=0.0)
    prompts = _prompts(given, [policy], "train")
    lines, counts = revise(policy, critic, prompts, principles)
    _write(given, lines, counts, {})
    columns, rows = gold_table(lines, prompts, principles)
    if rows:
        print_table("Answers and their revisions by gold", columns, rows)


def _check(given: argparse.Namespace) -> None:
    """Finds mistakes before anything is computed, and makes the directory of the output."""
    from rlhf_jax.stages.defaults import MOST_FED_BACK_SEED as most

    last = given.seed + getattr(given, "seeds", 1) - 1
    if given.seed < 0 or last > most:
        raise UserError(f"--seed={given.seed}: at least 0, and the last one at most {most}")
    if getattr(given, "compare", "") and not given.workdir:
        raise UserError("--compare needs --workdir, the model that gives the first answer")
    if given.run is card and given.workdir and given.data != "town":
        raise UserError("--data has answers of its own: a card with --workdir takes --prompts")
    if given.run is card and not given.workdir and given.prompts != "town":
        raise UserError("--prompts are for a model to answer: they need --workdir")
    out = Path(given.out)
    if not given.out:
        return
    if given.run is worth:
        if given.seeds < 2 or given.steps < 11:
            raise UserError("--seeds is at least 2, and --steps more than the 10 of the warm-up")
        _begin(given, out)
        return
    if given.run is card and out.suffix != ".json":
        raise UserError(f"--out={out}: a name that ends in .json; a page is written beside it")
    if given.run is not card and out.suffix != ".jsonl":
        raise UserError(f"--out={out}: a name that ends in .jsonl, as stages read it")
    if out.is_dir() or (out.exists() and given.run is not card and not _made(out).exists()):
        raise UserError(f"--out={out} is there, and not made by this command; name another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error}") from None


def _begin(given: argparse.Namespace, out: Path) -> None:
    """Makes the directory of `worth`, or goes on in one that was begun with the same command."""
    from rlhf_jax.files import read_object, write_json

    asked = {name: value for name, value in _made_from(given).items() if name != "seeds"}
    stated = out / "made_from.json"
    if out.exists() and (not stated.exists() or read_object(stated) != asked):
        raise UserError(
            f"--out={out} is there, of another command, or of models or files that have changed "
            "since; name a directory that is not"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(stated, asked)


def _made_from(given: argparse.Namespace) -> dict[str, Any]:
    """The options of a command, and the contents of the models and files that they name."""
    from rlhf_jax.digests import file_digest
    from rlhf_jax.judges.constitution import DEFAULT
    from rlhf_jax.tasks.sources import parse_source, split_sources
    from rlhf_jax.training.saved_model import fingerprint

    made: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("run", "out")}
    named = [str(made.get(name, "")) for name in ("judge", "workdir", "compare", "critic")]
    made["models"] = {
        name: fingerprint(Path(name)) for name in named if name and Path(name).is_dir()
    }
    files = [given.constitution or str(DEFAULT), *(name.rpartition(":")[0] for name in named)]
    for name in ("prompts", "data"):
        files += [parse_source(each).name for each in split_sources(made.get(name, ""))]
    made["files"] = {name: file_digest(Path(name)) for name in files if Path(name).is_file()}
    return made


def _made(out: Path) -> Path:
    """The file beside an output that says what it was made from."""
    return out.with_suffix(".made.json")


def _principles(given: argparse.Namespace) -> list[Principle]:
    from rlhf_jax.judges.constitution import DEFAULT, choose, read_constitution

    return choose(read_constitution(Path(given.constitution or DEFAULT)), given.principles)


def _policy(given: argparse.Namespace, name: str, temperature: float | None = None) -> Policy:
    from rlhf_jax.judges.sampled import Policy

    drawn = given.temperature if temperature is None else temperature
    return Policy.load(name, given.max_new_tokens, drawn, given.seed)


def _prompts(given: argparse.Namespace, policies: list[Policy], split: str) -> list[Prompt]:
    from rlhf_jax.judges.sampled import read_prompts

    return read_prompts(given.prompts, policies, split, given.count, given.max_new_tokens)


def _sampled(given: argparse.Namespace, split: str) -> Pairs:
    from rlhf_jax.judges.sampled import sample_pairs

    policies = [_policy(given, name) for name in (given.workdir, given.compare) if name]
    prompts = _prompts(given, policies, split)
    pairs = sample_pairs(policies[0], policies[-1], prompts)
    if not pairs.of:
        raise UserError(
            f"the two answers to each of {len(prompts)} prompts are the same text, or no text that "
            "a record can hold; take a higher --temperature"
        )
    return pairs


def _write(
    given: argparse.Namespace, lines: list[dict], counts: dict[str, int], measured: dict[str, float]
) -> None:
    """Writes the lines, and beside them what they were made from and what became of the others."""
    from rlhf_jax.console import say
    from rlhf_jax.files import write_json, write_jsonl

    out = Path(given.out)
    if not lines:
        raise UserError(f"nothing is left to be written to {out}: {counts}")
    write_json(_made(out), {"made_from": _made_from(given), "counts": counts} | measured)
    write_jsonl(out, lines)
    say(str(out), counts | measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m rlhf_jax.judges", description=__doc__, formatter_class=plain)
    names = parser.add_subparsers(required=True, metavar="card, examples, label, critique, worth")
    commands = (
        (card, 600, ""), (examples, 400, ""), (label, 1000, "overall"), (critique, 400, ""),
        (worth, 520, "overall"),
    )  # fmt: skip
    default = "(default: %(default)s)"
    for command, count, principles in commands:
        about = command.__doc__
        each = names.add_parser(command.__name__, help=about, description=about, allow_abbrev=False)
        each.set_defaults(run=command)
        option = each.add_argument
        samples = command in (label, critique, worth)
        option("--constitution", default="", help="a file of principles (default: the packaged)")
        option("--principles", default=principles,
               help=f"names, a,b,… (default: {principles or 'all'})")  # fmt: skip
        option("--count", type=int, default=count, help=f"of pairs or prompts {default}")
        option("--seed", type=int, default=0, help=f"of all that is drawn {default}")
        if command in (card, label, worth):
            told = "gold[,…], people, a directory, file.py:function, or https://…/v1,model=…"
            option("--judge", required=True, help=told)
            option("--compare", default="", help="a model that gives the other answer")
        if command is not examples:
            option("--workdir", default="", required=samples, help="the model that answers")
            option("--prompts", default="town", help=f"a file or data set {default}")
            option("--max-new-tokens", type=int, default=64, help=f"of an answer {default}")
            option("--temperature", type=float, default=1.0, help=f"of answers {default}")
        if not samples or command is worth:
            data = "town/ordered[:400]" if command is worth else "town"
            option("--data", default=data, help=f"pairs whose better side is known {default}")
        if command is worth:
            option("--counts", default="80,160,320", help=f"of labels {default}")
            option("--seeds", type=int, default=5, help=f"the first is --seed {default}")
            option("--steps", type=int, default=24, help=f"of each reward model {default}")
        if command is card:
            option("--calibrate", type=int, default=200, help=f"of the pairs {default}")
        if command is examples:
            option("--of", choices=("judging", "critique"), default="judging", help=default)
        if command is critique:
            option(
                "--critic", default="", help="the model that revises, greedily (default: the same)"
            )
        option("--out", required=command is not card, default="", help="the file that is written")

    def checked(given: argparse.Namespace) -> None:
        _check(given)
        given.run(given)

    return run(parser, checked, argv)


if __name__ == "__main__":
    sys.exit(main())
