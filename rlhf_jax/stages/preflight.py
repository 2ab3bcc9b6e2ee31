"""What a stage would train on, tokenised and measured on a sample, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import Tokenizer, mark, render_prompt, render_replies
from rlhf_jax.data.encode import add_mismatched, naming, split_turns
from rlhf_jax.data.packing import Group
from rlhf_jax.data.records import Conversation, Pair, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.statistics import auc, wilson_interval
from rlhf_jax.report.tables import format_percent, make_printable, print_table
from rlhf_jax.stages.chain import PARENTLESS, default_workdir, prepare
from rlhf_jax.stages.preference_rows import label_of, read_preferences
from rlhf_jax.stages.start import with_chat_template
from rlhf_jax.tasks.sources import check_unrendered, parse_sources, read_records
from rlhf_jax.training.saved_model import is_hub_directory, load_tokenizer
from rlhf_jax.training.summary import read_summary

SAMPLE = 1000  # records of a source that are tokenised
PERCENTILES = (5, 50, 95, 99, 100)
_FATE = {
    "error": "an error",
    "drop": "dropped",
    "truncate_prompt_left": "their prompts cut from the left",
}

ChatRecord = Conversation | Pair | Prompt


@dataclass(frozen=True)
class Encoded:
    """A record as tokens and, of each, whether it is trained; the parts by name are in order.

    Of a conversation the part "prompt" is all before the last reply, and `stripped` of its `turns`,
    replies that were to be trained, are not.
    """

    parts: Mapping[str, Sequence[int]]
    is_target: Sequence[int]
    turns: int = 0
    stripped: int = 0

    @property
    def tokens(self) -> list[int]:
        return [token for part in self.parts.values() for token in part]

    @property
    def identical(self) -> bool:
        """Whether it is a pair of one reply twice, which is left out."""
        return "chosen" in self.parts and self.parts["chosen"] == self.parts["rejected"]


@dataclass(frozen=True)
class Measured:
    """Numbers of a source; shares are from 0 to 1.

    Attributes:
      records, sampled: how many there are, and of how many the tokens were counted.
      lengths: part → tokens at PERCENTILES.
      over_long: the share of sampled records that do not fit.
      trained: the share of the sampled records' tokens that are targets.
      duplicates: records that are the same as an earlier one, replies and label included.
      contradictory: pairs whose opposite is there too, or replies that are there with both labels.
      identical: sampled pairs whose replies are the same tokens. Both are None where no replies are
        judged.
      length: how well length alone tells judgements, of sampled records: "auc" of the tokens of a
        good reply against those of a bad one; of pairs the "accuracy" of "the longer one is
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


def preflight(config: Config, source: str, workdir: str | None) -> None:
    """Prints what the config's stage would read from each source of `data.train`; runs nothing.

    Raises:
        UserError: as a run does, or the stage makes its own tokenizer, or `init.policy` has not
            been run yet.
    """
    config = prepare(config)
    if config.stage in PARENTLESS:
        raise UserError(
            f"--preflight is for stages that start from a model, which {config.stage!r} does not"
        )
    runs = (Path(workdir) if workdir else default_workdir(source, Path("runs"))).parent
    tokenizer = load_tokenizer(_parent(config.init.policy, runs))
    tokenizer = with_chat_template(tokenizer, config.data.chat_template)
    prompts_only = config.stage not in ("sft", "reward", "preference")
    limit = config.rollout.max_prompt_tokens if prompts_only else config.data.row_length
    for name in parse_sources(config.data.train):
        records = _read(config, name)
        check_unrendered(name, records, tokenizer)
        chosen = np.random.default_rng(config.seed).permutation(len(records))[:SAMPLE]
        sample = [records[i] for i in sorted(chosen)]
        judged = isinstance(records[0], Pair) or config.stage in ("reward", "preference")
        expand = getattr(config.data, "stripped_turns", "") == "expand"
        encoded = [
            part
            for record in sample
            for part in encode_all(record, tokenizer, judged=judged, expand=expand)
        ]
        if config.stage == "preference" and config.loss.name == "kto":
            encoded = with_mismatched(sample, encoded, tokenizer, limit, config.data.over_long)
        measured = measure(records, sample, encoded, limit, judged=judged)
        limit_name = "rollout.max_prompt_tokens" if prompts_only else "data.row_length"
        fate = "left out" if prompts_only else _FATE.get(config.data.over_long, "an error")
        show(name, measured, f"over {limit_name} = {limit}: {fate}")
        turns, stripped = (sum(getattr(e, k) for e in encoded) for k in ("turns", "stripped"))
        console.say_stripped(name, stripped, turns)
        show_example(_typical(encoded, limit), tokenizer)


