"""The report of a run: one self-contained HTML file made from the files of the run directory.

What is read (all but config.json may be missing, and its section is then left out):

    config.json      the configuration, nested
    summary.json     as in the run directory's contract, and optionally
                       "command": str, "environment": {name: text},
                       "made_from": {"version", "commit", "code": digest,
                         "contents": {what: digest}, "parents": {role: digest}};
                     "parents": {role: workdir or {"workdir", "config_hash"}}
    metrics.jsonl    one object a logged step, with "step" (and "time/resumed" after a restart)
    samples.jsonl    {"prompt": text or [{"role", "content"}], "responses": {model: text},
                      "scores": {model: number} (optional)}, models from the first to the last
    evaluation.json  {"tables": [{"title", "columns", "rows", "note"?, "section"?}],
                      "plots": [{"kind", "title", "note"?, "section"?, …arguments of the function
                                 of that name in plots.py}]}
                     section "changes" puts an entry under "What changed", else "Evaluation";
                     "token_views": [{"title", "prompt": as in samples.jsonl, "tokens": [text],
                       "values": {"advantage" or another quantity: [number or None a token]}}],
                       coloured token by token;
                     "timeline": [{"prompt": as in samples.jsonl,
                       "answers": [{"step", "text", "scores": {name: number} (optional)}]}],
                       the answers to the same prompts as training went on;
                     "frontier": see compare.py, which alone reads it

A damaged line of metrics.jsonl or samples.jsonl is left out, with a warning.

Every text that came from a model, a data set or a user is escaped, there is no script, and the
page's own policy forbids loading anything, so a hostile prompt stays text.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import (
    SUMMARY_FIELDS,
    check_fields,
    numbers,
    read_lines,
    read_object,
    write_whole,
)
from rlhf_jax.report.figure import number as finite
from rlhf_jax.report.page import template
from rlhf_jax.report.plots import draw, training_curves
from rlhf_jax.report.tables import (
    format_numbers,
    format_percent,
    format_seconds,
    printable,
    prompt_text,
)

SAMPLES = 12  # shown in file order
DROPS = 4  # shown because their score fell most

# name in summary.json: what a reader calls it, its unit, its format
METRICS: dict[str, tuple[str, str, str]] = {
    "eval/gold_win_rate": ("Gold win rate", "against the starting model", ".1%"),
    "eval/gold_reward": ("Gold reward", "held-out prompts", ".3f"),
    "eval/correct/facts": ("Facts right", "told in raw text only", ".1%"),
    "eval/pass_at_1": ("Pass@1", "held out", ".1%"),
    "eval/accuracy": ("Accuracy", "held out", ".1%"),
    "eval/reward_model/accuracy": ("Reward model's accuracy", "same pairs", ".1%"),
    "eval/bpb": ("Bits per byte", "held out", ".3f"),
    "eval/loss": ("Loss", "nats a token, held out", ".3f"),
    "eval/token_accuracy": ("Token accuracy", "held out", ".1%"),
    "eval/kl": ("KL to the reference", "nats a sequence", ".2f"),
    "eval/response_length": ("Response length", "tokens", ".1f"),
    "eval/proxy_reward": ("Proxy reward", "what was trained on", ".3f"),
    "eval/ece": ("Calibration error", "ECE", ".3f"),
    "eval/eos_rate": ("Finished answers", "ended by the model", ".1%"),
    "train/tokens_per_second": ("Throughput", "tokens/s", ",.0f"),
}
NOT_COMPARED = ("eval/gold_win_rate", "eval/loss", "eval/token_accuracy", "train/tokens_per_second")
TILES = 8
ABOVE, BELOW = "230 159 0", "0 114 178"  # orange and blue of the figures
OPACITY = 0.5  # of the fullest colour behind a token: text stays readable on it, light or dark


# Older versions kept a parent's hash beside its directory.
_SUMMARY_FIELDS = SUMMARY_FIELDS | {
    "parents": {"role": str | dict},
    "made_from": {"what": str | dict},
    "command": str,
    "environment": dict,
}


@dataclass(frozen=True)
class Run:
    """What a run directory holds. `missing` says why a parent could not be read, else ""."""

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


def write_report(workdir: str | os.PathLike[str], summary: Mapping[str, Any] | None = None) -> Path:
    """Writes `report.html` into a run directory, atomically, and returns its path.

    Args:
        workdir: the run directory.
        summary: what summary.json will hold, since it is written last; read from there if None.

    Raises:
        UserError: when a file of the run directory is missing or not what it should be.
        NoRoom: the disk is full.
    """
    directory = Path(workdir)
    path = directory / "report.html"
    write_whole(path, render(directory, summary).encode())
    return path


def render(directory: Path, summary: Mapping[str, Any] | None = None) -> str:
    """The report of a run directory as text; see `write_report`."""
    run = read_run(directory, summary)
    lineage = read_lineage(run, directory)
    recorded = [p for r in lineage for p in r.summary.get("parents", {}).values()]
    return template("report.html.jinja").render(
        run=run,
        lineage=[_ancestor(r, recorded) for r in lineage],
        tiles=headlines(run, lineage[:-1]),
        verdict=verdict(run.metrics),
        stages=stage_table(lineage),
        entries={name: section(run.evaluation, name) for name in ("changes", "evaluation")},
        token_views=token_views(run.evaluation.get("token_views", [])),
        timeline=[over_time(entry) for entry in run.evaluation.get("timeline", [])],
        training=training_curves(run.records),
        ancestry=[
            plot
            for parent in lineage[:-1]
            for plot in training_curves(parent.records, titles=["Loss"], suffix=f" · {parent.name}")
        ],
        samples=run.samples[:SAMPLES],
        drops=largest_drops(run.samples[SAMPLES:]),
        config=flatten(run.config),
        origin=_origin(run.summary.get("made_from", {})),
        numbers=sorted(run.metrics.items()),
    )


def read_run(directory: Path, summary: Mapping[str, Any] | None = None) -> Run:
    """Reads the files of a run directory."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json")
    return Run(
        name=directory.resolve().name,
        config=_read_json(directory / "config.json"),
        summary=_read_summary(directory / "summary.json") if summary is None else dict(summary),
        records=[line for _, line in read_lines(directory / "metrics.jsonl", numbers)],
        samples=read_samples(directory),
        evaluation=_read_json(directory / "evaluation.json"),
    )


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's samples.jsonl."""
    return [sample for _, sample in read_lines(directory / "samples.jsonl", _sample)]


