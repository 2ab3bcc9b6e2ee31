"""Held-out answers judged by the exact verifier of their task, by component and by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.statistics import wilson_interval, win_rate, with_interval
from rlhf_jax.tasks.builders import verifier_of
from rlhf_jax.tasks.task import Verdict


def verdicts_of(prompts: Sequence[Prompt], answers: Sequence[str | Sequence[str]]) -> list[Verdict]:
    """The verdict on each answer, or none at all where no verifier can judge answers to them all.

    Args:
        prompts: P of them; answers: P · G texts, those to a prompt together, or the turns of each,
            of which the last one is judged unless the prompts' task replays them all.
    """
    task = verifier_of(prompts)
    if task is None or task.verify is None:
        return []
    turns = [[answer] if isinstance(answer, str) else answer for answer in answers]
    asked = [prompts[i // (len(turns) // len(prompts))] for i in range(len(turns))]
    if task.replay:
        return [task.replay(*each) for each in zip(asked, turns, strict=True)]
    return [task.verify(prompt, said[-1]) for prompt, said in zip(asked, turns, strict=True)]


def gold_metrics(verdicts: Sequence[Verdict], rivals: Sequence[Verdict] = ()) -> dict[str, float]:
    """Means of the gold reward and its components, and the win rate against `rivals`, ties ½."""
    metrics = {"eval/gold_reward": _mean(verdicts)}
    for name in verdicts[0].components:
        metrics[f"eval/gold_reward/{name}"] = _mean(verdicts, name)
    if rivals:
        won = win_rate([v.total for v in verdicts], [v.total for v in rivals], tie_tolerance=1e-9)
        metrics |= with_interval("eval/gold_win_rate", won.rate, (won.low, won.high))
    return metrics


def gold_values(verdicts: Sequence[Verdict]) -> dict[str, Values]:
    """The gold reward and its components, answer by answer."""
    values = {"gold_reward": Values.of([verdict.total for verdict in verdicts])}
    for name in verdicts[0].components:
        values[f"gold_reward/{name}"] = Values.of([v.components[name] for v in verdicts])
    return values


def correct_metrics(name: str, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """eval/correct/<name>: the share of right answers, whatever their style, with 95 % interval."""
    right = sum(verdict.right for verdict in verdicts)
    interval = wilson_interval(right, len(verdicts))
    return with_interval(f"eval/correct/{name}", right / len(verdicts), interval)


def correct_table(
    prompts: Sequence[Prompt], verdicts: Mapping[str, Sequence[Verdict]], group: str
) -> dict[str, Any]:
    """The report's table: shares of right answers, in any style, by group of prompts and model.

    `group` is a key of the prompts' meta, or "" for no groups.
    """
    right = [np.array([verdict.right for verdict in each]) for each in verdicts.values()]
    places = _places(prompts, group) | {"all": [*range(len(prompts))]}
    return {
        "section": "changes",
        "title": f"Right answers by task {group}" if group else "Right answers",
        "columns": [group or "prompts of", "prompts", *verdicts],
        "rows": [
            [label, len(chosen), *(float(column[chosen].mean()) for column in right)]
            for label, chosen in places.items()
        ],
    }


def gold_plots(
    prompts: Sequence[Prompt], verdicts: Mapping[str, Sequence[Verdict]], group: str
) -> list[dict[str, Any]]:
    """The report's figures: gold reward by component and by group, one bar per model."""
    components = [*next(iter(verdicts.values()))[0].components]
    series = {name: [_mean(each, c) for c in components] for name, each in verdicts.items()}
    plots = [_bars("component", components, series)]
    if group:
        places = _places(prompts, group)
        series = {
            name: [_mean([each[i] for i in chosen]) for chosen in places.values()]
            for name, each in verdicts.items()
        }
        plots.append(_bars(f"task {group}", [*places], series))
    return plots


def _bars(by: str, groups: list[str], series: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "kind": "grouped_bars",
        "section": "changes",
        "title": f"Gold reward by {by}",
        "groups": groups,
        "series": series,
        "ylabel": "held-out mean",
    }


def _mean(verdicts: Sequence[Verdict], component: str = "") -> float:
    """The mean total, or the mean of one component."""
    return float(np.mean([v.components[component] if component else v.total for v in verdicts]))


def _places(prompts: Sequence[Prompt], group: str) -> dict[str, list[int]]:
    """The indices of each group's prompts, by the groups' sorted names; {} without a group."""
    names = [prompt.meta.get(group, "") for prompt in prompts] if group else []
    places: dict[str, list[int]] = {name: [] for name in sorted({*names})}
    for i, name in enumerate(names):
        places[name].append(i)
    return places
