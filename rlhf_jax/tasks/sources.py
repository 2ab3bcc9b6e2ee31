"""Sources of records: what `data.train` and its like name, read as records of one kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.jsonl import SUFFIXES, count_rows, read_jsonl, take_slice
from rlhf_jax.data.records import Conversation, Pair, Prompt, convert_all
from rlhf_jax.data.shapes import parse_columns
from rlhf_jax.errors import UserError
from rlhf_jax.hub.hub_data import PREFIX, load_rows
from rlhf_jax.tasks.builders import load_records, task_of


def parse_sources(spec: str) -> dict[str, float]:
    """ "a=3,b=1" → {"a": 3.0, "b": 1.0}; a name alone has weight 1.

    What stands before a file's ending is of its path, such as "runs/beta=0.1/labels.jsonl".
    """
    sources: dict[str, float] = {}
    for part in split_sources(spec):
        name, weight = _name_and_weight(part)
        if name in sources:
            raise UserError(f"data: {name!r} is named twice in {spec!r}")
        try:
            sources[name] = float(weight or 1)
        except ValueError:
            sources[name] = math.nan
        if not 0 < sources[name] < math.inf:
            raise UserError(f"data: the weight of {name!r} is no number above 0: {weight!r}")
    return sources


def split_sources(spec: str) -> list[str]:
    """ "a.jsonl,town" → ["a.jsonl", "town"]; the commas in the path of a file that exists stay."""
    pieces, sources = spec.split(","), []
    while pieces:
        counts = range(len(pieces), 1, -1)
        count = next((n for n in counts if _is_existing_file(",".join(pieces[:n]))), 1)
        sources.append(",".join(pieces[:count]).strip())
        del pieces[:count]
    return sources


def _is_existing_file(source: str) -> bool:
    name, _, part = _name_and_weight(source.strip())[0].partition("[")
    return "," not in part and Path(name).is_file()


def _name_and_weight(source: str) -> tuple[str, str]:
    """ "a=3" → ("a", "3"); ("a", "") where no weight stands."""
    name, _, weight = source.rpartition("=")
    return (source, "") if not name or parse_source(weight).is_file else (name, weight)


class Source(NamedTuple):
    """A source's parts; `split` and `part`, a slice with its brackets, are "" where not stated."""

    name: str
    split: str
    part: str

    @property
    def is_hub(self) -> bool:
        """Whether the package `datasets` loads it."""
        return self.name.startswith(PREFIX)

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not a data set."""
        return not self.is_hub and Path(self.name).suffix in SUFFIXES


def parse_source(source: str) -> Source:
    """ "gsm8k@test[:50%]" → ("gsm8k", "test", "[:50%]"); an "@" in a file's name is its own."""
    name, bracket, part = source.partition("[")
    whole = Source(name, "", bracket + part)
    if whole.is_file:
        return whole
    name, _, split = name.partition("@")
    return Source(name, split, bracket + part)


def read_records(config: ConfigDict, source: str, kind: str, split: str) -> list[Any]:
    """`read_source` as the data section of a config has it."""
    bad, columns = config.data.max_bad_fraction, config.data.columns
    return read_source(source, kind, split, max_bad_fraction=bad, columns=columns)


def read_source(
    source: str, kind: str, split: str, *, max_bad_fraction: float = 0.0, columns: str = ""
) -> list[Any]:
    """The records of a source, as records of `kind` (see `records.convert`).

    A source is a JSON, JSONL or Parquet file, which may be sliced, or a data set, which may state a
    config, a split of its own in place of `split`, and a slice: "mine.jsonl[:95%]",
    "town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]", "hf:owner/name@train". Several,
    "a.jsonl,b.jsonl", are read one after the other.
    """
    records: list[Any] = []
    for each in split_sources(source):
        name, own_split, part = parsed = parse_source(each)
        own_split = own_split or split
        if parsed.is_file or parsed.is_hub:
            rows = load_rows(name, own_split) if parsed.is_hub else None
            read = read_jsonl(
                name, kind, max_bad_fraction=max_bad_fraction, rows=rows,
                columns=parse_columns(columns),
            )  # fmt: skip
            records += take_slice(read, part, name) if part else read
            continue
        paired = "pair" if kind == "preference" else kind  # no data set has unpaired records
        made = load_records(name, own_split + part, kind=paired)
        if not made:
            raise UserError(f"data: {each!r} has no records in its split {own_split!r}")
        records += convert_all(made, paired, each)
    return records


