"""A stage of AI feedback in a chain: its run is one like any other."""

from __future__ import annotations

import json

import jax
import pytest

from rlhf_jax.judges import feedback
from rlhf_jax.stages import chain
from rlhf_jax.tasks.data_files import data_folder
from rlhf_jax.training import mesh
from rlhf_jax.training.summary import read_summary

REAL = pytest.mark.skipif(
    data_folder() is None, reason="no real data: set RLHF_JAX_DATA or add ../shared/data"
)


@pytest.fixture(name="cache")
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:1])


@pytest.mark.slow
def test_a_run_of_ai_feedback_is_a_run_like_any_other(experiments, tmp_path, cache):
    source = f"{experiments}/fed_back.py"
    (experiments / "fed_back.py").write_text(
        (experiments / "dpo.py").read_text().replace('"preference"', '"ai_preference"')
    )
    config = chain.load_config(source)
    prompts = f"{experiments}/prompts.jsonl"
    config.data.train, config.batch.rows = prompts, 2
    config.feedback.update(judge="people", count=8, max_new_tokens=12)
    place = tmp_path / "runs" / "judge=people,seed=0"
    chain.run(config, source, place)
    lines = (place / feedback.FILE).read_bytes()
    assert len(lines.splitlines()) == 8
    assert read_summary(place)["stage"] == "ai_preference"
    said = read_summary(place)
    assert json.loads((place / feedback.MADE).read_text())["counts"]["labelled"] >= 8
    chain.run(config, source, place)  # it is finished
    assert (place / feedback.FILE).read_bytes() == lines and read_summary(place) == said


@pytest.mark.slow
def test_ones_own_prompts_are_labelled_by_ones_own_function(experiments, tmp_path, cache):
    judge = tmp_path / "mine.py"
    judge.write_text(
        "def longer(prompts, responses, rivals):\n"
        "    return [float(len(a) > len(b)) for a, b in zip(responses, rivals)]\n"
    )
    config = chain.load_config("rlaif:own")
    config.init.policy = f"{experiments}/sft.py"
    config.data.update(train=f"{experiments}/chats.jsonl", row_length=256)
    config.batch.rows, config.train.steps = 2, 11
    config.feedback.update(judge=f"{judge}:longer", count=40, max_new_tokens=12)
    config.eval.update(count=4, max_new_tokens=12)
    chain.run(config, "rlaif:own", tmp_path / "runs" / "rlaif-own")
    kept = (tmp_path / "runs" / "rlaif-own" / feedback.FILE).read_text()
    labels = [json.loads(line) for line in kept.splitlines()]
    assert len(labels) == 40 and all(len(e["chosen"]) > len(e["rejected"]) for e in labels)
    metrics = read_summary(tmp_path / "runs" / "rlaif-own")["metrics"]
    assert metrics["change/logps/chosen_records"] == 2  # the last 5 % of the labels


@REAL
@pytest.mark.slow
def test_real_prompts_are_labelled_by_a_reward_model_and_trained_on(experiments, tmp_path, cache):
    config = chain.load_config("rlaif:hh")
    config.init.policy, config.init.judge = f"{experiments}/sft.py", f"{experiments}/reward.py"
    config.data.update(row_length=256, validation="hh_rlhf/helpful[:40]")
    config.batch.rows, config.train.steps = 2, 11
    config.feedback.update(count=8, max_new_tokens=12)
    config.eval.update(count=4, max_new_tokens=12)
    chain.run(config, "rlaif:hh", tmp_path / "runs" / "rlaif-hh")
    lines = (tmp_path / "runs" / "rlaif-hh" / feedback.FILE).read_text().splitlines()
    labels = [json.loads(line) for line in lines]
    assert len(labels) == 8 and all(0.5 < each["probability"] <= 1 for each in labels)
    assert {each["labeler"] for each in labels} == {str(tmp_path / "runs" / "reward")}
    metrics = read_summary(tmp_path / "runs" / "rlaif-hh")["metrics"]
    assert metrics["eval/response_length"] > 0 and "feedback/agreement" not in metrics
