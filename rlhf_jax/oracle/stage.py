"""The oracle: every algorithm on a world whose optimum is known, through the code that trains text.

A policy is a table of logits or a small transformer in the world of `oracle/exact_world.py`: four
prompts, 121 possible responses each. The point that an algorithm reaches is computed by summing
over all responses, and must be where theory says: the optimum π_ref·exp(r/β)/Z for algorithms that
are unbiased, a known other place for the others. The trainer's own metrics must agree, and cannot
lie above the frontier of expected reward against KL: there, KL is measured too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.config import Config
from rlhf_jax.devices import training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.oracle.oracle_rows import BEST_OF, ROWS
from rlhf_jax.oracle.row_training import estimate_best_of, train_on_pairs, train_policy
from rlhf_jax.oracle.verdicts import Result, expect, judge
from rlhf_jax.report.report import write_report
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.summary import write_evaluation

_SPREAD = Lock()  # two programs that wait for each other on the same devices may wait for ever


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Runs every row, prints and plots where each landed; returns oracle/<row>/… metrics.

    Raises:
        UserError: an unknown row, or one for more devices, or there are several hosts.
        RuntimeError: a row did not land where theory says; the report is written all the same.
    """
    if hosts.count() > 1:
        raise UserError("the oracle's rows take few devices: start it on one host")
    names = select_rows(config.oracle.rows)
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(config.oracle.threads) as pool:  # most of a row's time is compiling
        for name, result in zip(names, pool.map(partial(run_row, config), names), strict=True):
            results[name] = result
            print(f"{name:{max(map(len, names))}}  {result.line}", flush=True)
    write_evaluation(run.path, [tabulate(results)], [plot(results)])
    metrics: dict[str, float] = {}
    for name, result in results.items():
        metrics |= {
            f"oracle/{name}/reward": result.outcome.reward,
            f"oracle/{name}/kl": result.outcome.kl,
            f"oracle/{name}/regret": result.outcome.regret,
            f"oracle/{name}/ok": float(result.verdict == "ok"),
        }
    wrong = [f"{name}: {r.verdict}" for name, r in results.items() if r.verdict != "ok"]
    if wrong:
        write_report(run.path, {"stage": "oracle", "metrics": metrics})
        raise RuntimeError(f"{len(wrong)} of {len(results)} rows failed: {'; '.join(wrong)}")
    return metrics


def select_rows(stated: str) -> list[str]:
    """Returns the rows that are named, separated by commas, or all that fit the devices here.

    Raises:
        UserError: there is no such row, or it needs more devices.
    """
    devices = {name: row.devices for name, row in ROWS.items()} | {BEST_OF: 1}
    here = len(training_devices())
    too_wide = [name for name, count in devices.items() if count > here]
    names = list(dict.fromkeys(filter(None, map(str.strip, stated.split(",")))))
    if not names and too_wide:
        print(f"for more devices than there are here: {', '.join(too_wide)}", flush=True)
    for name in names:
        if name not in devices:
            known = ", ".join(devices)
            raise UserError(f"oracle.rows: there is no row {name!r}; there are: {known}")
        if name in too_wide:
            wide = f"{devices[name]} devices to train on, of which there are {here}"
            raise UserError(f"oracle.rows: {name!r} needs {wide}")
    return names or [name for name in devices if name not in too_wide]


def run_row(config: Config, name: str) -> Result:
    """Trains a row's policy and judges where it ended."""
    if name == BEST_OF:
        return estimate_best_of(config)
    row = ROWS[name]
    with _SPREAD if row.devices > 1 else nullcontext():
        if row.policy == "pairs":
            outcome = train_on_pairs(row, config)
        else:
            outcome = train_policy(row, config, config.seed)
    return Result(outcome, expect(row, outcome), row.note, judge(row, outcome))


def tabulate(results: Mapping[str, Result]) -> dict[str, Any]:
    """Returns the report's table, with a row for each result."""
    columns = ["algorithm", "E[r]", "KL", "regret"]
    columns += ["E[r] expected", "KL expected", "where", "verdict"]
    rows = [
        [name, r.outcome.reward, r.outcome.kl, r.outcome.regret, *r.expected, r.note, r.verdict]
        for name, r in results.items()
    ]
    return {"title": "Where each algorithm landed", "columns": columns, "rows": rows}


def plot(results: Mapping[str, Result]) -> dict[str, Any]:
    """Returns the report's figure, of the rows that share the table's reference.

    A transformer has a reference, and so a frontier, of its own.
    """
    betas = np.geomspace(0.12, 50, 60)
    reference = world.logprobs(world.REFERENCE)
    best = [world.optimum(beta) for beta in betas]
    return {
        "kind": "oracle",
        "title": "Expected reward against KL, and the exact frontier",
        "points": {
            name: {
                "kl": result.outcome.kl,
                "reward": result.outcome.reward,
                "expected_kl": result.expected[1],
                "expected_reward": result.expected[0],
            }
            for name, result in results.items()
            if name == BEST_OF or ROWS[name].policy != "transformer"
        },
        "exact": {
            "kl": [world.kl(p, reference) for p in best],
            "reward": [world.expected_reward(p) for p in best],
        },
    }