def _read(config: Config, source: str) -> Sequence[ChatRecord]:
    """The records of a training source as its stage reads them."""
    match config.stage:
        case "preference":
            return read_preferences(config, source, "train")
        case "reward":
            kind = "conversation" if config.loss.name == "pointwise" else "pair"
        case "sft":
            kind = "conversation"
        case _:
            kind = "prompt"
    return read_records(config, source, kind, "train")


def _parent(policy: str, runs: Path) -> Path:
    directory = default_workdir(policy, runs) if ".py" in policy else Path(policy)
    if is_hub_directory(directory):
        return directory
    try:
        read_summary(directory, whole=False)
    except UserError as error:
        raise UserError(
            f"--preflight needs the tokenizer of config.init.policy = {policy!r}: {error}; run it "
            "first or name a model's directory"
        ) from error
    return directory


def encode(record: ChatRecord, tokenizer: Tokenizer, *, judged: bool) -> Encoded:
    """The record's tokens; of a conversation that is `judged` the last reply only is trained."""
    return encode_all(record, tokenizer, judged=judged, expand=False)[0]


def encode_all(
    record: ChatRecord, tokenizer: Tokenizer, *, judged: bool, expand: bool
) -> list[Encoded]:
    """`encode`, and with `expand` the other documents of a conversation: `encode.split_turns`."""
    with naming(record.id):
        if isinstance(record, Pair):
            texts = (record.chosen, record.rejected)
            prompt, (chosen, rejected) = render_replies(record.prompt, texts, tokenizer)
            parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            trained = [1] * (len(chosen) + len(rejected))
            return [Encoded(parts, [0] * len(prompt) + trained)]
        if isinstance(record, Prompt):
            prompt = render_prompt(record.messages, tokenizer)
            return [Encoded({"prompt": prompt}, [0] * len(prompt))]
        documents, turns = split_turns(record.messages, tokenizer, expand, last_turn_only=judged)
    stripped = turns - sum(len(places) for _, places in documents)
    encoded = []
    for tokens, places in documents:
        begin, is_target = places[-1].start, mark(tokens, places)
        parts = {"prompt": tokens[:begin], "reply": tokens[begin:]}
        encoded.append(Encoded(parts, is_target, turns, stripped))
        turns = stripped = 0  # counted once
    return encoded


def with_mismatched(
    sample: Sequence[Conversation | Pair],
    encoded: Sequence[Encoded],
    tokenizer: Tokenizer,
    limit: int,
    over_long: str,
) -> list[Encoded]:
    """The same with a further part that is not trained, the reply of `encode.add_mismatched`.

    It is another record's of the sample: the one that a run takes where all records are in it.
    """
    groups = [
        Group(prompt, tuple(replies), i)
        for i, (prompt, *replies) in enumerate(e.parts.values() for e in encoded)
    ]
    groups = add_mismatched(groups, sample, tokenizer, limit, over_long)
    return [
        replace(
            each,
            parts={**each.parts, "reply to another prompt": group.branches[-1]},
            is_target=[*each.is_target, *[0] * len(group.branches[-1])],
        )
        for each, group in zip(encoded, groups, strict=True)
    ]


