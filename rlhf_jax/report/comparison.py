"""Several runs on one page: reward against KL, their numbers, configurations and answers.

Runs that differ in their seed alone stand as one, with the mean of each number and its standard
deviation over them.

The files of each run directory are read as `run_files.py` says; the points of its frontier are
those of the first of these that has any:

    evaluation.json  "frontier": {"kl": […], "gold": […]?, "proxy": […]?, "bound": bool?}; bound
                     where KL is known as a bound only, as that of best of n is
    metrics.jsonl    the lines with "eval/kl" and "eval/gold_reward" or "eval/proxy_reward"
    summary.json     the same names among its metrics: one point, whose gold reward is of the
                     answers that were judged, by default greedy ones, and its KL of sampled ones
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import statistics
from collections import Counter
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
from rlhf_jax.report.tables import (
    format_metric,
    format_seconds,
    join_turns,
    make_printable,
    print_table,
)

COLUMNS = (
    "run", "stage", "steps", "wall time", "gold reward", "proxy reward", "√KL", "KL",
    "peak gold", "at KL", "gold win rate", "response length",
)  # fmt: skip
REWARDS = {"gold": "eval/gold_reward", "proxy": "eval/proxy_reward"}
JUDGED = (
    "is of the answers that were judged, greedy ones by default, not of the sampled ones whose KL "
    "it is drawn at."
)
_SEED = re.compile(r"[-_,. ]*seed[=_-]?\d+")
_LABEL, _COLUMN = 18, 14  # characters of the console's table


@dataclass(frozen=True)
class Comparison:
    """The contents of the page.

    Attributes:
        names: the runs', or those of seeds together.
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
    groups = group_seeds(read_runs(workdirs))
    runs = {name: next(iter(seeds.values())) for name, seeds in groups.items()}
    points = {
        name: [read_frontier(each, run) for each, run in seeds.items()]
        for name, seeds in groups.items()
    }
    means = {name: _mean_frontier(each) for name, each in points.items()}
    series = {name: each for name, each in means.items() if each["kl"]}
    plot = None
    if series:
        plot = draw_frontier("Gold and proxy reward against √KL", series=series, wide=True)
        notes = []
        if without := [name for name in runs if name not in series]:
            notes.append(f"No KL to the reference was measured of {', '.join(without)}.")
        if judged := [name for name in series if any(each["judged"] for each in points[name])]:
            notes.append(f"The gold reward of {', '.join(judged)} {JUDGED}")
        plot = replace(plot, note=" ".join(notes))
    configs = {name: run.config for name, run in runs.items()}
    if any(len(seeds) > 1 for seeds in groups.values()):
        configs = {name: _without_seed(config) for name, config in configs.items()}
    fields, partial = find_config_differences(configs)
    return Comparison(
        names=list(runs),
        rows=[format_runs(name, [*groups[name].values()], points[name]) for name in groups],
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
    """Prints the table, with a column for each run, in parts where they are too many for a line."""
    across = zip(COLUMNS, zip(*comparison.rows, strict=True), strict=True)
    rows = [(label, *map(make_printable, cells)) for label, cells in across][1:]
    names, each = [*map(make_printable, comparison.names)], shutil.get_terminal_size().columns
    each = max(1, (each - _LABEL) // _COLUMN)
    for start in range(0, len(names), each):
        part = slice(start + 1, start + 1 + each)
        shown = [[label, *cells[start : start + each]] for label, *cells in rows]
        print_table("Comparison", ["", *["", *names][part]], shown)


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """Reads the runs, by the name of their directory, or its path where two have one name.

    A pattern such as "runs/abl/*" stands for what it matches. What is there and is no run is left
    out, which is said.

    Raises:
        UserError: a path does not exist or is named twice, a pattern matches nothing, or none of it
            is a run.
    """
    matched: list[Path] = []
    for workdir in map(str, workdirs):
        found = [workdir] if os.path.exists(workdir) else sorted(glob.glob(workdir))
        if not found and glob.has_magic(workdir):
            raise UserError(f"{workdir} matches nothing")
        matched += map(Path, found or [workdir])
    skipped = [path for path in matched if path.exists() and not (path / "config.json").is_file()]
    paths = [path for path in matched if path not in skipped]
    if skipped and not paths:
        raise UserError(f"{skipped[0]} is not a run directory: it has no config.json")
    if skipped:
        print(f"left out, being no runs: {', '.join(map(str, skipped))}", flush=True)
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    runs: dict[str, Run] = {}
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise UserError(f"{path} is named twice")
        runs[names[i] if names.count(names[i]) == 1 else str(path)] = read_run(path)
    return runs


def read_frontier(name: str, run: Run) -> dict[str, Any]:
    """Returns {"kl", "gold"?, "proxy"?, "bound", "judged"} of a run; no KL was measured: `kl` = [].

    judged: whether the gold reward is of other answers than the KL, as the summary has them.
    """
    if "frontier" in run.evaluation:
        return _check_frontier(name, run.evaluation["frontier"])
    lines = [r for r in run.records if "eval/kl" in r and any(k in r for k in REWARDS.values())]
    judged = not lines and "eval/kl" in run.metrics
    if judged:
        lines = [run.metrics]
    rewards = {
        key: [line.get(metric) for line in lines]
        for key, metric in REWARDS.items()
        if any(metric in line for line in lines)
    }
    kl = [line["eval/kl"] for line in lines] if rewards else []
    return {"kl": kl, **rewards, "bound": False, "judged": judged and "gold" in rewards}


def group_seeds(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """{name: runs by their names} of those whose configs differ in the seed alone, in their order.

    Several are named after the first, without its seed, and their number. A run of a seed that is
    there already, such as one that --rerun has set aside, was made from something else; and one
    that has no summary is not finished, so that it is not of those whose mean is taken.
    """
    groups: dict[tuple[str, bool, int], dict[str, Run]] = {}
    again = Counter[str]()
    for name, run in runs.items():
        key = json.dumps(_without_seed(run.config), sort_keys=True)
        whole = json.dumps(run.config, sort_keys=True)
        groups.setdefault((key, bool(run.summary), again[whole]), {})[name] = run
        again[whole] += 1
    named: dict[str, dict[str, Run]] = {}
    for seeds in groups.values():
        first, *others = seeds
        if others:
            first = f"{re.sub(_SEED, '', first) or first}, {len(seeds)} seeds"
        named[first if first not in named else ", ".join(seeds)] = seeds
    return named


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "seed"}


def _mean_frontier(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The frontier of a run, or the mean of several's; of the last points if some have fewer."""
    points = [each for each in points if each["kl"]] or points[:1]
    if len(points) == 1:
        return dict(points[0])
    last = slice(-1, None) if len({len(each["kl"]) for each in points}) > 1 else slice(None)
    keys = [key for key in ("kl", *REWARDS) if all(each.get(key) for each in points)]
    means = {
        key: [
            statistics.fmean(map(to_float, values))
            for values in zip(*(each[key][last] for each in points), strict=True)
        ]
        for key in keys
    }
    return {"kl": [], "bound": points[0]["bound"]} | means


def format_runs(name: str, runs: Sequence[Run], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the line of a run, or of several that differ in their seed, as `COLUMNS` has it.

    Rewards and KL are those of the frontier's last point, or without a frontier the summary's. The
    summary's may be of greedy answers, not sampled ones, or even of another model. Several runs
    have the mean ± standard deviation of each number over those that have it, and how many these
    are where others have none; the wall time is that of all of them together.
    """
    numbers = [_numbers_of(run, each) for run, each in zip(runs, points, strict=True)]
    bound = bool(points[0]["kl"]) and points[0]["bound"]

    def show(key: str, metric: str) -> str:
        values = [each[key] for each in numbers if isfinite(each[key])]
        text = format_metric(metric, statistics.fmean(values) if values else None)
        if len(values) > 1:
            text += f" ± {format_metric(metric, statistics.stdev(values))}"
        some = 0 < len(values) < len(numbers)
        return f"{text} ({len(values)} of {len(numbers)})" if some else text

    def show_kl(key: str) -> str:
        text = show(key, "eval/kl")
        return f"≤ {text}" if bound and text != "–" else text

    wins, low, high = (show(f"wins{end}", "eval/gold_win_rate") for end in ("", "_low", "_high"))
    alone = len(runs) == 1 and "–" not in (low, high)
    seconds = [run.summary["wall_seconds"] for run in runs if "wall_seconds" in run.summary]
    return [
        name,
        str(runs[0].summary.get("stage", "–")),
        " or ".join(dict.fromkeys(run.steps for run in runs)),
        format_seconds(sum(seconds) if len(seconds) == len(runs) else None),
        *(show(key, metric) for key, metric in REWARDS.items()),
        show_kl("root"),
        show_kl("kl"),
        show("peak", REWARDS["gold"]),
        show_kl("at"),
        f"{wins} ({low} – {high})" if alone else wins,
        show("length", "eval/response_length"),
    ]


def _numbers_of(run: Run, points: Mapping[str, Any]) -> dict[str, float]:
    """What `format_runs` shows of a run, NaN for what it has not."""
    metrics = run.metrics
    if points["kl"]:
        final = {key: to_float((points.get(key) or [None])[-1]) for key in ("kl", *REWARDS)}
    else:
        names = {"kl": "eval/kl", **REWARDS}
        final = {key: to_float(metrics.get(metric)) for key, metric in names.items()}
    kl, gold = final["kl"], points.get("gold") or []
    peak = find_peak(gold) if len(gold) > 1 else None  # a single point has no peak
    return final | {
        "root": sqrt(max(0.0, kl)) if isfinite(kl) else kl,
        "peak": to_float(None if peak is None else gold[peak]),
        "at": to_float(None if peak is None else points["kl"][peak]),
        "length": to_float(metrics.get("eval/response_length")),
        **{
            f"wins{end}": to_float(metrics.get(f"eval/gold_win_rate{end}"))
            for end in ("", "_low", "_high")
        },
    }


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
    frontier: dict[str, Any] = {"bound": bool(points.get("bound")), "judged": False}
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
