"""Held-out answers judged by the town's scorer."""

from __future__ import annotations

from rlhf_jax.evaluation.gold import correct_metrics, correct_table, gold_metrics, gold_scores
from rlhf_jax.evaluation.responses import Answer
from rlhf_jax.tasks.town.town import Town

PROMPTS = list(Town().prompts("heldout", 40))
RIGHT = [Answer(p.meta["reference"], (1, 2), True) for p in PROMPTS]
EMPTY = [Answer("", (2,), True) for _ in PROMPTS]


def test_right_answers_are_counted_by_family():
    table = correct_table(PROMPTS, {"sft": EMPTY, "dpo": [*RIGHT[:30], *EMPTY[30:]]})
    *families, everything = table["rows"]
    assert table["columns"] == ["family", "prompts", "sft", "dpo"]
    assert everything == ["all", 40, 0.0, 0.75]
    assert sum(count for _, count, *_ in families) == 40
    for family, count, none, share in families:
        mine = [i for i, p in enumerate(PROMPTS) if p.meta["family"] == family]
        assert count == len(mine) and none == 0
        assert share == sum(i < 30 for i in mine) / count


def test_metrics_of_right_answers_against_empty_ones():
    right, empty = gold_scores(PROMPTS, RIGHT), gold_scores(PROMPTS, EMPTY)
    metrics = gold_metrics(right, empty)
    assert metrics["eval/gold_reward/correct"] == 1 and metrics["eval/gold_win_rate"] == 1
    assert metrics["eval/gold_win_rate_low"] > 0.9
    assert gold_metrics(right, right)["eval/gold_win_rate"] == 0.5
    facts = correct_metrics("facts", PROMPTS[:4], [*RIGHT[:3], EMPTY[3]])
    assert facts["eval/correct/facts"] == 0.75
    assert facts["eval/correct/facts_low"] < 0.75 < facts["eval/correct/facts_high"]
