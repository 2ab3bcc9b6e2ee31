"""metrics.jsonl: exact numbers, each step once, lines whole or absent; and what is beside it."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import sys
import threading
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from rlhf_jax.errors import NoRoom, UserError
from rlhf_jax.training import metrics_writer
from rlhf_jax.training.meanings import is_less_better
from rlhf_jax.training.metrics import Means, Metrics, fetch, joined, read_metrics
from rlhf_jax.training.metrics_writer import MetricsWriter, truncate_metrics


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
    "tools/failures": ([1, 0, 2], 3),
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


@pytest.mark.parametrize(
    ("less", "names"),
    [
        (True, "loss bpb ece kl kl_low sampled_kl best_of_8/kl_bound best_of_8/kl_estimate"),
        (True, "reward_failures needless_calls invalid_calls reward_model/loss"),
        (True, "safety/refused/harmless/seen safety/refused/harmless/wrapped_low"),
        (True, "safety/extracted safety/extracted_sampled safety/exposure"),
        (False, "accuracy token_accuracy reward_model/accuracy auc gold_reward gold_reward/calls"),
        (False, "gold_win_rate proxy_reward sampled_gold_reward sampled_correct correct/facts"),
        (False, "pass^8 success/booking eos_rate rewards/margins best_of_8/win_rate"),
        (False, "best_of_8/gold best_of_8/correct best_of_n/peak_gold harmful/safe_change"),
        (False, "safety/refused/harmful/seen safety/refused/private/seen safety/balance/seen"),
        (False, "safety/right/harmless safety/right/unknown"),
        (True, "questions/of_fewest questions/of_fewest_high questions/unclear"),
        (False, "questions/within/5"),
    ],
)
def test_the_better_of_two_values_is_known_by_a_metrics_name(less, names):
    for name in names.split():
        assert is_less_better(f"eval/{name}") is less, name


@pytest.mark.parametrize(
    "name", ["response_length", "logps/chosen", "score_mean", "best_of_n/peak_n", "tone"]
)
def test_of_a_metric_that_may_be_better_either_way_nothing_is_the_best(name):
    with pytest.raises(UserError, match=rf"whether more or less of eval/{name} is better"):
        is_less_better(f"eval/{name}")


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


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "damage", ['{"step": 3, "tra{"step": 4}', "\0", '{"step": 2, "a": {}}', "{}"]
)
def test_a_damaged_line_costs_no_other(tmp_path, damage, place, caplog):
    write(tmp_path, 0, [2, 4, 6])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:place], damage + "\n", *lines[place:]]))
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]
    said = f"{path}: damaged lines are left out: 1 of 4, the first is line {place + 1}"
    assert caplog.messages == [said]
    truncate_metrics(path, 4)
    assert path.read_text() == "".join(lines[:2])
    assert caplog.messages == [said, said]
    assert [line["step"] for line in read_metrics(path)] == [2, 4] and len(caplog.messages) == 2


LINES = [f'{{"step": {step}, "train/loss": {step / 3}}}\n' for step in range(1, 7)]


def full_after(count, monkeypatch):
    """A disk that has room for so many more bytes; returns a list that holds the number."""
    room, write = [count], os.write

    def limited(file, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return room


@pytest.mark.parametrize("count", [0, 1, 40, 60, 79])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, count, monkeypatch):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    room = full_after(count, monkeypatch)
    whole = [step for step in (1, 2, 3, 4) if len("".join(LINES[:step])) <= count]
    for step in range(1, 5):
        if step in whole:
            writer.write(step, {"train/loss": step / 3})
            continue
        with pytest.raises(
            NoRoom, match=rf"metrics.jsonl .* {len(LINES[0])} bytes needed, \d+ free"
        ):
            writer.write(step, {"train/loss": step / 3})
        room[0] = min(room[0], len(LINES[0]) - 1)  # what was cut off doesn't make room again
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[: len(whole)])
    kept = [dict(line) for line in writer.unwritten]
    assert [line["step"] for line in kept] == [s for s in (1, 2, 3, 4) if s not in whole]

    room[0] = 10**6
    writer.write(5, {"train/loss": 5 / 3})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:5])
    assert writer.unwritten == []
    writer.close()
    # The next process has them of the checkpoint, whether or not they were written since.
    again = MetricsWriter(tmp_path, 4, unwritten=kept, tensorboard=False)
    again.write(5, {"train/loss": 5 / 3})
    again.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:5])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_metrics_that_cannot_be_made_durable_are_said(tmp_path, code, monkeypatch):
    write(tmp_path, 0, [1, 2])
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)

    def fsync(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(NoRoom, match=os.strerror(code)):
        writer.sync()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(NoRoom, match=rf"{len(LINES[0])} bytes needed"):
        truncate_metrics(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(NoRoom):
        writer.close()


class Client:
    """A stand-in for W&B, one method of which doesn't work."""

    def __init__(self, broken: str, fault):
        self.broken, self.fault, self.lines = broken, fault, []

    def init(self, **options):
        assert options["project"] == "project" and options["resume"] == "allow"
        self._do("init")
        return self

    def log(self, values, step):
        self._do("log")
        self.lines.append((step, values))

    def finish(self):
        self._do("finish")

    def _do(self, name):
        if name == self.broken:
            self.fault()


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def hang():
    threading.Event().wait()


