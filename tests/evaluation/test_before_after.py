"""Differences of the same records before and after, by hand and by chance."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.evaluation.before_after import Values, changes, from_json, to_json
from rlhf_jax.evaluation.pair_scores import evaluate_pairs, label_metrics, right_values


def test_a_change_is_a_difference_of_ratios_by_hand():
    before = {"loss": Values.of([6.0, 2.0], [3, 1]), "other": Values.of([1.0])}
    after = {"loss": Values.of([3.0, 1.0], [3, 1]), "new": Values.of([1.0])}
    metrics = changes(before, after, 0)
    # (6 + 2) / 4 before, (3 + 1) / 4 after; each record by itself: −1.
    assert metrics == {
        "before/loss": 2.0, "change/loss": -1.0, "change/loss_low": -1.0,
        "change/loss_high": -1.0, "change/loss_records": 2.0,
    }  # fmt: skip


def test_the_interval_pairs_records():
    """Records differ by far more than training changes any, and all change alike."""
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 10, 200)
    before, after = easy, easy + 0.5 + rng.normal(0, 0.1, 200)
    metrics = changes({"x": Values.of(before)}, {"x": Values.of(after)}, 0)
    low, high = metrics["change/x_low"], metrics["change/x_high"]
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)


def test_the_interval_covers_as_often_as_it_says():
    rng, inside = np.random.default_rng(1), 0
    for seed in range(100):
        difference = rng.normal(0.3, 1, 60)
        metrics = changes({"x": Values.of(np.zeros(60))}, {"x": Values.of(difference)}, seed)
        inside += metrics["change/x_low"] <= 0.3 <= metrics["change/x_high"]
    assert 88 <= inside <= 99


def test_many_records_are_drawn_in_parts():
    count = 60_000
    after = np.random.default_rng(2).normal(0, 1, count)
    metrics = changes({"x": Values.of(np.zeros(count))}, {"x": Values.of(after)}, 3)
    width = metrics["change/x_high"] - metrics["change/x_low"]
    assert width == pytest.approx(2 * 1.96 * after.std() / count**0.5, rel=0.1)


def test_other_records_are_refused_and_json_keeps_them():
    with pytest.raises(ValueError, match=r"loss: \(2,\) records before, \(1,\) after"):
        changes({"loss": Values.of([1.0, 2.0])}, {"loss": Values.of([1.0])}, 0)
    values = {"loss": Values.of([0.1, 1 / 3], [1, 2])}
    kept = from_json(json.loads(json.dumps(to_json(values))))
    assert [*map(list, kept["loss"])] == [*map(list, values["loss"])]


def pair_rows(count):
    return {
        "valid": np.ones((1, count), np.float32), "example_ids": np.arange(count)[None],
        "lengths": np.ones((1, count, 2), np.int32),
    }  # fmt: skip


def test_what_is_right_record_by_record_has_the_mean_that_is_reported():
    scores = np.array([[[2.0, 1.0], [0.0, 0.0], [1.0, 3.0], [4.0, 3.0]]])
    values = right_values(scores, pair_rows(4))["accuracy"]
    assert values.sums.tolist() == [1, 0.5, 0, 1]
    assert values.mean == evaluate_pairs(scores[0], pair_rows(4))[0]["eval/accuracy"]
    divided = right_values(scores, pair_rows(4), divisors=np.array([[4, 1]] * 4))["accuracy"]
    assert divided.sums.tolist() == [0, 0.5, 0, 0]
    rows = pair_rows(4) | {"labels": np.reshape([1, 0, 0.5, 0.25], (1, 4, 1))}
    scores = np.reshape([2.0, 1.0, 9.0, -1.0], (1, 4, 1))
    values = right_values(scores, rows)["accuracy"]
    assert values.sums.tolist() == [1, 0, 0, 1] and values.weights.tolist() == [1, 1, 0, 1]
    assert values.mean == label_metrics(scores, rows)[0]["eval/accuracy"]
