"""Several runs on one page: reward against KL, their numbers, configurations and answers.

Read of each run directory: config.json, summary.json, samples.jsonl as `report.py` says, and the
points of its frontier, from the first of these that has any:

    evaluation.json  "frontier": {"kl": […], "gold": […]?, "proxy": […]?, "bound": bool?}, e.g. of
                     best of n, whose KL is known as a bound only
    metrics.jsonl    the lines with "eval/kl" and "eval/gold_reward" or "eval/proxy_reward"
    summary.json     the same names among its metrics: one point
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.report.figure import Plot
from rlhf_jax.report.figure import number as finite
from rlhf_jax.report.frontier import frontier, peak
from rlhf_jax.report.page import template
from rlhf_jax.report.report import SAMPLES, Run, flatten, number, read_run
from rlhf_jax.report.tables import format_seconds, print_summary, printable, prompt_text

COLUMNS = (
    "run", "stage", "steps", "wall time", "gold reward", "proxy reward", "√KL", "KL",
    "peak gold", "at KL", "gold win rate", "response length",
)  # fmt: skip
REWARDS = {"gold": "eval/gold_reward", "proxy": "eval/proxy_reward"}


@dataclass(frozen=True)
class Comparison:
    """What the page shows. Of `fields` each row is a config field and its text in every run."""

    names: list[str]
    rows: list[list[str]]
    plot: Plot | None
    fields: list[list[str]]
    partial: list[list[str]]
    samples: list[dict[str, Any]]


def compare(workdirs: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Reads the runs and sets them side by side.

    Raises:
        UserError: when one is no run directory, is named twice, or holds a broken file.
    """
    runs = read_runs(workdirs)
    points = {name: frontier_points(name, run) for name, run in runs.items()}
    drawn = {name: each for name, each in points.items() if each["kl"]}
    without = [name for name in runs if name not in drawn]
    note = f"No KL to the reference was measured of {', '.join(without)}." if without else ""
    title = "Gold and proxy reward against √KL"
    fields, partial = config_differences({name: run.config for name, run in runs.items()})
    return Comparison(
        names=list(runs),
        rows=[row(name, run, points[name]) for name, run in runs.items()],
        plot=frontier(title, series=drawn, wide=True, note=note) if drawn else None,
        fields=fields,
        partial=partial,
        samples=shared_samples(runs),
    )


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Writes the page, atomically, and returns its path.

    Raises:
        UserError: when there cannot be a file at `path`.
        NoRoom: the disk is full.
    """
    out = Path(path)
    if not out.name:
        raise UserError(f"cannot write {str(path)!r}: it names no file")
    try:
        write_whole(out, render(comparison).encode())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return out


def render(comparison: Comparison) -> str:
    """The page as text."""
    return template("compare.html.jinja").render(c=comparison, columns=COLUMNS)


def print_comparison(comparison: Comparison) -> None:
    """Prints the table, a column a run."""
    columns = [printable(name) for name in comparison.names]
    across = list(zip(*comparison.rows, strict=True))[1:]
    rows = [
        (label, *map(printable, cells)) for label, cells in zip(COLUMNS[1:], across, strict=True)
    ]
    print_summary("Comparison", ["", *columns], rows)


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """The runs by the name of their directory, by the path as given where two have one name."""
    paths = [Path(workdir) for workdir in workdirs]
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    runs: dict[str, Run] = {}
    for i, path in enumerate(paths):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{path} is named twice")
        name = names[i] if names.count(names[i]) == 1 else str(path)
        runs[name] = read_run(path)
    return runs


def frontier_points(name: str, run: Run) -> dict[str, Any]:
    """{"kl", "gold"?, "proxy"?, "bound"} of a run; `kl` is empty where none was measured."""
    if "frontier" in run.evaluation:
        return _checked(name, run.evaluation["frontier"])
    lines = [r for r in run.records if "eval/kl" in r and any(k in r for k in REWARDS.values())]
    if not lines and "eval/kl" in run.metrics:
        lines = [run.metrics]
    rewards = {
        key: [line.get(metric) for line in lines]
        for key, metric in REWARDS.items()
        if any(metric in line for line in lines)
    }
    kl = [line["eval/kl"] for line in lines] if rewards else []
    return {"kl": kl, **rewards, "bound": False}


def row(name: str, run: Run, points: Mapping[str, Any]) -> list[str]:
    """A run's line of the table, in the order of `COLUMNS`.

    Rewards and KL are those of the frontier's last point, or without a frontier the summary's: one
    may be of sampled answers and the other of greedy ones, or even of another model.
    """
    metrics = run.metrics
    if points["kl"]:
        final = {key: finite((points.get(key) or [None])[-1]) for key in ("kl", *REWARDS)}
    else:
        measured = {"kl": "eval/kl", **REWARDS}
        final = {key: finite(metrics.get(metric)) for key, metric in measured.items()}
    kl = final["kl"]
    bound = "≤ " if points["kl"] and points["bound"] else ""
    return [
        name,
        str(run.summary.get("stage", "–")),
        f"{int(run.records[-1]['step']):,}" if run.records else "–",
        format_seconds(run.summary.get("wall_seconds")),
        *(number(metric, final[key]) for key, metric in REWARDS.items()),
        _with_bound(bound, sqrt(max(0.0, kl)) if isfinite(kl) else kl),
        _with_bound(bound, kl),
        *_peak(points),
        _win_rate(metrics),
        number("eval/response_length", finite(metrics.get("eval/response_length"))),
    ]


def config_differences(
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[list[list[str]], list[list[str]]]:
    """The fields in which the configs differ: those that all of them have, and the others."""
    flat = [dict(flatten(config)) for config in configs.values()]
    every: list[list[str]] = []
    some: list[list[str]] = []
    for field in dict.fromkeys(field for config in flat for field in config):
        values = [config.get(field) for config in flat]
        if len(set(values)) > 1:
            cells = [field, *("–" if value is None else value for value in values)]
            (some if None in values else every).append(cells)
    return every, some


def shared_samples(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Answers of the runs' own (last) models to prompts that two or more of them answered.

    The prompts that most runs share come first, else in the order of the files.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for sample in run.samples:
            if not sample["responses"]:
                continue
            entry = found.setdefault(
                prompt_text(sample["prompt"]),
                {"prompt": sample["prompt"], "responses": {}, "scores": {}},
            )
            model = list(sample["responses"])[-1]
            if name not in entry["responses"]:
                entry["responses"][name] = sample["responses"][model]
                if model in sample.get("scores", {}):
                    entry["scores"][name] = sample["scores"][model]
    shared = [entry for entry in found.values() if len(entry["responses"]) > 1]
    return sorted(shared, key=lambda entry: -len(entry["responses"]))[:SAMPLES]


def _checked(name: str, points: Any) -> dict[str, Any]:
    """The frontier of an evaluation.json, if it is one."""
    if not isinstance(points, Mapping) or not isinstance(points.get("kl"), list):
        raise UserError(f"{name}/evaluation.json: frontier must be an object with a list kl")
    result = {"kl": points["kl"], "bound": bool(points.get("bound"))}
    for key in REWARDS:
        values = points.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(points["kl"]):
            raise UserError(f"{name}/evaluation.json: frontier.{key} must be as long as kl")
        result[key] = values
    try:
        for key in ("kl", *REWARDS):
            for value in result.get(key, []):
                finite(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}/evaluation.json: frontier.{key}: {error}") from error
    return result


def _with_bound(bound: str, value: float) -> str:
    text = number("eval/kl", value)
    return text if text == "–" else bound + text


def _peak(points: Mapping[str, Any]) -> tuple[str, str]:
    """The largest gold reward of a curve, and the KL there; a single point has no peak."""
    gold = points.get("gold") or []
    best = peak(gold)
    if best is None or len(gold) < 2:
        return "–", "–"
    kl = _with_bound("≤ " if points["bound"] else "", finite(points["kl"][best]))
    return number(REWARDS["gold"], finite(gold[best])), kl


def _win_rate(metrics: Mapping[str, Any]) -> str:
    name = "eval/gold_win_rate"
    rate, low, high = (number(name, finite(metrics.get(name + e))) for e in ("", "_low", "_high"))
    return rate if "–" in (low, high) else f"{rate} ({low} – {high})"
