"""Held-out answers judged by the town's exact gold scorer: by component, and against another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.data.town.gold import GoldScore, gold_score
from rlhf_jax.evaluation.responses import Answer
from rlhf_jax.evaluation.statistics import wilson_interval, win_rate


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
