"""metrics.jsonl: exact numbers, each step once, torn lines dropped."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.metrics import MetricsWriter, read_metrics, truncate_metrics


def write(run, start, steps, **options):
    writer = MetricsWriter(run, start, tensorboard=False, **options)
    for step in steps:
        writer.write(step, {"train/loss": step / 3})
    writer.close()


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
