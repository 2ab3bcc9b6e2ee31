"""Shows the data that a stage would train on, measured on a sample, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import Tokenizer, render_prompt
from rlhf_jax.data.encode import add_mismatched, encode_conversations, naming, render_groups
from rlhf_jax.data.packing import Document
from rlhf_jax.data.records import Conversation, Pair, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.statistics import auc, wilson_interval
from rlhf_jax.report.tables import format_percent, make_printable, print_table
from rlhf_jax.stages.chain import PARENTLESS, default_workdir, parent_directory, prepare
from rlhf_jax.stages.defaults import FED_BACK
from rlhf_jax.stages.experiments import find_experiment, names_experiment
from rlhf_jax.stages.preference_rows import label_of, read_preferences
from rlhf_jax.stages.start import with_chat_template
from rlhf_jax.tasks.sources import check_unrendered, parse_sources, read_records
from rlhf_jax.training.saved_model import load_tokenizer
from rlhf_jax.training.summary import read_summary

SAMPLE = 1000  # records of a source that are tokenised
PERCENTILES = (5, 50, 95, 99, 100)
MISMATCHED = "reply to another prompt"  # the part that is beside each record for KTO
_FATE = {
    "error": "an error",
    "drop": "dropped",
    "truncate_prompt_left": "their prompts cut from the left",
}

ChatRecord = Conversation | Pair | Prompt
# The parts of a record by name, in order; the "prompt" of a conversation ends at its last reply.
Encoded = dict[str, Document]


@dataclass(frozen=True)
class Measured:
    """Numbers of a source; shares are from 0 to 1.

    Attributes:
      records, sampled: the number of records, and of those whose tokens were counted.
      lengths: part → tokens at PERCENTILES.
      over_long: the share of sampled records that do not fit.
      trained: the share of the sampled records' tokens that are targets.
      duplicates: records that are the same as an earlier one, replies and label included.
      contradictory: pairs whose opposite is there too, or replies that are there with both labels;
        None where no replies are judged.
      identical: sampled pairs whose replies are the same tokens; None where none are judged.
      length: how well length alone tells judgements of sampled records: "auc" of the tokens of a
        good reply against those of a bad one; for pairs the "accuracy" of "the longer one is
        chosen", a tie ½, and the ends "low" and "high" of its 95 % interval.
    """

    records: int
    sampled: int
    lengths: Mapping[str, Sequence[int]]
    over_long: float
    trained: float
    duplicates: int
    contradictory: int | None
    identical: int | None
    length: Mapping[str, float]


def preflight(
    given: ConfigDict,
    source: str,
    workdir: str | None,
    stated: Sequence[str] = (),
    parents: str | None = None,
) -> None:
    """Prints what the config's stage would read from each source of `data.train`; runs nothing.

    The arguments are those of `chain.run`.

    Raises:
        UserError: as a run does, or the stage makes its own tokenizer, or `init.policy` has not
            been run yet.
    """
    config = prepare(given, stated)
    if config.stage in PARENTLESS:
        raise UserError(
            f"--preflight is for stages that start from a model, which {config.stage!r} does not"
        )
    if config.stage in FED_BACK:
        raise UserError(f"--preflight shows records, and {config.stage!r} makes its own as it runs")
    directory = Path(workdir) if workdir else default_workdir(source, Path("runs"))
    policy = config.init.policy
    if names_experiment(policy):
        home = Path(parents) if parents else None
        place = parent_directory(find_experiment(policy, source), directory, home)
    else:
        place = Path(policy)
    tokenizer = load_tokenizer(_checked_parent(policy, place))
    tokenizer = with_chat_template(tokenizer, config.data.chat_template)
    prompts_only = config.stage not in ("sft", "reward", "preference")
    limit = config.rollout.max_prompt_tokens if prompts_only else config.data.row_length
    limit_name = "rollout.max_prompt_tokens" if prompts_only else "data.row_length"
    over_long = "" if prompts_only else config.data.over_long
    fate = "left out" if prompts_only else _FATE.get(over_long, "an error")
    judged = config.stage in ("reward", "preference")
    kto = config.stage == "preference" and config.loss.name == "kto"
    for name in parse_sources(config.data.train):
        records = _read_source(config, name)
        check_unrendered(name, records, tokenizer)
        chosen = np.random.default_rng(config.seed).permutation(len(records))[:SAMPLE]
        sample = [records[i] for i in sorted(chosen)]
        stats: Mapping[str, int] = {}
        if judged:
            encoded = encode_judged(sample, tokenizer, limit, over_long, mismatched=kto)
        elif prompts_only:
            encoded = encode_prompts(sample, tokenizer)
        else:
            last = config.data.trained_turns == "last"
            encoded, stats = encode_whole(sample, tokenizer, config.data.stripped_turns, last)
        measured = measure(records, sample, encoded, limit, judged=judged)
        show(name, measured, f"over {limit_name} = {limit}: {fate}")
        console.say_stripped(name, stats.get("stripped", 0), stats.get("turns", 0))
        show_example(choose_example(encoded, limit), tokenizer)


def _read_source(config: Config, source: str) -> Sequence[ChatRecord]:
    """Reads a training source as the config's stage does."""
    if config.stage == "preference":
        return read_preferences(config, source, "train")
    kind = {"reward": "pair", "sft": "conversation"}.get(config.stage, "prompt")
    if config.stage == "reward" and config.loss.name == "pointwise":
        kind = "conversation"
    return read_records(config, source, kind, "train")


