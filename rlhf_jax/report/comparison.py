"""Several runs on one page: reward against KL, their numbers, configurations and answers.

The files of each run directory are read as `run_files.py` says; the points of its frontier are
those of the first of these that has any:

    evaluation.json  "frontier": {"kl": […], "gold": […]?, "proxy": […]?, "bound": bool?}; bound
                     where KL is known as a bound only, as that of best of n is
    metrics.jsonl    the lines with "eval/kl" and "eval/gold_reward" or "eval/proxy_reward"
    summary.json     the same names among its metrics: one point
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.report.figure import Plot, to_float, to_floats
from rlhf_jax.report.frontier import draw_frontier, find_peak
from rlhf_jax.report.page import render_page
from rlhf_jax.report.report import SAMPLES
from rlhf_jax.report.run_files import Run, flatten, read_run
from rlhf_jax.report.tables import format_metric, join_turns, make_printable, print_table

COLUMNS = (
    "run", "stage", "steps", "wall time", "gold reward", "proxy reward", "√KL", "KL",
    "peak gold", "at KL", "gold win rate", "response length",
)  # fmt: skip
REWARDS = {"gold": "eval/gold_reward", "proxy": "eval/proxy_reward"}


@dataclass(frozen=True)
class Comparison:
    """The contents of the page.

    Attributes:
        names: the runs'.
        rows: a run's cells in the order of COLUMNS, for each run.
        plot: the frontier; None where no run has points.
        fields, partial: a config field and its text in every run, where runs differ: the fields
            that all runs have, and the others.
        samples: prompts with the answers of several runs.
    """

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
    points = {name: read_frontier(name, run) for name, run in runs.items()}
    series = {name: each for name, each in points.items() if each["kl"]}
    plot = None
    if series:
        plot = draw_frontier("Gold and proxy reward against √KL", series=series, wide=True)
        if without := [name for name in runs if name not in series]:
            note = f"No KL to the reference was measured of {', '.join(without)}."
            plot = replace(plot, note=note)
    fields, partial = find_config_differences({name: run.config for name, run in runs.items()})
    return Comparison(
        names=list(runs),
        rows=[format_run(name, run, points[name]) for name, run in runs.items()],
        plot=plot,
        fields=fields,
        partial=partial,
        samples=find_shared_samples(runs),
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
    page = render_page("comparison.html.jinja", c=comparison, columns=COLUMNS)
    try:
        write_whole(out, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return out


def print_comparison(comparison: Comparison) -> None:
    """Prints the table, with a column for each run."""
    across = zip(COLUMNS, zip(*comparison.rows, strict=True), strict=True)
    rows = [(label, *map(make_printable, cells)) for label, cells in across]
    print_table("Comparison", ["", *map(make_printable, comparison.names)], rows[1:])


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """Reads the runs, by the name of their directory, or its path where two have one name."""
    paths = [Path(workdir) for workdir in workdirs]
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    runs: dict[str, Run] = {}
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise UserError(f"{path} is named twice")
        runs[names[i] if names.count(names[i]) == 1 else str(path)] = read_run(path)
    return runs


def read_frontier(name: str, run: Run) -> dict[str, Any]:
    """Returns {"kl", "gold"?, "proxy"?, "bound"} of a run; `kl` is empty if none was measured."""
    if "frontier" in run.evaluation:
        return _check_frontier(name, run.evaluation["frontier"])
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


def format_run(name: str, run: Run, points: Mapping[str, Any]) -> list[str]:
    """Returns a run's line of the table, in the order of `COLUMNS`.

    Rewards and KL are those of the frontier's last point, or without a frontier the summary's. The
    summary's may be of greedy answers, not sampled ones, or even of another model.
    """
    metrics = run.metrics
    if points["kl"]:
        final = {key: to_float((points.get(key) or [None])[-1]) for key in ("kl", *REWARDS)}
    else:
        names = {"kl": "eval/kl", **REWARDS}
        final = {key: to_float(metrics.get(metric)) for key, metric in names.items()}
    kl, bound = final["kl"], bool(points["kl"]) and points["bound"]
    peak, gold = None, points.get("gold") or []
    if len(gold) > 1:  # a single point has no peak
        peak = find_peak(gold)
    rate = "eval/gold_win_rate"
    wins, low, high = (
        format_metric(rate, to_float(metrics.get(rate + end))) for end in ("", "_low", "_high")
    )
    return [
        name,
        str(run.summary.get("stage", "–")),
        run.steps,
        run.wall,
        *(format_metric(metric, final[key]) for key, metric in REWARDS.items()),
        _format_kl(sqrt(max(0.0, kl)) if isfinite(kl) else kl, bound),
        _format_kl(kl, bound),
        "–" if peak is None else format_metric(REWARDS["gold"], to_float(gold[peak])),
        "–" if peak is None else _format_kl(to_float(points["kl"][peak]), points["bound"]),
        wins if "–" in (low, high) else f"{wins} ({low} – {high})",
        format_metric("eval/response_length", to_float(metrics.get("eval/response_length"))),
    ]


def find_config_differences(
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the fields in which the configs differ: those that all of them have, the others."""
    flat = [flatten(config) for config in configs.values()]
    every: list[list[str]] = []
    some: list[list[str]] = []
    for field in dict.fromkeys(field for config in flat for field in config):
        values = [config.get(field) for config in flat]
        if len(set(values)) > 1:
            cells = [field, *("–" if value is None else value for value in values)]
            (some if None in values else every).append(cells)
    return every, some


def find_shared_samples(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Returns the runs' own (last) models' answers to prompts that two or more runs answered.

    The prompts that most runs share come first, else in the order of the files.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for sample in run.samples:
            if not sample["responses"]:
                continue
            entry = entries.setdefault(
                join_turns(sample["prompt"]),
                {"prompt": sample["prompt"], "responses": {}, "scores": {}},
            )
            model = list(sample["responses"])[-1]
            if name not in entry["responses"]:
                entry["responses"][name] = sample["responses"][model]
                if model in sample.get("scores", {}):
                    entry["scores"][name] = sample["scores"][model]
    shared = [entry for entry in entries.values() if len(entry["responses"]) > 1]
    return sorted(shared, key=lambda entry: -len(entry["responses"]))[:SAMPLES]


def _check_frontier(name: str, points: Any) -> dict[str, Any]:
    """Returns the frontier of an evaluation.json; a UserError says how it is none."""
    file = f"{name}/evaluation.json"
    if not isinstance(points, Mapping) or not isinstance(points.get("kl"), list):
        raise UserError(f"{file}: frontier must be an object with a list kl")
    frontier: dict[str, Any] = {"bound": bool(points.get("bound"))}
    for key in ("kl", *REWARDS):
        values = points.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(points["kl"]):
            raise UserError(f"{file}: frontier.{key} must be as long as kl")
        try:
            to_floats(values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: frontier.{key}: {error}") from error
        frontier[key] = values
    return frontier


def _format_kl(value: float, bound: bool) -> str:
    text = format_metric("eval/kl", value)
    return f"≤ {text}" if bound and text != "–" else text