def read_lineage(run: Run, directory: Path) -> list[Run]:
    """The run's ancestors, oldest first, each once, and the run itself last.

    A parent is looked for where the summary says, then next to the run (directories get moved).
    """
    found: dict[str, Run] = {}

    def visit(child: Run, home: Path) -> None:
        for parent in child.summary.get("parents", {}).values():
            path = Path(_parent_path(parent))
            path = path if path.is_dir() else home.resolve().parent / path.name
            key = str(path.resolve())
            if key in found or path.resolve() == directory.resolve():
                continue
            if (path / "config.json").is_file():
                ancestor = read_run(path)
                visit(ancestor, path)
                found[key] = ancestor
            else:
                found[key] = Run(path.name, {}, {}, [], [], {}, missing=f"not found at {path}")

    visit(run, directory)
    return [*found.values(), run]


def environment() -> dict[str, str]:
    """Versions and machine, for `summary["environment"]`. Starts no JAX backend of its own."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
    }


def headlines(run: Run, ancestors: Sequence[Run]) -> list[dict[str, str]]:
    """The first numbers of the report, with interval, and the value of the nearest ancestor."""
    tiles = []
    for name in [name for name in METRICS if name in run.metrics][:TILES]:
        label, unit, _ = METRICS[name]
        tile = {"label": label, "unit": unit, "value": number(name, run.metrics[name])}
        if f"{name}_low" in run.metrics and f"{name}_high" in run.metrics:
            low, high = run.metrics[f"{name}_low"], run.metrics[f"{name}_high"]
            tile["interval"] = f"{number(name, low)} – {number(name, high)}"
        before = [a for a in ancestors if name in a.metrics]
        if before and name not in NOT_COMPARED:
            tile["before"] = f"{number(name, before[-1].metrics[name])} after {before[-1].name}"
        tiles.append(tile)
    return tiles


def verdict(metrics: Mapping[str, float]) -> str:
    """One sentence on whether alignment helped, as strong as the interval allows."""
    name = "eval/gold_win_rate"
    if not {name, f"{name}_low", f"{name}_high"} <= set(metrics):
        return ""
    rate, low, high = (format_percent(metrics[name + end]) for end in ("", "_low", "_high"))
    text = (
        f"On held-out prompts the gold scorer prefers this model to the one it started from in "
        f"{rate} of cases, ties counting half (95 % interval {low} to {high})"
    )
    if metrics[f"{name}_low"] > 0.5:
        return f"{text}."
    if metrics[f"{name}_high"] < 0.5:
        return f"{text}: it got worse."
    return f"{text}: no difference that this many prompts could show."


def stage_table(lineage: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows (metric, one value a stage) of every `eval/` metric that a stage reports."""
    present = {name for run in lineage for name in run.metrics if name.startswith("eval/")}
    order = list(METRICS)

    def rank(name: str) -> tuple[int, str]:
        whole = "/".join(name.split("/")[:2])
        return (order.index(whole) if whole in order else len(order), name)

    rows = []
    for name in sorted(present, key=rank):
        if name.endswith(("_low", "_high")):
            continue
        label = METRICS[name][0] if name in METRICS else name.removeprefix("eval/")
        label = label.replace("gold_reward/", "\u2003").replace("_", " ")
        rows.append((label, [number(name, run.metrics.get(name)) for run in lineage]))
    return rows