def measure(
    records: Sequence[ChatRecord],
    sample: Sequence[ChatRecord],
    encoded: Sequence[Encoded],
    limit: int,
    *,
    judged: bool,
) -> Measured:
    """The numbers of a source: what is repeated of all `records`, tokens of `sample`, encoded.

    `judged`: replies are pairs or labelled.
    """
    parts = {name: np.array([len(e.parts[name]) for e in encoded]) for name in encoded[0].parts}
    whole = sum(parts.values())
    assert isinstance(whole, np.ndarray)
    shown = parts | ({"whole": whole} if len(parts) > 1 else {})
    keys = [_key(record, judged) for record in records]
    there = set(keys)
    contradictory = identical = None
    if judged:
        contradictory = sum((p, b, a) in there for p, a, b in keys if a != b)
        identical = sum(e.identical for e in encoded)
    return Measured(
        records=len(records),
        sampled=len(sample),
        lengths={
            name: np.percentile(values, PERCENTILES, method="inverted_cdf").astype(int).tolist()
            for name, values in shown.items()
        },
        over_long=float((whole > limit).mean()),
        trained=sum(sum(e.is_target) for e in encoded) / int(whole.sum()),
        duplicates=len(keys) - len(there),
        contradictory=contradictory,
        identical=identical,
        length=_length_alone(sample, parts) if judged else {},
    )


def _key(record: ChatRecord, judged: bool) -> tuple[Any, Any, Any]:
    """(prompt, what is preferred, what is not): equal for duplicates, turned for contradictions."""
    if isinstance(record, Pair):
        return record.prompt, record.chosen, record.rejected
    if isinstance(record, Prompt) or not judged:
        return record.messages, None, None
    label = label_of(record)
    return record.messages, label, 1 - label


def _length_alone(
    sample: Sequence[ChatRecord], parts: Mapping[str, np.ndarray]
) -> dict[str, float]:
    if "chosen" in parts:
        good, bad = parts["chosen"], parts["rejected"]
        right = float(((1 + np.sign(good - bad)) / 2).sum())
        low, high = wilson_interval(right, len(good))
        return {"accuracy": right / len(good), "low": low, "high": high, "auc": auc(good, bad)}
    labels = np.array([label_of(record) for record in sample if isinstance(record, Conversation)])
    good, bad = parts["reply"][labels > 0.5], parts["reply"][labels < 0.5]
    return {"auc": auc(good, bad)} if len(good) and len(bad) else {}


def _typical(encoded: Sequence[Encoded], limit: int) -> Encoded:
    """The one of median length among those that are read, or among all if none is."""
    by_length = sorted(encoded, key=lambda e: len(e.is_target))
    fitting = [e for e in by_length if len(e.is_target) <= limit and not e.identical] or by_length
    return fitting[len(fitting) // 2]


def show(name: str, measured: Measured, over_long: str, *, file: IO[str] | None = None) -> None:
    """Prints the numbers of a source; `over_long` says what does not fit and becomes of it."""
    columns = ["tokens", *("longest" if p == 100 else f"{p} %" for p in PERCENTILES)]
    rows = [[part, *values] for part, values in measured.lengths.items()]
    print_table(f"{name}: {measured.sampled:,} of {measured.records:,} records", columns, rows,
                file=file)  # fmt: skip
    lines = [
        f"{over_long}, {format_percent(measured.over_long)}",
        f"tokens trained: {format_percent(measured.trained)}",
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
    """Prints a record as the model reads it; what is trained is coloured, or in [[ ]]."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    text = Text("an example, what is trained ", style="dim")
    text.append("coloured" if coloured else "in [[ ]]")
    console.print(text, end=":\n")
    text = Text()
    for piece, trained in decoded_runs(example, tokenizer):
        shown = make_printable(piece)
        text.append(shown if coloured or not trained else f"[[{shown}]]",
                    style="bold green" if trained else "")  # fmt: skip
    console.print(text, end="\n\n")


def decoded_runs(example: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text with its control tokens, whether it is trained) of each stretch, parts apart."""
    runs: list[tuple[str, bool]] = []
    done = 0
    for part in example.parts.values():
        marks = np.array(example.is_target[done : done + len(part)])
        cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(part)]
        for begin, end in pairwise(cuts):
            text = tokenizer.decode(part[begin:end], control=True)
            runs.append((text, bool(marks[begin])))
        done += len(part)
    return runs
