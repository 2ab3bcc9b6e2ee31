"""What a filtering writes: what is kept, where each record came from, and what went and why."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.records import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_json, write_jsonl, write_whole
from rlhf_jax.filter.pipeline import Fate, Step
from rlhf_jax.filter.records import Bad, Item, to_json, turns_of
from rlhf_jax.report.page import render_page
from rlhf_jax.report.tables import format_percent, print_table

EXAMPLES = 3  # of a reason
SHOWN = 400  # characters of an example
BAD = "not read"
_COLUMNS = ("reason", "count", "of all")


def check_out(out: Path) -> None:
    """UserError if the directory that is to be written holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name another directory with --out")


def write_report(
    out: Path,
    source: str,
    items: Sequence[Item],
    bad: Sequence[Bad],
    steps: Sequence[Step],
    fates: Mapping[int, Fate],
) -> None:
    """Writes the files of `out` and prints the counts.

    Raises:
        UserError: nothing is left.
    """
    counts = _count(items, bad, steps, fates)
    kept = [i for i in range(len(items)) if i not in fates]
    if not kept:
        went = ", ".join(f"{each['gone']:,} {each['reason']}" for each in counts if each["gone"])
        raise UserError(f"{source}: no records are left of {len(items) + len(bad):,}: {went}")
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "kept.jsonl", [to_json(items[i].record) for i in kept])
    write_jsonl(out / "lineage.jsonl", _lineage(items, bad, fates))
    read = len(items) + len(bad)
    said = {"data": source, "read": read, "kept": len(kept), "reasons": counts}
    write_json(out / "report.json", said)
    table = [[each["reason"], each["gone"], format_percent(each["gone"] / read)] for each in counts]
    table += [["kept", len(kept), format_percent(len(kept) / read)], ["read", read, ""]]
    rules = [f": {each['rule']}" for each in counts] + ["", ""]
    page = render_page(
        "filter.html.jinja",
        **said,
        columns=_COLUMNS,
        rows=[
            [row[0] + rule, f"{row[1]:,}", row[2]] for row, rule in zip(table, rules, strict=True)
        ],
        command=shlex.join(["python", *sys.orig_argv[1:]]),
    )
    write_whole(out / "report.html", page.encode())
    print_table(f"{source}: what went, by its first reason", _COLUMNS, table)
    print(f"{out / 'kept.jsonl'} has {len(kept):,} records; {out / 'report.html'} says what went")


def _count(
    items: Sequence[Item], bad: Sequence[Bad], steps: Sequence[Step], fates: Mapping[int, Fate]
) -> list[dict[str, Any]]:
    """Each reason's name, rule, count and first examples, in the order of the filters."""
    counts: list[dict[str, Any]] = []
    if bad:
        shown = [
            {"place": f"{b.source}:{b.line}", "why": b.why, "text": ""} for b in bad[:EXAMPLES]
        ]
        counts.append(
            {
                "reason": BAD,
                "rule": "no record, a tie, or a prompt without an answer",
                "gone": len(bad),
                "examples": shown,
            }
        )
    for step in steps:
        gone = [i for i, fate in fates.items() if fate.reason == step.reason]
        shown = [
            {"place": items[i].place, "why": fates[i].why, "text": _excerpt(items[i])}
            for i in gone[:EXAMPLES]
        ]
        entry = {"reason": step.reason, "rule": step.rule, "gone": len(gone), "examples": shown}
        counts.append(entry)
    return counts


def _excerpt(item: Item) -> str:
    """The end of a record's text, as long as is shown, of a pair with the chosen reply."""
    turns = turns_of(item.record)
    text = "\n".join(turns[:-1] if isinstance(item.record, Pair) else turns)
    return text if len(text) <= SHOWN else "…" + text[1 - SHOWN :]


def _lineage(
    items: Sequence[Item], bad: Sequence[Bad], fates: Mapping[int, Fate]
) -> list[dict[str, Any]]:
    """A line for each that was read: where it stood, and its line in kept.jsonl or why it went."""
    lines, kept = [], 0
    for index, item in enumerate(items):
        where = {"source": item.source, "line": item.line, "id": item.record.id}
        if index in fates:
            lines.append(where | {"reason": fates[index].reason, "why": fates[index].why})
        else:
            kept += 1
            lines.append(where | {"kept": kept})
    return lines + [{"source": b.source, "line": b.line, "reason": BAD, "why": b.why} for b in bad]
