"""What came of replies, by the names that their task has for it: rates, a table and curves.

A task says of each record and the assistant's turns how many of how many (`Task.outcomes`); here
they become rates of all records, with intervals over records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.statistics import pass_all, resample, wilson_interval, with_interval
from rlhf_jax.tasks.task import Task, Verdict
from rlhf_jax.training.meanings import is_share

IN_A_ROW = (1, 2, 4, 8)
Rates = Mapping[str, Values]


def outcome_values(
    task: Task, prompts: Sequence[Prompt], turns: Sequence[Sequence[str]]
) -> dict[str, Values]:
    """The outcomes of N records, by name; {} for a task that has none.

    Args:
        turns: [N], the texts of the assistant's turns in each.
    """
    if task.outcomes is None:
        return {}
    found = [*map(task.outcomes, prompts, turns)]
    names = sorted({name for each in found for name in each}, key=_order)
    return {
        name: Values.of(*np.transpose([each.get(name, (0, 0)) for each in found])) for name in names
    }


def _order(name: str) -> tuple[str, int]:
    """Sorts numbers at the end of names as numbers."""
    stem, _, last = name.rpartition("/")
    return (stem, int(last)) if last.isdigit() else (name, 0)


def interval_of(name: str, values: Values) -> tuple[float, float]:
    """The 95 % interval over records: of a share Wilson's, of a ratio the bootstrap's.

    Which one it is the metric's name says (`meanings.is_share`). In Wilson's, N records of weights
    w count as (Σw)² / Σw² equal ones, N where they are equal: what one record counts several times
    is no several draws.

    Args:
        name: of the metric, without "eval/".

    Raises:
        ValueError: of a record, more is counted than there is of a share.
    """
    sums, weights = values
    if not is_share(f"eval/{name}"):
        ratios = [(draws @ sums) / (draws @ weights) for draws in resample(len(sums), 0)]
        low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
        return float(low), float(high)
    if (sums > weights).any():
        raise ValueError(f"eval/{name} is above 1, so that it is no share: see meanings.is_share")
    squares = float((weights**2).sum())
    records = float(weights.sum()) ** 2 / squares if squares else 0.0
    return wilson_interval(values.mean * records if records else 0.0, records)


def rate_metrics(values: Rates) -> dict[str, float]:
    """eval/<name> with 95 % interval of each rate."""
    metrics: dict[str, float] = {}
    for name, each in values.items():
        metrics |= with_interval(f"eval/{name}", each.mean, interval_of(name, each))
    return metrics


def rate_tables(values: Mapping[str, Rates]) -> list[dict[str, Any]]:
    """The report's table of the rates of each model, the interval being that of the last one."""
    *_, own = values.values()
    rows = [
        [name, int((each.weights > 0).sum())]
        + [rates[name].mean if name in rates else None for rates in values.values()]
        + [*interval_of(name, each)]
        for name, each in own.items()
    ]
    table = {
        "section": "changes",
        "title": "What came of the replies",
        "columns": ["share", "records", *values, "95 % from", "to"],
        "rows": rows,
    }
    return [table] if rows else []


def rate_plots(values: Mapping[str, Rates]) -> list[dict[str, Any]]:
    """The report's figures: of names that differ by a number at their end, the rates over it."""
    *_, own = values.values()
    curves: dict[str, list[str]] = {}
    for name in own:
        stem, number = _order(name)
        if stem != name:
            curves.setdefault(stem, []).append(str(number))
    return [_plot(stem, numbers, values) for stem, numbers in curves.items()]


def _plot(stem: str, numbers: Sequence[str], values: Mapping[str, Rates]) -> dict[str, Any]:
    *_, own = values.values()
    intervals = {n: interval_of(f"{stem}/{n}", own[f"{stem}/{n}"]) for n in numbers}
    told = ", ".join(f"{n}: {low:.2f} to {high:.2f}" for n, (low, high) in intervals.items())
    return {
        "kind": "grouped_bars",
        "section": "changes",
        "title": stem,
        "groups": [*numbers],
        "series": {
            model: [rates[f"{stem}/{n}"].mean for n in numbers] for model, rates in values.items()
        },
        "ylabel": "share",
        "note": f"95 % intervals of the last model, by number: {told}",
    }


def pass_metrics(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """eval/pass^k, that k episodes in a row are worth 1, for each k of `IN_A_ROW`.

    The 95 % interval is Wilson's over prompts, a little wide where a prompt's chance is not 0 or 1.

    Args:
        verdicts: [P][G], those of a prompt together, G at least the largest k.
    """
    solved = [sum(each.total == 1 for each in group) for group in verdicts]
    metrics: dict[str, float] = {}
    for k in IN_A_ROW:
        chances = pass_all(solved, len(verdicts[0]), k)
        interval = wilson_interval(float(chances.sum()), len(chances))
        metrics |= with_interval(f"eval/pass^{k}", float(chances.mean()), interval)
    return metrics


def repeat_prompts(records: Sequence[Prompt]) -> list[Prompt]:
    """Each record as often as the largest k of `IN_A_ROW`, under names of their own."""
    return [
        dataclasses.replace(record, id=f"{record.id} ({k})")
        for record in records
        for k in range(IN_A_ROW[-1])
    ]