def section(evaluation: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
    """The figures, drawn, and the tables, formatted, of one section of evaluation.json."""

    def entries(key: str) -> list[Any]:
        return [e for e in evaluation.get(key, []) if e.get("section", "evaluation") == name]

    tables = [{**table, "rows": format_columns(table["rows"])} for table in entries("tables")]
    return {"plots": [draw(spec) for spec in entries("plots")], "tables": tables}


def largest_drops(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples whose score fell most from the last but one model to the last, worst first."""

    def change(sample: dict[str, Any]) -> float:
        scores = list(sample.get("scores", {}).values())
        return scores[-1] - scores[-2] if len(scores) > 1 else 0.0

    return [s for s in sorted(samples, key=change)[:DROPS] if change(s) < 0]


def token_views(views: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The texts of `token_views` in evaluation.json, a line a quantity, a colour a token.

    The colours of a quantity have one scale over all views: its largest size in any of them.
    """
    scales: dict[str, float] = {}
    for view in views:
        for name, values in view["values"].items():
            if len(values) != len(view["tokens"]):
                raise UserError(
                    f"evaluation.json: token view {view['title']!r} has {len(values)} numbers of "
                    f"{name!r} for {len(view['tokens'])} tokens"
                )
            sizes = (abs(finite(value)) for value in values)
            scales[name] = max([scales.get(name, 0.0), *filter(isfinite, sizes)])

    def token(text: str, name: str, value: float) -> dict[str, str]:
        share = abs(value) / scales[name] if isfinite(value) and scales[name] else 0.0
        return {
            "text": printable(text).replace("\n", "↵"),
            "number": f"{name} {format_numbers([value])[0]}",
            "color": f"rgb({ABOVE if value > 0 else BELOW} / {OPACITY * share:.3f})"
            if share
            else "",
        }

    return [
        {
            "title": view["title"],
            "prompt": view["prompt"],
            "lines": [
                {
                    "name": name,
                    "scale": scales[name],
                    "tokens": [
                        token(text, name, finite(value))
                        for text, value in zip(view["tokens"], values, strict=True)
                    ],
                }
                for name, values in view["values"].items()
            ],
        }
        for view in views
    ]


def over_time(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `timeline` in evaluation.json as a table: step, answer, and a column a score."""
    answers = entry["answers"]
    names = list(dict.fromkeys(name for answer in answers for name in answer.get("scores", {})))
    scores = [[finite(answer.get("scores", {}).get(name)) for name in names] for answer in answers]
    columns = [
        [f"{answer['step']:,}" for answer in answers],
        [answer["text"] for answer in answers],
    ]
    columns += [format_numbers(column) for column in zip(*scores, strict=True)]
    return {
        "prompt": prompt_text(entry["prompt"]),
        "scores": names,
        "rows": [list(row) for row in zip(*columns, strict=True)],
    }


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as (dotted name, value as JSON)."""
    rows = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return rows


def format_columns(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Table cells as text, the numbers of a column with the same decimals."""
    columns = [format_numbers(column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def number(name: str, value: float | None) -> str:
    """The value of a metric as text, in the metric's own format."""
    spec = METRICS[name][2] if name in METRICS else ".3f"
    if value is None or not isfinite(value):
        return "–"
    return format(value, spec).replace("%", "\u00a0%").replace("-", "\u2212")


def _ancestor(run: Run, recorded: Sequence[str | Mapping[str, str]]) -> dict[str, Any]:
    """A row of the lineage table, with a warning where a parent is no longer what was used."""
    own = run.summary.get("config_hash", "")
    used = {
        parent.get("config_hash", own)
        for parent in recorded
        if isinstance(parent, Mapping) and Path(parent["workdir"]).name == run.name
    }
    changed = "re-run since with another config" if used - {own} else ""
    return {
        "name": run.name,
        "stage": run.summary.get("stage", ""),
        "hash": own,
        "steps": f"{int(run.records[-1]['step']):,}" if run.records else "–",
        "wall": format_seconds(run.summary.get("wall_seconds")),
        "resumed": sum(bool(r.get("time/resumed")) for r in run.records),
        "warning": run.missing or changed,
    }


def _origin(made_from: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of what a run was made from: versions, then digests of its inputs."""
    stated = dict(made_from) | {"commit": made_from.get("commit") or "no git checkout"}
    names = [name for name in ("version", "commit", "code") if name in made_from]
    rows = [(f"rlhf_jax {name}", str(stated[name])) for name in names]
    rows += [(f"init.{role}", digest) for role, digest in made_from.get("parents", {}).items()]
    return rows + list(made_from.get("contents", {}).items())


def _parent_path(parent: str | Mapping[str, str]) -> str:
    return parent if isinstance(parent, str) else parent["workdir"]


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _read_summary(path: Path) -> dict[str, Any]:
    summary = _read_json(path)
    check_fields(path, summary, _SUMMARY_FIELDS, required=False)
    return summary


def _sample(line: dict[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl, which needs a prompt and responses."""
    if not isinstance(line["responses"], dict):
        raise TypeError
    return line | {"prompt": line["prompt"]}
