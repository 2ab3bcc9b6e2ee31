"""What finished runs came to, prompt by prompt where their files keep that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.report.run_files import read_run
from rlhf_jax.report.tables import METRICS
from rlhf_jax.training.meanings import better


def outcomes(run: Path, metric: str) -> tuple[np.ndarray, str]:
    """(the values [P] of which a metric of a finished run is the mean, what they are of).

    Prompts have values of the gold reward and of wins (ties ½), held-out pairs of accuracy (ties
    ½); of any other metric there is the one number, [1], of "". Two runs can be compared value by
    value if they are of the same: what they are of holds a digest of the prompts.

    Raises:
        UserError: the run has no such metric, or a broken file.
    """
    read = read_run(run)
    check_metric(run, read.metrics, metric)
    mean, values, what = read.metrics[metric], np.zeros(0), ""
    if metric in ("eval/gold_reward", "eval/gold_win_rate"):
        scores = [[*sample.get("scores", {}).values()] for sample in read.samples]
        if scores and all(len(each) > 1 for each in scores):
            theirs, ours = np.array([each[-2:] for each in scores]).T
            values = ours if metric == "eval/gold_reward" else won(ours - theirs, 1e-9)
            what = f"prompts {json_digest([sample['prompt'] for sample in read.samples])}"
    elif metric == "eval/accuracy" and (source := _pairs_of(read.config)):
        figures = (each.get("values", {}) for each in read.evaluation.get("plots", []))
        pairs = next((each for each in figures if {*each} == {"chosen", "rejected"}), None)
        if pairs:
            values = won(np.array(pairs["chosen"]) - np.array(pairs["rejected"]), 0.0)
            what = f"{len(values)} pairs of {source}"
    if len(values) and abs(values.mean() - mean) < 1e-6:
        return values, what
    return np.array([mean]), ""


def _pairs_of(config: Mapping[str, Any]) -> str:
    """Where a run's held-out pairs are from, "" if it made them itself, unlike any other run's.

    Without a data.validation they are the last part of data.train.
    """
    data = config["data"]
    return data["validation"] or ("" if config.get("feedback") else f"the end of {data['train']}")


def check_metric(run: Path, metrics: Mapping[str, float], metric: str) -> None:
    """UserError if a run has no such metric; it names those of its evaluation."""
    if metric not in metrics:
        known = [name for name in metrics if name.startswith("eval/")]
        raise UserError(f"{run} has no metric {metric}; it has {', '.join(known)}")


def choose_metric(runs: Sequence[dict[str, Any]]) -> str:
    """The first of the report's metrics that has a better value and that every summary has.

    Raises:
        UserError: there is none.
    """
    for name in (name for name in METRICS if name.startswith("eval/") and better(name)):
        if all(name in run["metrics"] for run in runs):
            return name
    raise UserError("the runs have no metric in common; name one with --metric")


def won(difference: np.ndarray, tolerance: float) -> np.ndarray:
    """1 where a difference is above the tolerance, ½ where it is within it, else 0."""
    return (difference > tolerance) + 0.5 * (np.abs(difference) <= tolerance)
