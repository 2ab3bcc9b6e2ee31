"""Reads the files of a run directory that its report shows.

All but config.json may be missing, and their sections are then left out:

    config.json      the configuration, nested
    summary.json     as in the run directory's contract, and optionally
                       "command": str, "environment": {name: text},
                       "made_from": {"version", "commit", "code": digest,
                         "contents": {what: digest}, "parents": {role: digest}}
    metrics.jsonl    one object per logged step, with "step"
    samples.jsonl    {"prompt": text or [{"role", "content"}], "responses": {model: text},
                      "scores": {model: number} (optional)}, models from the first to the last
    evaluation.json  {"tables": [{"title", "columns", "rows", "note"?, "section"?}],
                      "plots": [{"kind", "title", "note"?, "section"?, …arguments of that kind's
                                 function: see plots.py}]}
                     section "changes" puts an entry under "What changed", else "Evaluation";
                     "token_views": [{"title", "prompt": as in samples.jsonl, "tokens": [text],
                       "values": {"advantage" or another quantity: [number or None per token]}}],
                       coloured token by token;
                     "timeline": [{"prompt": as in samples.jsonl,
                       "answers": [{"step", "text", "scores": {name: number} (optional)}]}],
                       the answers to the same prompts as training went on;
                     "others": {model: {metric without "eval/": number}}, what the run measured of
                       the models before its own;
                     "frontier": see comparison.py, which alone reads it

A damaged line of metrics.jsonl or samples.jsonl is left out, with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import SUMMARY_FIELDS, check_fields, numbers, read_lines, read_object
from rlhf_jax.report.tables import format_seconds, join_turns

_SUMMARY_FIELDS = SUMMARY_FIELDS | {
    "made_from": {"what": str | dict},
    "command": str,
    "environment": dict,
}


@dataclass(frozen=True)
class Run:
    """The contents of a run directory. `missing` says why a parent could not be read, else ""."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any]
    missing: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        return self.summary.get("metrics", {})

    @property
    def steps(self) -> str:
        """The last logged step, as text."""
        return f"{int(self.records[-1]['step']):,}" if self.records else "–"

    @property
    def wall(self) -> str:
        """The wall time, as text."""
        return format_seconds(self.summary.get("wall_seconds"))


def read_run(directory: Path, summary: Mapping[str, Any] | None = None) -> Run:
    """Reads a run directory; `summary` stands for a summary.json that is not written yet.

    Raises:
        UserError: a file is missing or not what it should be.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json")
    if summary is None:
        summary = _read_json(directory / "summary.json")
        check_fields(directory / "summary.json", summary, _SUMMARY_FIELDS, required=False)
    return Run(
        name=directory.resolve().name,
        config=_read_json(directory / "config.json"),
        summary=dict(summary),
        records=[line for _, line in read_lines(directory / "metrics.jsonl", numbers)],
        samples=read_samples(directory),
        evaluation=_read_json(directory / "evaluation.json"),
    )


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Reads the lines of a run directory's samples.jsonl."""
    return [sample for _, sample in read_lines(directory / "samples.jsonl", _check_sample)]


def read_lineage(run: Run, directory: Path) -> list[Run]:
    """Returns the run's ancestors, oldest first, each once, and the run itself last.

    A parent is looked for where the summary says, then next to the run (directories get moved).
    """
    ancestors: dict[Path, Run] = {}

    def visit(child: Run, home: Path) -> None:
        for parent in child.summary.get("parents", {}).values():
            path = Path(parent)
            path = path if path.is_dir() else home.resolve().parent / path.name
            place = path.resolve()
            if place in ancestors or place == directory.resolve():
                continue
            if (path / "config.json").is_file():
                ancestor = read_run(path)
                visit(ancestor, path)
            else:
                ancestor = Run(path.name, {}, {}, [], [], {}, missing=f"not found at {path}")
            ancestors[place] = ancestor

    visit(run, directory)
    return [*ancestors.values(), run]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns a nested configuration as dotted name → value as JSON."""
    values: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = json.dumps(value, ensure_ascii=False)
    return values


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _check_sample(line: dict[str, Any]) -> dict[str, Any]:
    """Returns a line of samples.jsonl, which needs a prompt and responses that can be shown."""
    texts, scores = line["responses"], line.get("scores", {})
    if not isinstance(texts, dict) or not isinstance(scores, dict):
        raise TypeError
    if not all(isinstance(text, str) for text in [join_turns(line["prompt"]), *texts.values()]):
        raise TypeError
    if not all(isinstance(score, int | float) for score in scores.values()):
        raise TypeError
    return line
