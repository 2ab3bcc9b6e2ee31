"""How tool use is counted."""

from __future__ import annotations

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.evaluation.tool_use import (
    count_episodes,
    pass_metrics,
    rate_metrics,
    rate_table,
    repeat_prompts,
)
from rlhf_jax.tasks.task import Episode, Verdict

RECORDS = [
    Prompt(str(i), (Message("user", "?"),), {"family": "sums" if i < 3 else "no_tool"})
    for i in range(5)
]


def episode(total, calls, invalid, needed):
    return Episode(Verdict(total, {"correct": total}), calls, invalid, needed)


EPISODES = [
    episode(1.0, 1, 0, 1), episode(0.0, 3, 2, 1), episode(1.0, 1, 0, 1),
    episode(1.0, 0, 0, 0), episode(0.0, 1, 0, 0),
]  # fmt: skip


def test_rates_are_of_episodes_and_of_calls():
    found = count_episodes(RECORDS, EPISODES, "family")
    assert found == {
        "success/no_tool": (1, 2),
        "success/sums": (2, 3),
        "needless_calls": (1, 2),
        "invalid_calls": (2, 6),
    }
    metrics = rate_metrics(found)
    assert metrics["eval/success/sums"] == 2 / 3 and metrics["eval/invalid_calls"] == 1 / 3
    interval = metrics["eval/needless_calls_low"], metrics["eval/needless_calls_high"]
    assert interval == wilson_interval(1, 2)
    assert [row[:3] for row in rate_table(found)["rows"]][1] == ["success, sums", 3, 2 / 3]


def test_a_rate_of_nothing_is_none():
    found = count_episodes(RECORDS[:1], [episode(1.0, 0, 0, 1)], "family")
    assert found["invalid_calls"] == (0, 0)
    assert "eval/invalid_calls" not in rate_metrics(found)
    assert rate_table(found)["rows"][-1][2] is None


def test_in_a_row_is_over_several_episodes_to_a_prompt():
    asked = repeat_prompts(RECORDS[:2])
    assert len({record.id for record in asked}) == 16 and asked[0].meta == RECORDS[0].meta
    groups = [[episode(float(i < c), 1, 0, 1) for i in range(8)] for c in (8, 4)]
    metrics = pass_metrics(groups, 0)
    assert metrics["eval/pass^1"] == 0.75
    assert metrics["eval/pass^2"] == pytest.approx((1 + 6 / 28) / 2)
    assert metrics["eval/pass^8"] == 0.5
    assert metrics["eval/pass^8_low"] <= 0.5 <= metrics["eval/pass^8_high"]
