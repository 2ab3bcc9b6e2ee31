"""Held-out answers judged by the town's exact scorer: by component, and against another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.responses import Answer
from rlhf_jax.evaluation.statistics import wilson_interval, win_rate
from rlhf_jax.tasks.town.gold import GoldScore, gold_score, is_correct


def gold_scores(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[GoldScore]:
    """The gold score of each answer."""
    return [gold_score(p, a.text) for p, a in zip(prompts, answers, strict=True)]


def gold_metrics(
    scores: Sequence[GoldScore], rivals: Sequence[GoldScore] | None = None
) -> dict[str, float]:
    """Means of the gold reward and its components, and the win rate against `rivals`, ties ½."""
    metrics = {"eval/gold_reward": float(np.mean([s.total for s in scores]))}
    for name in scores[0].components:
        metrics[f"eval/gold_reward/{name}"] = float(np.mean([s.components[name] for s in scores]))
    if rivals is not None:
        won = win_rate([s.total for s in scores], [s.total for s in rivals], tie_tolerance=1e-9)
        metrics["eval/gold_win_rate"] = won.rate
        metrics["eval/gold_win_rate_low"] = won.low
        metrics["eval/gold_win_rate_high"] = won.high
    return metrics


def correct_metrics(
    name: str, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> dict[str, float]:
    """eval/correct/<name>: the share of right answers, whatever their style, with 95 % interval."""
    right = sum(is_correct(p, a.text) for p, a in zip(prompts, answers, strict=True))
    low, high = wilson_interval(right, len(prompts))
    key = f"eval/correct/{name}"
    return {key: right / len(prompts), f"{key}_low": low, f"{key}_high": high}


def correct_table(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]]
) -> dict[str, Any]:
    """The report's table: shares of right answers, in any style, by task family and model."""
    right = {
        name: [is_correct(p, a.text) for p, a in zip(prompts, each, strict=True)]
        for name, each in answers.items()
    }
    families = [p.meta["family"] for p in prompts]

    def row(label: str, chosen: np.ndarray) -> list[Any]:
        shares = (float(np.mean(np.array(each)[chosen])) for each in right.values())
        return [label, int(chosen.sum()), *shares]

    rows = [row(family, np.array(families) == family) for family in sorted(set(families))]
    return {
        "section": "changes",
        "title": "Right answers by task family",
        "columns": ["family", "prompts", *answers],
        "rows": [*rows, row("all", np.ones(len(prompts), bool))],
    }


def gold_plots(
    scores: Mapping[str, Sequence[GoldScore]], prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """The report's figures: gold reward by component and by task family, one bar a model."""
    components = list(next(iter(scores.values()))[0].components)
    families = sorted({p.meta["family"] for p in prompts})

    def by_family(each: Sequence[GoldScore], family: str) -> float:
        mine = [s.total for s, p in zip(each, prompts, strict=True) if p.meta["family"] == family]
        return float(np.mean(mine))

    return [
        {
            "kind": "grouped_bars",
            "section": "changes",
            "title": "Gold reward by component",
            "groups": components,
            "series": {
                name: [float(np.mean([s.components[c] for s in each])) for c in components]
                for name, each in scores.items()
            },
            "ylabel": "held-out mean",
        },
        {
            "kind": "grouped_bars",
            "section": "changes",
            "title": "Gold reward by task family",
            "groups": families,
            "series": {
                name: [by_family(each, family) for family in families]
                for name, each in scores.items()
            },
            "ylabel": "held-out mean",
        },
    ]
