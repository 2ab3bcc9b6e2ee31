"""Seeds that are trained as one program: each is what it is by itself, and goes on as a run."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import devices
from rlhf_jax import main as command
from rlhf_jax.stages.chain import prepare
from rlhf_jax.sweep import together
from rlhf_jax.sweep.__main__ import main
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.summary import read_summary


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The test's devices are taken for the cores of one, as those of a process of its own are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_cores", 8)
        yield


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory) -> Path:
    """The finished run that all start from."""
    directory = tmp_path_factory.mktemp("start") / "pretrain"
    assert command.main([f"--config={tiny}:pretrain", f"--workdir={directory}"]) == 0
    return directory


def lines_of(tiny: str, stage: str, start: Path, folder: Path, *further: str) -> list[list[str]]:
    """The flags of a run for each of two seeds."""
    flags = [f"--config={tiny}:{stage}", f"--config.init.policy={start}", *further]
    return [
        [*flags, f"--config.seed={seed}", f"--workdir={folder / str(seed)}"] for seed in range(2)
    ]


def prepared(line: list[str]) -> together._Run:
    given, _, stated, values = command.parse(line)
    return together._prepared(prepare(given, stated), values)


def saved(line: list[str]):
    """The state and the place in the data of a run's checkpoint."""
    run = prepared(line)
    with closing(Checkpoints(run.held.path / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(run.learner.init())
    assert restored is not None
    return restored.state, restored.data


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "reward")]


@pytest.mark.parametrize("stage", ["preference", *SLOW])
def test_each_seed_is_trained_as_by_itself(tiny, start, tmp_path, stage):
    lines = lines_of(tiny, stage, start, tmp_path, "--config.train.ema_decay=0.5")
    together.train(lines)
    ends = []
    for line in lines:
        run = prepared(line)
        state = run.learner.init()
        for _ in range(run.options.steps):
            state, _ = run.learner.step(state, next(run.training.batches.iterator))
        other, data = saved(line)
        for mine, theirs in zip(*map(jax.tree.leaves, (other, state)), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)
        assert data == run.training.batches.iterator.get_state()
        ends.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(other.ema_params)]))
    assert np.abs(ends[0] - ends[1]).max() > 1e-3  # seeds do differ


@pytest.mark.slow
def test_what_is_trained_goes_on_as_a_run_and_what_was_lost_is_trained_again(
    tiny, start, tmp_path, capsys
):
    lines = lines_of(tiny, "preference", start, tmp_path)
    together.train(lines)
    before = [saved(line) for line in lines]
    shutil.rmtree(tmp_path / "1" / "checkpoints")  # as if it was killed before it came to that one
    kept = (tmp_path / "0" / "checkpoints" / "00000004").stat().st_mtime_ns
    together.train(lines)
    for line, (state, data) in zip(lines, before, strict=True):
        jax.tree.map(np.testing.assert_array_equal, saved(line), (state, data))
    assert (tmp_path / "0" / "checkpoints" / "00000004").stat().st_mtime_ns == kept
    assert command.main(lines[1]) == 0
    assert "continuing after step 4" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "1" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_summary(tmp_path / "1")["metrics"]["eval/accuracy"] > 0.5


@pytest.mark.slow
def test_a_run_that_diverges_is_left_to_itself(tiny, start, tmp_path, capsys):
    flags = ["--config.optimizer.learning_rate=1e30", "--config.train.max_skipped=2"]
    lines = lines_of(tiny, "preference", start, tmp_path, *flags)
    together.train(lines)
    assert capsys.readouterr().out.count("is trained by itself: steps 1 to 2 end in") == 2
    assert not list(tmp_path.glob("*/checkpoints/0*"))
    assert command.main(lines[0]) == 2
    assert "end in 2 skipped updates" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, flags, message",
    [
        ("pretrain", [], "--vmap-seeds is for the stages sft, preference, reward, not pretrain"),
        ("sft", ["--config.train.eval_every=2"], "set train.eval_every=0"),
        ("sft", ["--seeds=1"], "--vmap-seeds needs --seeds=2 or more"),
        ("sft", ["--seeds-from=pretrain"], "and has no --search or --seeds-from"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(tiny, tmp_path, capsys, stage, flags, message):
    where = tmp_path / "runs"
    flags = [f"--config={tiny}:{stage}", f"--workdir={where}/abl", "--vmap-seeds", *flags]
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not where.exists()
