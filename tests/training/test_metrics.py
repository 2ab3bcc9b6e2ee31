"""metrics.jsonl: exact numbers, each step once, torn lines dropped."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.metrics import (
    Means,
    Metrics,
    MetricsWriter,
    fetch,
    joined,
    read_metrics,
    truncate_metrics,
)


def write(run, start, steps, **options):
    writer = MetricsWriter(run, start, tensorboard=False, **options)
    for step in steps:
        writer.write(step, {"train/loss": step / 3})
    writer.close()


STEPS = [
    ({"rewards/accuracies": 0.5, "train/skipped": 0}, {"rewards/accuracies": 4}),
    ({"rewards/accuracies": 0.0, "train/skipped": 1}, {"rewards/accuracies": 0}),
    ({"rewards/accuracies": 1.0, "train/skipped": 1}, {"rewards/accuracies": 12}),
]
OF_AN_ITERATION = {
    "objective/kl": ([1, 2, 6], 3),
    "objective/kl_coefficient": ([0.2, 0.3, 0.4], 0.4),
    "train/learning_rate": ([3, 2, 1], 1),
    "train/grad_norm": ([3, 9, 1], 1),
    "val/consecutive_skipped": ([0, 1, 2], 2),
    "policy/ratio_max": ([1, 5, 2], 5),
    "policy/ratio_deviation": ([0.5, 4, 0.25], 4),
    "advantages/max": ([2, 3, 1], 3),
    "completions/max_length": ([9, 8, 7], 9),
    "completions/min_length": ([4, 2, 3], 2),
    "rollout/logprob_difference": ([0.5, 0.25, 0], 0.5),
    "rollout/logprob_difference_mean": ([0.5, 0.25, 0], 0.25),
    "rollout/tokens": ([10, 20, 30], 60),
    "rewards/failures": ([1, 0, 2], 3),
    "rewards/total/std": ([1, 2, 3], 2),
}


def scalars(values):
    return {name: np.float32(value) for name, value in values.items()}


@pytest.mark.parametrize("interrupted", range(4))
def test_a_mean_is_a_ratio_of_sums_and_survives_a_restart(interrupted):
    means = Means()
    for i, (values, weights) in enumerate(STEPS):
        if i == interrupted:
            means = Means(json.loads(json.dumps(means.state())))
        means.add(*fetch(Metrics.of(scalars(values), scalars(weights))))
    assert means.take() == {"rewards/accuracies": (4 * 0.5 + 12) / 16, "train/skipped": 1}
    assert means.take() == means.state() == {}


def test_names_keep_their_meaning_over_several_steps():
    means = Means()
    for i in range(3):
        means.add(*fetch(scalars({name: v[i] for name, (v, _) in OF_AN_ITERATION.items()})))
    expected = {name: float(np.float32(value)) for name, (_, value) in OF_AN_ITERATION.items()}
    assert means.take() == expected


def test_what_is_said_of_one_step_is_its_own_value_to_the_last_bit():
    rng = np.random.default_rng(0)
    values = {f"x/{i}": np.float32(x) for i, x in enumerate(rng.normal(size=300))}
    weights = {name: np.float32(rng.uniform(0, 1e6)) for name in values}
    means = Means()
    means.add(*fetch(Metrics.of(values, weights)))
    assert means.take() == {name: float(value) for name, value in values.items()}
    for step in ({"x": 0.0, "y": math.nan}, {"y": 1.0, "policy/ratio_max": math.nan}):
        means.add(step, {"x": 0.0, "y": 1.0})
    means.add({"policy/ratio_max": 1.0}, {})
    line = means.take()
    assert math.isnan(line["y"]) and math.isnan(line["policy/ratio_max"])


def test_a_mean_of_nothing_is_in_no_line():
    means = Means({"logps/chosen": (0.0, 0.0)})  # as older checkpoints have it
    means.add({"rewards/chosen": 0.0, "loss": 1.0}, {"rewards/chosen": 0.0, "loss": 2.0})
    assert means.take() == {"loss": 1.0}
    metrics = joined({"a": (1.0, 0.0), "b": (2.0, 0.0)}, {"b": (3.0, 4.0)}, {"c": (5.0, 1.0)})
    assert fetch(metrics) == ({"b": 3.0, "c": 5.0}, {"b": 4.0, "c": 1.0})


def test_numbers_are_exact_and_what_is_not_finite_is_a_string(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    values = {"a": 1 / 3, "b": np.float32(0.1), "n": math.nan, "p": math.inf, "m": -math.inf}
    writer.write(3, values | {"k": np.int32(7)})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert list(line) == ["step", *values, "k"]
    assert line["a"] == 1 / 3 and line["b"] == float(np.float32(0.1))
    assert (line["n"], line["p"], line["m"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["n"]) and read["m"] == -math.inf and read["step"] == 3


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(1, {"x": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 1.0}\n'
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"step": 7, "tra', '{"step": 7}', "\0\0\0\n", "7\n"])
def test_resuming_drops_later_and_torn_lines(tmp_path, torn):
    write(tmp_path, 0, [2, 4, 6])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]
    write(tmp_path, 4, [5, 6])
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 5, 6]
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_tensorboard_without_tensorflow(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    assert "tensorflow" not in sys.modules


def test_wandb_that_is_not_installed_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(tmp_path, 0, tensorboard=False, wandb="project")
