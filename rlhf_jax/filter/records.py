"""Records with the places where they were read, and the JSON that the same reader reads again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_jax.data.calls import render_call
from rlhf_jax.data.jsonl import read_jsonl, take_slice
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text, convert_all
from rlhf_jax.hub.hub_data import load_rows
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.sources import parse_source, split_sources

_LABELS = ("true", "false", "1", "0", "1.0", "0.0")  # as `meta` has what "preference" reads


@dataclass(frozen=True)
class Item:
    """A record, the file or data set where it was read, and its line or number there, from 1."""

    record: Record
    source: str
    line: int

    @property
    def place(self) -> str:
        """ "chats.jsonl:12"."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Bad:
    """A line that holds no record, and what is wrong with it."""

    source: str
    line: int
    why: str


def read_items(
    sources: str, kind: str, max_bad_fraction: float = 0.0, columns: Mapping[str, str] | None = None
) -> tuple[list[Item], list[Bad]]:
    """The records of sources, which are named as `data.train` names them, and their bad lines.

    Args:
        sources: files and data sets, parted by commas; a data set's split is "train" if none is
            stated.
        kind: as `jsonl.read_jsonl` takes it.

    Raises:
        UserError: a source cannot be read, or more than that share of a file's lines is bad.
    """
    items: list[Item] = []
    bad: list[Bad] = []
    for each in filter(None, split_sources(sources)):
        name, split, part = parsed = parse_source(each)
        split = split or "train"
        if not (parsed.is_file or parsed.is_hub):
            made = load_records(name, split + part, kind="pair" if kind == "hh" else kind)
            of_kind = "pair" if kind in ("hh", "preference") else kind
            there = f"{name}@{split}{part}"
            records = convert_all(made, of_kind, there)
            items += [Item(record, there, n) for n, record in enumerate(records, 1)]
            continue
        there = name if parsed.is_file else f"{name}@{split}"
        lines: list[int] = []
        no_records: list[Bad] = []
        records = read_jsonl(
            name,
            kind,
            max_bad_fraction=max_bad_fraction,
            rows=load_rows(name, split) if parsed.is_hub else None,
            columns=columns or {},
            told=partial(_note, there, lines, no_records),
        )
        numbers = range(len(records))
        taken = take_slice(numbers, part, name) if part else numbers
        items += [Item(records[i], there, lines[i]) for i in taken]
        # A slice is of records: of other lines it has those among its own, and those at an end.
        begin = lines[taken[0]] if taken[0] else 0
        end = lines[taken[-1]] if taken[-1] < len(lines) - 1 else math.inf
        bad += [each for each in no_records if begin <= each.line <= end]
    return items, bad


def _note(source: str, lines: list[int], bad: list[Bad], line: int, why: str) -> None:
    if why:
        bad.append(Bad(source, line, why))
    else:
        lines.append(line)


def to_json(record: Record) -> dict[str, Any]:
    """The object that `jsonl.read_jsonl` reads as this record; all of one kind have one shape."""
    fields: dict[str, Any] = {"id": record.id}
    match record:
        case Text():
            fields["text"] = record.text
        case Pair():
            fields |= _turns("prompt", record.prompt)
            fields |= {"chosen": record.chosen, "rejected": record.rejected}
            if record.margin is not None:
                fields["margin"] = record.margin
        case Conversation() | Prompt():
            fields |= _turns("messages", record.messages)
    meta = dict(record.meta)
    if meta.get("label") in _LABELS:
        fields["label"] = json.loads(meta.pop("label"))
    return fields | ({"meta": meta} if meta else {})


def _turns(name: str, messages: Sequence[Message]) -> dict[str, Any]:
    """The messages under a name, and the tools that the first one carries beside them."""
    turns = [message.to_json() for message in messages]
    tools = turns[0].pop("tools", None)
    return {name: turns} | ({"tools": tools} if tools else {})


def turns_of(record: Record) -> list[str]:
    """The texts of a record: its turns, both replies of a pair, or the one document.

    Calls of tools are part of the turn that makes them, in our own format.
    """
    match record:
        case Text():
            return [record.text]
        case Pair():
            return [*map(_said, record.prompt), record.chosen, record.rejected]
    return [*map(_said, record.messages)]


def _said(message: Message) -> str:
    calls = json.loads(message.more or "{}").get("tool_calls", [])
    rendered = [render_call(**call["function"]) for call in calls]
    return "\n".join(filter(None, [message.content, *rendered]))


def trained_text(record: Record) -> str:
    """What filters of quality look at: the last reply, a pair's chosen one, or the whole text.

    Of a prompt it is the last turn.
    """
    return record.chosen if isinstance(record, Pair) else turns_of(record)[-1]
