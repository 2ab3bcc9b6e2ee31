"""Held-out answers judged by the verifier of their task."""

from __future__ import annotations

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.gold_reward import (
    correct_metrics,
    correct_table,
    gold_metrics,
    gold_plots,
    verdicts_of,
)
from rlhf_jax.tasks.town.town import Town

PROMPTS = list(Town().prompts("heldout", 40))
RIGHT = verdicts_of(PROMPTS, [p.meta["reference"] for p in PROMPTS])
EMPTY = verdicts_of(PROMPTS, [""] * len(PROMPTS))


def test_right_answers_are_counted_by_family():
    table = correct_table(PROMPTS, {"sft": EMPTY, "dpo": [*RIGHT[:30], *EMPTY[30:]]}, "family")
    *families, everything = table["rows"]
    assert table["columns"] == ["family", "prompts", "sft", "dpo"]
    assert everything == ["all", 40, 0.0, 0.75]
    assert sum(count for _, count, *_ in families) == 40
    for family, count, none, share in families:
        mine = [i for i, p in enumerate(PROMPTS) if p.meta["family"] == family]
        assert count == len(mine) and none == 0
        assert share == sum(i < 30 for i in mine) / count


def test_metrics_of_right_answers_against_empty_ones():
    metrics = gold_metrics(RIGHT, EMPTY)
    assert metrics["eval/gold_reward/correct"] == 1 and metrics["eval/gold_win_rate"] == 1
    assert metrics["eval/gold_win_rate_low"] > 0.9
    assert gold_metrics(RIGHT, RIGHT)["eval/gold_win_rate"] == 0.5
    facts = correct_metrics("facts", [*RIGHT[:3], EMPTY[3]])
    assert facts["eval/correct/facts"] == 0.75
    assert facts["eval/correct/facts_low"] < 0.75 < facts["eval/correct/facts_high"]


def test_a_number_as_answer_is_verified_wherever_the_record_comes_from():
    asked = (Message("user", "6 times 7?"),)
    prompts = [Prompt("a", asked, {"answer": "42"}), Prompt("b", asked, {"answer": "1,042"})]
    verdicts = verdicts_of(prompts, ["42", "It is 41.", "1042", "#### 1042"])
    assert [verdict.total for verdict in verdicts] == [1, 0, 1, 1]
    table = correct_table(prompts, {"sft": verdicts[::2]}, "")
    assert table["rows"] == [["all", 2, 1.0]]
    assert [plot["groups"] for plot in gold_plots(prompts, {"sft": verdicts}, "")] == [["correct"]]


def test_answers_that_no_verifier_can_judge_have_no_verdicts():
    asked = (Message("user", "Who?"),)
    for meta in ({}, {"answer": "Ann, aged 9"}, {"label": "1"}):
        assert verdicts_of([PROMPTS[0], Prompt("x", asked, meta)], ["a", "b"]) == []
    assert verdicts_of([], []) == []