@pytest.mark.parametrize("broken", ["init", "log", "finish", None])
@pytest.mark.parametrize("fault", [fail, hang])
def test_wandb_neither_ends_nor_blocks_a_run(broken, fault, tmp_path, monkeypatch, caplog):
    client = Client(broken, fault)
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr(metrics_writer, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(metrics_writer, "MAX_WAITING", 3)
    writer = MetricsWriter(tmp_path, 0, tensorboard=False, wandb="project")
    for step in range(1, 7):
        writer.write(step, {"train/loss": step / 3})
        if broken is None:
            while len(client.lines) < step:
                time.sleep(0.001)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES)
    said = [m for m in caplog.messages if m.startswith("W&B is dropped, the run goes on without")]
    assert caplog.messages == said and len(said) == (broken is not None)
    if broken is None:
        assert client.lines == [(step, {"train/loss": step / 3}) for step in range(1, 7)]


def test_tensorboard_reads_what_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"train/loss": 0.5, "x": np.float32(2)})
    writer.write(5, {"train/loss": math.nan})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert ".out.tfevents." in path.name
    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert data[12 + size : 16 + size] == struct.pack("<I", masked_crc32c(data[12 : 12 + size]))
        data = data[16 + size :]
    version, start, first, second = events
    assert version.file_version == "brain.Event:2"
    assert start.step == 4 and start.session_log.status == event_pb2.SessionLog.START
    assert first.step == 4 and abs(first.wall_time - time.time()) < 60
    assert [(v.tag, v.simple_value) for v in first.summary.value] == [("train/loss", 0.5), ("x", 2)]
    assert second.step == 5 and math.isnan(second.summary.value[0].simple_value)


def test_two_writers_of_a_second_have_files_of_their_own_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_writer.time, "time", lambda: 1e9)
    for step in range(12):
        writer = MetricsWriter(tmp_path, step)
        writer.write(step + 1, {f"loss/{step}": 1.0})
        writer.close()
    files = sorted((tmp_path / "tensorboard").iterdir())  # in this order TensorBoard reads them
    held = [f"loss/{step}".encode() in file.read_bytes() for step, file in enumerate(files)]
    assert held == [True] * 12


@pytest.mark.parametrize("there", [False, True])
def test_tensorboard_of_a_directory_that_is_new_has_the_earlier_lines(tmp_path, there):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train/loss": 0.5}\n')
    if there:
        (tmp_path / "tensorboard").mkdir()  # of a process that wrote them
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"eval/loss": 0.25})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    names = (b"train/loss", b"eval/loss")
    assert [events.read_bytes().count(name) for name in names] == [not there, 1]


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
