"""The page of a sweep: its table, its figures, and the sentences that say what they mean."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from rlhf_jax.files import write_whole
from rlhf_jax.report.cells import draw_bands, draw_clouds, draw_intervals, draw_parallel
from rlhf_jax.report.comparison import JUDGED, read_frontier
from rlhf_jax.report.figure import Plot, to_floats
from rlhf_jax.report.page import render_page
from rlhf_jax.report.refusals import draw_refusals
from rlhf_jax.report.run_files import Run, read_run
from rlhf_jax.report.tables import METRICS
from rlhf_jax.sweep import tradeoff
from rlhf_jax.sweep.grid import short_names
from rlhf_jax.sweep.jobs import Job
from rlhf_jax.sweep.results import Results
from rlhf_jax.sweep.tables import COLUMNS, DIFFERENCES, differences_of, estimates

# Of metrics.jsonl, with a title and a unit.
CURVES = (
    ("eval/gold_reward", "Gold reward", "held-out mean"),
    ("eval/proxy_reward", "Proxy reward", "held-out mean"),
    ("eval/kl", "KL to the reference", "nats per sequence"),
    ("eval/accuracy", "Accuracy, held out", ""),
    ("rewards/accuracies", "Accuracy in training", ""),
    ("objective/scores", "Scores in training", ""),
    ("objective/kl", "KL in training", "nats per sequence"),
    ("eval/loss", "Loss, held out", "nats per token"),
    ("train/loss", "Loss", ""),
)
_BREAKS = {ord(","): ",\u200b", 0xA0: " "}
SHOWN = 6  # cells whose curves are drawn, of more the best


def write_page(
    directory: Path,
    source: str,
    results: Results,
    fresh: Results | None,
    runs: Mapping[tuple[str, int], Job],
    told: Sequence[str],
    trials: Sequence[Sequence[Any]] = (),
    curve: tradeoff.Curve | None = None,
) -> Path:
    """Writes report.html of a sweep and returns its path.

    Args:
        source: "experiments/file.py[:variant]".
        runs: the jobs of `results` by cell's name and seed.
        told: sentences that say what it means.
        trials: of a search: (cell, steps, value, why it failed).
        curve: of runs whose task has a trade-off.
    """
    read: dict[str, list[Run]] = {
        name: [read_run(runs[name, seed].directory) for seed in seeds]
        for name, seeds in results.outcomes.items()
    }
    curves, left_out = _curves(results, read)
    failures = [[row.name, seed, why] for row in results.rows for seed, why in row.failures.items()]
    compared = differences_of(results)
    title = METRICS.get(results.metric, (results.metric,))[0]
    page = render_page(
        "sweep.html.jinja",
        sweep=directory.resolve().name,
        source=source,
        metric=title,
        sentences=told,
        trials=trials and _entry("Trials", ("cell", "steps", results.metric, "failed"), trials, ""),
        plots=_figures(results, read, title, curve),
        cells=_entry(f"{results.metric}, by cell", COLUMNS, estimates(results), _WHAT[0]),
        fresh=fresh and _entry("On fresh seeds", COLUMNS, estimates(fresh), _WHAT[1]),
        differences=compared
        and _entry(f"Over {results.baseline}", DIFFERENCES, compared, _WHAT[2]),
        failures=failures and _entry("Failed", ("cell", "seed", "why"), failures, ""),
        tradeoff=curve and _over_starts(curve),
        curves=curves,
        left_out=left_out,
        directory=str(directory),
        command=shlex.join(["python", "-m", "rlhf_jax.sweep", *sys.argv[1:]]),
    )
    write_whole(directory / "report.html", page.encode())
    return directory / "report.html"


_WHAT = (
    "The interval is of seeds and prompts together: where a run of another seed on other prompts "
    "would have its mean. That of prompts alone takes these seeds for all there are.",
    "None of these seeds had a part in the choice of the best cell, so that it is not the best by "
    "luck.",
    "On the same seeds and prompts. Holm’s correction holds the chance of any difference that is "
    "none below 5 % for all rows together.",
)


_OF_SAFETY = (
    "Intervals are Wilson’s, over prompts: a prompt’s replies of all seeds are one share, as if "
    "there were no other seeds. “start” is what runs started from."
)


def _over_starts(curve: tradeoff.Curve) -> dict[str, Any]:
    cost, gain = (f"{share} {curve.tradeoff.what}" for share in curve.shares)
    note = (
        f"“above”: how much more {gain} than by the best mixture of the models that runs started "
        f"from with as much {cost}. The interval is over seeds and prompts, of each row by itself; "
        "of a single seed over prompts alone."
    )
    return _entry("Over the curve of the starts", curve.columns, tradeoff.table(curve), note)


def _entry(title: str, columns: Sequence[str], rows: Sequence[Any], note: str) -> dict[str, Any]:
    """A table whose cells may be broken where it would be wider than a phone."""
    texts = [[str(cell).translate(_BREAKS) for cell in row] for row in rows]
    return {"title": title, "columns": columns, "rows": texts, "note": note, "fit": True}


def _figures(
    results: Results,
    read: Mapping[str, Sequence[Run]],
    title: str,
    curve: tradeoff.Curve | None,
) -> list[Plot]:
    """Intervals, parallel coordinates, gold reward against KL and refusals, where measured."""
    known = [(row, row.estimate) for row in results.rows if row.estimate]
    runs = [results.outcomes[row.name].values() for row, _ in known]
    plots = [
        draw_intervals(
            f"{title} with 95 % intervals",
            cells=[row.name for row, _ in known],
            mean=[e.mean for _, e in known],
            low=[e.low for _, e in known],
            high=[e.high for _, e in known],
            inner=[row.of_prompts for row, _ in known],
            runs=[[float(values.mean()) for values in each] for each in runs],
            xlabel=f"{title}; thick: of prompts alone; ticks: runs",
        )
    ]
    fields = list(dict.fromkeys(field for row in results.rows for field in row.values))
    shorts = short_names(fields)
    if fields and all({*fields} == {*row.values} for row, _ in known):
        axes = {
            shorts[field]: list(dict.fromkeys(row.values[field] for row, _ in known))
            for field in fields
        }
        lines = [
            {shorts[field]: row.values[field] for field in fields} | {"mean": e.mean}
            for row, e in known
        ]
        plots.append(
            draw_parallel("Cells as parallel coordinates", axes=axes, cells=lines, value=title)
        )
    clouds = {name: list(filter(None, map(_last_point, runs))) for name, runs in read.items()}
    clouds = {name: points for name, points in clouds.items() if points}
    if clouds:
        drawn = draw_clouds("Gold reward against KL", cells=clouds, ylabel="gold reward")
        judged = (read_frontier(r.name, r)["judged"] for runs in read.values() for r in runs)
        plots.append(replace(drawn, note=f"Gold reward {JUDGED}") if any(judged) else drawn)
    if curve:
        title = f"{curve.tradeoff.what.capitalize()}, by kind of request"
        found, what = tradeoff.points(curve), curve.tradeoff.what
        drawn = draw_refusals(title, points=found, shares=curve.shares, what=what)
        plots.append(replace(drawn, note=_OF_SAFETY))
    return plots


def _last_point(run: Run) -> tuple[float, float] | None:
    """(KL, gold reward) at the end of a run, None where one of them was not measured."""
    points = read_frontier(run.name, run)
    if not points["kl"] or not points.get("gold"):
        return None
    kl, gold = to_floats([points["kl"][-1], points["gold"][-1]])
    return (kl, gold) if isfinite(kl) and isfinite(gold) else None


def _curves(results: Results, read: Mapping[str, Sequence[Run]]) -> tuple[list[Plot], str]:
    """Figures of the curves that the runs logged, and what they leave out."""
    best, fields = results.best, {field for row in results.rows for field in row.values}
    first = [results.baseline, *([best.name] if best else [])]
    ranked = sorted(read, key=lambda name: (name not in first, list(read).index(name)))
    shown, left_out = [name for name in read if name in ranked[:SHOWN]], []
    if len(shown) < len(read):
        left_out.append(
            f"Of {len(read)} cells the baseline, the best one and the first others are drawn."
        )
    plots = []
    for metric, title, unit in CURVES:
        if metric.endswith("loss") and any(field.startswith("loss.") for field in fields):
            continue
        cells = {name: _band(read[name], metric) for name in shown}
        cells = {name: cell for name, cell in cells.items() if len(cell["steps"]) > 1}
        if cells:
            plots.append(draw_bands(title, cells=cells, ylabel=unit))
    if any(field.startswith("loss.") for field in fields):
        left_out.append("Losses are not drawn: of different losses they are of different units.")
    return plots, " ".join(left_out)


def _band(runs: Sequence[Run], metric: str) -> dict[str, Any]:
    """A metric at the steps at which every run logged it: mean, 95 % band, and the runs."""
    logged = [{r["step"]: r[metric] for r in run.records if metric in r} for run in runs]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    values = np.array([[each[step] for step in steps] for each in logged])
    if not steps:
        return {"steps": []}
    mean, reach = values.mean(0), np.full(len(steps), nan)
    if len(runs) > 2:  # of two it would hide everything else
        reach = stdtrit(len(runs) - 1, 0.975) * values.std(0, ddof=1) / len(runs) ** 0.5
    band = {"mean": mean, "low": mean - reach, "high": mean + reach}
    return {
        "steps": [int(step) for step in steps],
        "runs": values.tolist(),
        **{name: [x if isfinite(x) else nan for x in each.tolist()] for name, each in band.items()},
    }