def names_pairs(source: str) -> bool:
    """Whether a source states configs of data sets that hold pairs, such as "town/ordered"."""
    stated = [parse_source(each) for each in split_sources(source)]
    if any(each.is_file or each.is_hub for each in stated):
        return False
    return all(
        task_of(each.name).kinds.get(each.name.partition("/")[2]) == "pair" for each in stated
    )


def settle_sources(config: ConfigDict) -> ConfigDict:
    """A copy in which an empty data.validation or eval.source has become what it stands for.

    Without a data.validation the last 5 % of each of the user's files and "hf:" data sets in
    data.train, at least one record, are held out, which is said; eval.source is then the same.

    Raises:
        UserError: there is nothing to hold out from: a data set, or a file that is sliced already.
    """
    config = config.copy_and_resolve_references()
    if config.stage == "oracle":  # which reads nothing
        return config
    if not config.data.train:
        raise UserError("config: data.train is empty; set --config.data.train=mine.jsonl")
    if not config.data.validation:
        trained, held_out = [], []
        for source in split_sources(config.data.train):
            name, weight = _name_and_weight(source)
            begin, rest = hold_out(name)
            trained.append(f"{begin}={weight}" if weight else begin)
            held_out.append(rest)
        config.data.train, config.data.validation = ",".join(trained), ",".join(held_out)
    if config.eval.get("source") == "":
        config.eval.source = config.data.validation
    return config


def hold_out(source: str) -> tuple[str, str]:
    """(what is trained on, what is held out) of a user's file or "hf:" data set, which is said.

    Raises:
        UserError: the source is another, or sliced already.
    """
    name, split, part = parsed = parse_source(source)
    if not (parsed.is_file or parsed.is_hub or part):
        task_of(name)  # or a line that there is no such data set
    if not (parsed.is_file or parsed.is_hub) or part:
        why = "is sliced already" if part else "is no file of yours"
        raise UserError(
            f"config: data.validation is empty and {source!r} {why}; name what is held out with "
            "--config.data.validation=…"
        )
    if parsed.is_hub:
        split = split or "train"  # what is held out must not be another split
        count = len(load_rows(name, split))
        name = f"{name}@{split}"
    else:
        count = count_rows(name)
    few = round(0.95 * count) == count
    _say_once(f"held out: the last {'record' if few else '5 %'} of {name}")
    return (f"{name}[:-1]", f"{name}[-1:]") if few else (f"{name}[:95%]", f"{name}[95%:]")


@functools.cache
def _say_once(line: str) -> None:
    """Prints what a process would else say for every cell of a sweep."""
    print(line, flush=True)


def check_unrendered(
    what: str, records: Sequence[Conversation | Pair | Prompt], tokenizer: Tokenizer
) -> None:
    """Says how many records spell what a chat is rendered with, which there is text like any other.

    Raises:
        UserError: more than half of them are rendered chats already.
    """
    marks = tokenizer.marks
    spelled, rendered = [], 0
    for record in records:
        messages = record.prompt if isinstance(record, Pair) else record.messages
        texts = [message.content.strip() for message in messages]
        if isinstance(record, Pair):
            texts += [record.chosen.strip(), record.rejected.strip()]
        spelt = next((mark for mark in marks if any(mark in text for text in texts)), None)
        if spelt is not None:
            spelled.append((record.id, spelt))
            rendered += any(text.startswith(marks) or text.endswith(marks) for text in texts)
    if not spelled:
        return
    name, mark = spelled[0]
    line = f"{what}: {len(spelled):,} of {len(records):,} records spell what marks turns in a chat "
    line += f"(first {name!r}: {mark!r})"
    if 2 * rendered > len(records):
        raise UserError(
            f"{line}: they are rendered already, and would be rendered once more; give the "
            "messages alone, without the chat template's text"
        )
    print(f"warning: {line}, which is read and trained as ordinary text", flush=True)
