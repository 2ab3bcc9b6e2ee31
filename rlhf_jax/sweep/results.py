"""What a sweep came to: estimates of every cell, and of the best one on fresh seeds; CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.statistics import bootstrap_interval
from rlhf_jax.files import write_whole
from rlhf_jax.report.figure import csv_text
from rlhf_jax.sweep.grid import Cell
from rlhf_jax.sweep.jobs import Job
from rlhf_jax.sweep.outcomes import choose_metric, outcomes, won
from rlhf_jax.sweep.statistics import Estimate, differences, estimate
from rlhf_jax.training.meanings import is_less_better
from rlhf_jax.training.summary import read_summary

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """A cell of the table.

    Attributes:
        estimate: None where no run has finished.
        of_prompts: the 95 % interval that prompts alone give, NaN where there are none.
        difference: to the baseline, with its p-value after Holm's correction; None of the baseline
            itself and where there is nothing to compare.
        failures: why, by seed.
        seconds: of all its runs.
    """

    name: str
    values: Mapping[str, str]
    estimate: Estimate | None
    of_prompts: tuple[float, float]
    difference: tuple[Estimate, float] | None
    failures: Mapping[int, str]
    seconds: float


@dataclass(frozen=True)
class Results:
    """The rows of some cells on the same seeds.

    Attributes:
        outcomes: {cell: {seed: values}} of the runs that finished; of [1] value where what a
            metric is the mean of is not known, or is not the same in all runs.
        of: what these are, "" for runs.
    """

    metric: str
    baseline: str
    rows: list[Row]
    outcomes: dict[str, dict[int, np.ndarray]]
    of: str

    @property
    def best(self) -> Row | None:
        """The best cell of those of which every run has finished."""
        whole = [row for row in self.rows if row.estimate and not row.failures]
        if not whole:  # then there may be no metric
            return None
        sign = -1 if is_less_better(self.metric) else 1
        return max(whole, key=lambda row: sign * row.estimate.mean)  # type: ignore

    def row(self, name: str) -> Row:
        """The row of a cell."""
        return next(row for row in self.rows if row.name == name)

    def equals_of(self, name: str) -> list[str]:
        """The other cells whose difference to this one may be chance, on the same seeds."""
        found = differences(self.outcomes, name)
        return [other for other, (_, p) in found.items() if not p < SIGNIFICANT]

    def wins(self, name: str) -> Estimate | None:
        """How much more often than ½ a cell's answer has more gold than the baseline's, ties ½.

        None where the metric is another, or the values are not of the same prompts.
        """
        theirs, ours = self.outcomes[self.baseline], self.outcomes[name]
        seeds = sorted(theirs.keys() & ours.keys())
        if self.metric != "eval/gold_reward" or not self.of or not seeds:
            return None
        return estimate(np.stack([won(ours[s] - theirs[s], 1e-9) - 0.5 for s in seeds]))


def read_results(
    cells: Sequence[Cell],
    baseline: str,
    runs: Mapping[tuple[str, int], Job],
    failed: Mapping[Job, str],
    metric: str = "",
) -> Results:
    """The results of runs, some of which may have failed.

    Args:
        runs: by cell's name and seed.
        metric: "": the first of the report's that all have.

    Raises:
        UserError: a run has no such metric, or they have none in common.
    """
    done = {key: job for key, job in runs.items() if job not in failed}
    summaries = {key: read_summary(job.directory) for key, job in done.items()}
    metric = metric or (choose_metric([*summaries.values()]) if done else "")
    read = {key: outcomes(job.directory, metric) for key, job in done.items()}
    failed = dict(failed)
    for key, (each, _) in list(read.items()):
        if not np.isfinite(each).all():
            failed[done[key]] = f"its {metric} is {each.mean()}"
            del read[key]
    of = {what for _, what in read.values()}
    alike = len(of) == 1
    values: dict[str, dict[int, np.ndarray]] = {cell.name: {} for cell in cells}
    for (name, seed), (each, _) in read.items():
        values[name][seed] = each if alike else each.mean(keepdims=True)
    compared = differences(values, baseline)
    rows = []
    for cell in cells:
        why = {s: failed[job] for (n, s), job in runs.items() if n == cell.name and job in failed}
        stacked = np.stack([*values[cell.name].values()]) if values[cell.name] else None
        prompts = (nan, nan)
        if stacked is not None and stacked.shape[1] > 1:
            prompts = bootstrap_interval(stacked.T, 0)
        rows.append(
            Row(
                cell.name,
                cell.values,
                None if stacked is None else estimate(stacked),
                prompts,
                compared.get(cell.name),
                why,
                sum(s["wall_seconds"] for (name, _), s in summaries.items() if name == cell.name),
            )
        )
    return Results(metric, baseline, rows, values, of.pop() if alike else "")


def write_tables(directory: Path, results: Results, fresh: Results | None) -> None:
    """Writes cells.csv, a row a cell, and outcomes.csv, every number behind it.

    Neither holds a time, so that they are the same whatever happened on the way.
    """
    fields = list(dict.fromkeys(field for row in results.rows for field in row.values))
    cells, every = [], []
    for part, each in (("chosen on", results), ("fresh", fresh)):
        for row in each.rows if each else ():
            cells.append([part, row.name, *map(row.values.get, fields), *_numbers(row)])
        for name, seeds in each.outcomes.items() if each else ():
            every += [
                (part, name, s, i, v) for s, vs in seeds.items() for i, v in enumerate(vs.tolist())
            ]
    header = ["seeds are", "cell", *fields, *_NUMBERS]
    texts = {
        "cells.csv": csv_text(header, cells),
        "outcomes.csv": csv_text(("seeds are", "cell", "seed", "index", results.metric), every),
    }
    for name, text in texts.items():
        write_whole(directory / name, text.encode())


def write_runs(
    directory: Path, cells: Sequence[Cell], jobs: Mapping[Any, Job], failed: Mapping[Job, str]
) -> None:
    """Writes runs.csv: a row a run, with all metrics of its summary and its time.

    One that failed has none: what its directory holds may be of another run.
    """
    fields = list(dict.fromkeys(field for cell in cells for field in cell.values))
    values = {cell.name: cell.values for cell in cells}
    read = {key: {} if job in failed else read_summary(job.directory) for key, job in jobs.items()}
    metrics = sorted({name for summary in read.values() for name in summary.get("metrics", {})})
    rows = [
        [name, *map(values[name].get, fields), seed, summary.get("wall_seconds")]
        + [summary.get("metrics", {}).get(metric) for metric in metrics]
        for (name, seed), summary in read.items()
    ]
    text = csv_text(["cell", *fields, "seed", "wall_seconds", *metrics], rows)
    write_whole(directory / "runs.csv", text.encode())


_NUMBERS = (
    "seeds", "mean", "sd", "low", "high", "low of prompts alone", "high of prompts alone",
    "difference", "difference low", "difference high", "p", "p after Holm", "failures",
)  # fmt: skip


def _numbers(row: Row) -> list[Any]:
    e, (d, p) = row.estimate, row.difference or (None, None)
    return [
        *((e.seeds, e.mean, e.deviation, e.low, e.high) if e else [0] + [None] * 4),
        *row.of_prompts,
        *((d.mean, d.low, d.high, d.p, p) if d else [None] * 5),
        "; ".join(f"seed {seed}: {why}" for seed, why in row.failures.items()),
    ]