def _checked_parent(policy: str, directory: Path) -> Path:
    """Returns the directory of the model that config.init.policy names; UserError if not there."""
    try:
        read_summary(directory, whole=False)
    except UserError as error:
        raise UserError(
            f"--preflight needs the tokenizer of config.init.policy = {policy!r}: {error}; run it "
            "first or name a model's directory"
        ) from error
    return directory


def encode_judged(
    records: Sequence[Pair | Conversation],
    tokenizer: Tokenizer,
    limit: int,
    over_long: str,
    *,
    mismatched: bool = False,
) -> list[Encoded]:
    """Encodes pairs, or conversations of which only the last reply is trained.

    With `mismatched` a further part that is not trained is beside each: the reply that
    `encode.add_mismatched` takes from another of these records, as a run does if it has no others.
    """
    groups = render_groups(records, tokenizer)
    if mismatched:
        groups = add_mismatched(groups, records, tokenizer, limit, over_long)
    replies = ("chosen", "rejected") if isinstance(records[0], Pair) else ("reply",)
    names = ("prompt", *replies, *[MISMATCHED] * mismatched)
    return [
        {
            name: Document(part, [int(name in replies)] * len(part))
            for name, part in zip(names, (group.prompt, *group.branches), strict=True)
        }
        for group in groups
    ]


def encode_prompts(records: Sequence[Prompt], tokenizer: Tokenizer) -> list[Encoded]:
    """Encodes prompts, of which nothing is trained."""
    prompts = []
    for record in records:
        with naming(record.id):
            prompts.append(render_prompt(record.messages, tokenizer))
    return [{"prompt": Document(prompt, [0] * len(prompt))} for prompt in prompts]


def encode_whole(
    records: Sequence[Conversation],
    tokenizer: Tokenizer,
    stripped_turns: str = "leave",
    last_only: bool = False,
) -> tuple[list[Encoded], Mapping[str, int]]:
    """Encodes conversations whole; options and counts are those of `encode_conversations`."""
    documents, stats = encode_conversations(
        records, tokenizer, sys.maxsize, stripped_turns=stripped_turns, last_only=last_only
    )
    # The last reply begins where the last trained stretch does.
    starts = [int(np.flatnonzero(np.diff(d.is_target, prepend=0) > 0)[-1]) for d in documents]
    return [
        {
            "prompt": Document(d.tokens[:start], d.is_target[:start]),
            "reply": Document(d.tokens[start:], d.is_target[start:]),
        }
        for d, start in zip(documents, starts, strict=True)
    ], stats


def is_identical(parts: Encoded) -> bool:
    """Whether it is a pair of one reply twice, which is left out."""
    return "chosen" in parts and parts["chosen"] == parts["rejected"]


def count_tokens(parts: Encoded) -> int:
    """Counts the tokens of all parts."""
    return sum(len(part.tokens) for part in parts.values())


def measure(
    records: Sequence[ChatRecord],
    sample: Sequence[ChatRecord],
    encoded: Sequence[Encoded],
    limit: int,
    *,
    judged: bool,
) -> Measured:
    """Counts repeated records among all, and the tokens of a sample of them.

    Args:
      records: of the source.
      sample: some of them.
      encoded: the sample's tokens.
      limit: the most tokens that fit.
      judged: whether replies are pairs or labelled.
    """
    parts = {name: np.array([len(e[name].tokens) for e in encoded]) for name in encoded[0]}
    whole = np.array([count_tokens(e) for e in encoded])
    shown = parts | ({"whole": whole} if len(parts) > 1 else {})
    keys = [_make_key(record, judged) for record in records]
    there = set(keys)
    contradictory = identical = None
    if judged:
        contradictory = sum((p, b, a) in there for p, a, b in keys if a != b)
        identical = sum(map(is_identical, encoded))
    return Measured(
        records=len(records),
        sampled=len(sample),
        lengths={
            name: np.percentile(values, PERCENTILES, method="inverted_cdf").astype(int).tolist()
            for name, values in shown.items()
        },
        over_long=float((whole > limit).mean()),
        trained=sum(sum(part.is_target) for e in encoded for part in e.values()) / int(whole.sum()),
        duplicates=len(keys) - len(there),
        contradictory=contradictory,
        identical=identical,
        length=_judge_by_length(sample, parts) if judged else {},
    )


