"""Adapters through every stage: one frozen base, small runs, the same bits after a kill."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rlhf_jax.models import lora
from rlhf_jax.training.saved_model import load_model
from rlhf_jax.trees import named_leaves
from tests.stages.conftest import run_main

ADAPTER = ["--config.adapter.rank=4", "--config.adapter.kind=dora", "--config.adapter.base=int8"]


def run(experiments, runs, stage, *options, name=None, fault=None):
    workdir = runs / (name or stage)
    arguments = [f"--config={experiments}/{stage}.py", f"--workdir={workdir}"]
    result = run_main(*arguments, *options, fault=fault)
    return workdir, result


@pytest.fixture(scope="module")
def sft(experiments, tmp_path_factory):
    """A pre-trained model fine-tuned by an adapter on its int8 kernels."""
    runs = tmp_path_factory.mktemp("adapters")
    workdir, result = run(experiments, runs, "sft", *ADAPTER)
    assert result.returncode == 0, result.stderr[-2000:]
    return workdir


def trained(params):
    return named_leaves(lora.own(params))


@pytest.mark.slow
def test_only_the_adapter_is_kept(sft):
    base, model = load_model(sft.parent / "pretrain"), load_model(sft)
    assert model.adapter.rank == 4 and model.base.directory == base.base.directory
    assert set(named_leaves(lora.own(model.params))) == {
        f"layers/{module}/lora/{part}"
        for module in (
            *(f"attention/{name}" for name in ("query", "key", "value", "out")),
            *(f"mlp/{name}" for name in ("gate", "up", "down")),
        )
        for part in ("a", "b", "scale", "magnitude")
    }
    for folder in ("model", "checkpoints"):
        for meta in (sft / folder).rglob("meta.json"):
            names = json.loads(meta.read_text())["arrays"]
            assert not [name for name in names if "kernel" in name or "embedding" in name]
    assert any(np.any(leaf) for name, leaf in trained(model.params).items() if name.endswith("/b"))


@pytest.mark.slow
def test_preference_starts_where_the_adapter_was(experiments, sft):
    """Its reference is base + the adapter it started from: KL and margins are to that."""
    options = [f"--config.init.policy={sft}", *ADAPTER]
    dpo, result = run(experiments, sft.parent, "dpo", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    before, after = load_model(sft), load_model(dpo)
    assert before.params["embed"]["embedding"] is after.params["embed"]["embedding"]
    moved = {
        n: np.abs(x - trained(before.params)[n]).max() for n, x in trained(after.params).items()
    }
    assert 0 < max(moved.values()) < 0.1
    metrics = json.loads((dpo / "summary.json").read_text())["metrics"]
    assert 0 < metrics["eval/kl"] < 20


@pytest.mark.slow
def test_policy_value_and_reward_share_a_base_and_a_kill_changes_nothing(experiments, sft):
    options = [f"--config.init.policy={sft}", *ADAPTER]
    reward, result = run(experiments, sft.parent, "reward", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "score_head/kernel" in trained(load_model(reward).params)
    assert load_model(reward).base is load_model(sft).base

    options.append(f"--config.init.reward={reward}")
    ppo, result = run(experiments, sft.parent, "ppo", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    broken, result = run(experiments, sft.parent, "ppo", *options, name="broken", fault="update:3")
    assert result.returncode == -9
    broken, result = run(experiments, sft.parent, "ppo", *options, name="broken")
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = load_model(ppo).params, load_model(broken).params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    metrics = json.loads((ppo / "summary.json").read_text())["metrics"]
    assert metrics["eval/kl"] > 0


@pytest.mark.slow
def test_another_adapter_is_refused(experiments, sft):
    options = [f"--config.init.policy={sft}", "--config.adapter.rank=8"]
    _, result = run(experiments, sft.parent, "dpo", *options, name="a")
    assert result.returncode == 2
    assert "the model has an adapter with rank = 4, the config asks for 8" in result.stderr


@pytest.mark.slow
def test_without_one_all_weights_are_trained(experiments, sft):
    options = [f"--config.init.policy={sft}"]
    full, result = run(experiments, sft.parent, "dpo", *options, name="full")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "is merged: all weights are trained" in result.stdout
    assert not lora.has_adapter(load_model(full).params)
