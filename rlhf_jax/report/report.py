"""The report of a run: one self-contained HTML file made from the run directory's files.

Every text that came from a model, a data set or a user is escaped, there is no script, and the
page's own policy forbids loading anything, so a hostile prompt stays text.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.report.changes import format_change, format_interval, judge_changes, rows_of
from rlhf_jax.report.curves import draw_training_curves
from rlhf_jax.report.figure import to_float
from rlhf_jax.report.page import render_page
from rlhf_jax.report.plots import draw
from rlhf_jax.report.run_files import Run, flatten, read_lineage, read_run
from rlhf_jax.report.tables import (
    METRICS,
    format_columns,
    format_metric,
    format_numbers,
    format_percent,
    join_turns,
    make_printable,
)

SAMPLES = 12  # shown in file order
DROPS = 4  # shown because their score fell most
TILES = 8
ABOVE, BELOW = "230 159 0", "0 114 178"  # orange and blue of the figures
OPACITY = 0.5  # of the fullest colour behind a token: text stays readable on it, light or dark


def write_report(workdir: str | os.PathLike[str], summary: Mapping[str, Any] | None = None) -> Path:
    """Writes `report.html` into a run directory, atomically, and returns its path.

    Args:
        workdir: the run directory.
        summary: the future contents of summary.json, which is written last; read if None.

    Raises:
        UserError: when a file of the run directory is missing or not what it should be.
        NoRoom: the disk is full.
    """
    directory = Path(workdir)
    run = read_run(directory, summary)
    lineage = read_lineage(run, directory)
    models = models_before(run)
    page = render_page(
        "report.html.jinja",
        run=run,
        lineage=lineage,
        tiles=list_tiles(run),
        verdict=judge_win_rate(run.metrics),
        judged=judge_changes(run.metrics),
        models=models,
        compared=rows_of(run.metrics, run.evaluation.get("others", {}), models),
        entries={name: draw_section(run.evaluation, name) for name in ("changes", "evaluation")},
        token_views=colour_tokens(run.evaluation.get("token_views", [])),
        timeline=[format_timeline(entry) for entry in run.evaluation.get("timeline", [])],
        training=draw_training_curves(run.records),
        ancestry=[
            plot
            for parent in lineage[:-1]
            for plot in draw_training_curves(
                parent.records, titles=["Loss"], suffix=f" · {parent.name}"
            )
        ],
        samples=run.samples[:SAMPLES],
        drops=find_largest_drops(run.samples[SAMPLES:]),
        config=flatten(run.config),
        origin=list_origin(run.summary.get("made_from", {})),
    )
    write_whole(directory / "report.html", page.encode())
    return directory / "report.html"


def describe_environment() -> dict[str, str]:
    """Returns versions and machine, for `summary["environment"]`."""
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


def models_before(run: Run) -> list[str]:
    """The names of the models that a run measured beside its own, the one it started from last."""
    others = [name for name in run.evaluation.get("others", {}) if name != run.name]
    start = run.summary.get("parents", {}).get("policy")
    return others or ([Path(start).name] if start else [])


def list_tiles(run: Run) -> list[dict[str, str]]:
    """Returns the first numbers of the report, with interval, value before, and change."""
    tiles = []
    for name in [name for name in METRICS if name in run.metrics][:TILES]:
        label, unit, _ = METRICS[name]
        tile = {"label": label, "unit": unit, "value": format_metric(name, run.metrics[name])}
        if f"{name}_low" in run.metrics and f"{name}_high" in run.metrics:
            ends = (format_metric(name, run.metrics[f"{name}_{end}"]) for end in ("low", "high"))
            tile["interval"] = " – ".join(ends)
        short = name.removeprefix("eval/")
        if f"before/{short}" in run.metrics:
            tile["before"] = f"{format_metric(name, run.metrics[f'before/{short}'])} before"
            change = format_change(name, run.metrics[f"change/{short}"])
            tile["change"] = f"{change} ({format_interval(name, run.metrics)})"
        tiles.append(tile)
    return tiles


def judge_win_rate(metrics: Mapping[str, float]) -> str:
    """Says in one sentence whether alignment helped, as strongly as the interval allows."""
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


def draw_section(evaluation: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
    """Returns the figures, drawn, and the tables, formatted, of a section of evaluation.json."""
    plots, tables = (
        [entry for entry in evaluation.get(key, []) if entry.get("section", "evaluation") == name]
        for key in ("plots", "tables")
    )
    return {
        "plots": [draw(spec) for spec in plots],
        "tables": [{**table, "rows": format_columns(table["rows"])} for table in tables],
    }


def find_largest_drops(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the samples whose score fell most from the last but one model to the last."""

    def change(sample: dict[str, Any]) -> float:
        scores = list(sample.get("scores", {}).values())
        return scores[-1] - scores[-2] if len(scores) > 1 else 0.0

    return [sample for sample in sorted(samples, key=change)[:DROPS] if change(sample) < 0]


def colour_tokens(views: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the `token_views` of evaluation.json with a line per quantity, a colour per token.

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
            sizes = (abs(to_float(value)) for value in values)
            scales[name] = max([scales.get(name, 0.0), *filter(isfinite, sizes)])

    def colour(text: str, name: str, value: float) -> dict[str, str]:
        share = abs(value) / scales[name] if isfinite(value) and scales[name] else 0.0
        hue = ABOVE if value > 0 else BELOW
        return {
            "text": make_printable(text).replace("\n", "↵"),
            "number": f"{name} {format_numbers([value])[0]}",
            "color": f"rgb({hue} / {OPACITY * share:.3f})" if share else "",
        }

    def colour_line(view: Mapping[str, Any], name: str) -> dict[str, Any]:
        pairs = zip(view["tokens"], map(to_float, view["values"][name]), strict=True)
        tokens = [colour(text, name, value) for text, value in pairs]
        return {"name": name, "scale": scales[name], "tokens": tokens}

    return [{**view, "lines": [colour_line(view, n) for n in view["values"]]} for view in views]


def format_timeline(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry of `timeline` in evaluation.json as a table: step, answer, each score."""
    answers = entry["answers"]
    names = list(dict.fromkeys(name for answer in answers for name in answer.get("scores", {})))
    rows = [
        [
            f"{answer['step']:,}",
            answer["text"],
            *(to_float(answer.get("scores", {}).get(name)) for name in names),
        ]
        for answer in answers
    ]
    return {"prompt": join_turns(entry["prompt"]), "scores": names, "rows": format_columns(rows)}


def list_origin(made_from: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the rows that say what a run was made from: versions, then digests of inputs."""
    stated = dict(made_from) | {"commit": made_from.get("commit") or "no git checkout"}
    names = [name for name in ("version", "commit", "code") if name in made_from]
    rows = [(f"rlhf_jax {name}", str(stated[name])) for name in names]
    rows += [(f"init.{role}", digest) for role, digest in made_from.get("parents", {}).items()]
    return rows + list(made_from.get("contents", {}).items())
