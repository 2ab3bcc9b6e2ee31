"""Rows and sentences of before and after."""

from __future__ import annotations

import pytest

from rlhf_jax.report.changes import console_rows, judge_changes, rows_of

METRICS = {
    "eval/gold_reward": 0.811, "before/gold_reward": 0.758, "change/gold_reward": 0.053,
    "change/gold_reward_low": 0.03, "change/gold_reward_high": 0.08,
    "change/gold_reward_records": 256.0, "eval/accuracy": 0.729, "eval/accuracy_low": 0.7012,
    "eval/accuracy_high": 0.7561, "eval/kl": 1.13, "eval/gold_reward/brief": 0.5,
    "train/tokens_per_second": 9.0,
}  # fmt: skip
OTHERS = {
    "pretrain": {"gold_reward": 0.2, "accuracy": 0.5, "gold_reward/brief": 0.1},
    "sft": {"gold_reward": 0.7},
}


def test_a_row_holds_what_was_measured_on_the_same_records_and_nothing_else():
    rows = dict(rows_of(METRICS, OTHERS, ["pretrain", "sft"]))
    assert rows["Gold reward"] == ["0.200", "0.758", "0.811", "+0.053", "+0.030 to +0.080"]
    assert rows["\u2003brief"] == ["0.100", "–", "0.500", "–", "–"]
    assert [*rows] == ["Gold reward", "\u2003brief", "Accuracy", "KL to the reference"]
    alone = dict(rows_of(METRICS, {}, []))
    assert alone["Accuracy"] == ["72.9\u00a0%", "–", "–"]


def test_the_consoles_rows_have_intervals_below():
    assert console_rows(METRICS, OTHERS, ["pretrain", "sft"]) == [
        ["Gold reward", "0.200", "0.758", "0.811", "+0.053"],
        ["  95 % interval", "–", "–", "–", "+0.030 to +0.080"],
        ["Accuracy", "50.0\u00a0%", "–", "72.9\u00a0%", "–"],
        ["  95 % interval", "–", "–", "0.701–0.756", "–"],
        ["KL to the reference (nats)", "–", "–", "1.13", "–"],
    ]


@pytest.mark.parametrize(
    ("name", "low", "high", "records", "verdict"),
    [
        ("gold_reward", 0.1, 0.2, 40, ": better."),
        ("loss", 0.1, 0.2, 40, ": worse."),
        ("loss", -0.2, -0.1, 6, ": better."),
        ("loss", -0.2, -0.1, 5, ": fewer than 6 records can show no difference."),
        ("correct/facts", -0.2, -0.1, 40, ": worse."),
        ("accuracy", -0.1, 0.1, 40, ": no difference that so few records could show."),
    ],
)
def test_a_sentence_is_as_strong_as_its_interval(name, low, high, records, verdict):
    change = (low + high) / 2
    metrics = {
        f"eval/{name}": 0.5 + change, f"before/{name}": 0.5, f"change/{name}": change,
        f"change/{name}_low": low, f"change/{name}_high": high,
        f"change/{name}_records": float(records),
        "change/response_length": 3.0, "eval/response_length": 9.0, "before/response_length": 6.0,
        f"eval/{name}_low": 0.1, f"eval/{name}_high": 0.9,
    }  # fmt: skip
    (sentence,) = judge_changes(metrics)
    assert sentence.endswith(verdict) and f"on the same {records} held-out records" in sentence
