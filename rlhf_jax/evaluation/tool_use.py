"""How well a model uses tools: episodes by an exact verifier, as metrics and as a table.

Rates are of one greedy episode to a prompt, with Wilson's interval; pass^k, that k episodes in a
row are worth 1, is of several sampled ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.statistics import bootstrap_interval, pass_all, wilson_interval
from rlhf_jax.tasks.task import Episode

IN_A_ROW = (1, 2, 4, 8)


def count_episodes(
    records: Sequence[Prompt], episodes: Sequence[Episode], group: str
) -> dict[str, tuple[int, int]]:
    """(how many, of how many) by name.

    "success/<group>": of its episodes, that are worth 1. "needless_calls": of episodes that need no
    call, with one or more. "invalid_calls": of calls, that no tool could answer.
    """
    solved: dict[str, list[bool]] = {}
    for record, episode in zip(records, episodes, strict=True):
        solved.setdefault(record.meta[group], []).append(episode.verdict.total == 1)
    found = {f"success/{name}": (sum(v), len(v)) for name, v in sorted(solved.items())}
    needless = [episode.calls > 0 for episode in episodes if not episode.needed]
    found["needless_calls"] = sum(needless), len(needless)
    invalid = sum(episode.invalid for episode in episodes)
    found["invalid_calls"] = invalid, sum(episode.calls for episode in episodes)
    return found


def rate_metrics(found: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """eval/<name> with 95 % interval of those of `count_episodes` that are of one or more."""
    metrics: dict[str, float] = {}
    for name, (count, total) in found.items():
        if total:
            low, high = wilson_interval(count, total)
            key = f"eval/{name}"
            metrics |= {key: count / total, f"{key}_low": low, f"{key}_high": high}
    return metrics


def pass_metrics(episodes: Sequence[Sequence[Episode]], seed: int) -> dict[str, float]:
    """eval/pass^k for each k of `IN_A_ROW`, with 95 % interval over prompts.

    Args:
        episodes: [P][G], those of a prompt together, G at least the largest k.
    """
    solved = [sum(each.verdict.total == 1 for each in group) for group in episodes]
    metrics: dict[str, float] = {}
    for k in IN_A_ROW:
        chances = pass_all(solved, len(episodes[0]), k)
        low, high = bootstrap_interval(chances, seed)
        key = f"eval/pass^{k}"
        metrics |= {key: float(chances.mean()), f"{key}_low": low, f"{key}_high": high}
    return metrics


def repeat_prompts(records: Sequence[Prompt]) -> list[Prompt]:
    """Each record as often as the largest k of `IN_A_ROW`, under names of their own."""
    return [
        dataclasses.replace(record, id=f"{record.id} ({k})")
        for record in records
        for k in range(IN_A_ROW[-1])
    ]


def rate_table(found: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The report's table of `count_episodes`."""
    rows = []
    for name, (count, total) in found.items():
        low, high = wilson_interval(count, total)
        rate = count / total if total else None
        rows.append([name.replace("/", ", ").replace("_", " "), total, rate, low, high])
    return {
        "section": "changes",
        "title": "Episodes with tools",
        "columns": ["share of", "number", "rate", "95 % from", "to"],
        "rows": rows,
    }