def _make_key(record: ChatRecord, judged: bool) -> tuple[Any, Any, Any]:
    """Returns (prompt, better, worse): equal for duplicates, turned for contradictions."""
    if isinstance(record, Pair):
        return record.prompt, record.chosen, record.rejected
    if isinstance(record, Prompt) or not judged:
        return record.messages, None, None
    label = label_of(record)
    return record.messages, label, 1 - label


def _judge_by_length(
    sample: Sequence[ChatRecord], parts: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns `Measured.length`; `parts` are lengths [N] in tokens."""
    if "chosen" in parts:
        good, bad = parts["chosen"], parts["rejected"]
        right = float(((1 + np.sign(good - bad)) / 2).sum())
        low, high = wilson_interval(right, len(good))
        return {"accuracy": right / len(good), "low": low, "high": high, "auc": auc(good, bad)}
    labels = np.array([label_of(record) for record in sample if isinstance(record, Conversation)])
    good, bad = parts["reply"][labels > 0.5], parts["reply"][labels < 0.5]
    return {"auc": auc(good, bad)} if len(good) and len(bad) else {}


def choose_example(encoded: Sequence[Encoded], limit: int) -> Encoded:
    """Returns the one of median length among those that are read, or among all if none is."""
    by_length = sorted(encoded, key=count_tokens)
    fitting = [e for e in by_length if count_tokens(e) <= limit and not is_identical(e)]
    fitting = fitting or by_length
    return fitting[len(fitting) // 2]


def show(name: str, measured: Measured, over_long: str, *, file: IO[str] | None = None) -> None:
    """Prints the numbers of a source; `over_long` says which records do not fit, and their fate."""
    columns = ["tokens", *("longest" if p == 100 else f"{p} %" for p in PERCENTILES)]
    rows = [[part, *values] for part, values in measured.lengths.items()]
    print_table(f"{name}: {measured.sampled:,} of {measured.records:,} records", columns, rows,
                file=file)  # fmt: skip
    share = format_percent(measured.trained)
    only_prompts = measured.lengths.keys() == {"prompt"}
    lines = [
        f"{over_long}, {format_percent(measured.over_long)}",
        f"tokens trained: {'those of answers, when they are drawn' if only_prompts else share}",
        f"exact duplicates: {measured.duplicates:,}",
    ]
    if measured.contradictory is not None:
        lines.append(f"contradicted by another: {measured.contradictory:,}")
    if measured.identical:
        share = format_percent(measured.identical / measured.sampled)
        lines.append(f"both replies the same, left out: {share}")
    length = measured.length
    if "accuracy" in length:
        between = f"{format_percent(length['low'])} to {format_percent(length['high'])}"
        lines.append(f"the longer reply is the chosen one: {format_percent(length['accuracy'])}")
        lines[-1] += f" ({between})"
    if length:
        lines.append(f"a good reply is longer than a bad one: AUC {length['auc']:.3f}")
    print("\n".join(lines), file=file)


def show_example(example: Encoded, tokenizer: Tokenizer, *, file: IO[str] | None = None) -> None:
    """Prints a record as the model reads it; its trained text is coloured, or in [[ ]]."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    text = Text("an example, what is trained ", style="dim")
    text.append("coloured" if coloured else "in [[ ]]")
    console.print(text, end=":\n")
    text = Text()
    for piece, trained in decode_stretches(example, tokenizer):
        shown = make_printable(piece)
        text.append(shown if coloured or not trained else f"[[{shown}]]",
                    style="bold green" if trained else "")  # fmt: skip
    console.print(text, end="\n\n")


def decode_stretches(example: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Returns (text with its control tokens, whether it is trained) of each stretch of a part."""
    stretches: list[tuple[str, bool]] = []
    for part in example.values():
        cuts = [0, *(np.flatnonzero(np.diff(part.is_target)) + 1).tolist(), len(part.tokens)]
        for begin, end in pairwise(cuts):
            text = tokenizer.decode(part.tokens[begin:end], control=True)
            stretches.append((text, bool(part.is_target[begin])))
    return stretches
