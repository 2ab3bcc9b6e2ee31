"""Memory and persona through the front door: what an evaluation over several turns says."""

from __future__ import annotations

import json

import pytest

from tests.stages.conftest import run_main

pytestmark = pytest.mark.slow

BASE = [
    *("--config.model.width=32", "--config.model.heads=2", "--config.model.kv_heads=2"),
    *("--config.model.head_dim=16", "--config.model.mlp_width=64", "--config.train.steps=30"),
    *("--config.tokenizer.vocab_size=400", "--config.data.train=town/text[:2%]"),
    "--config.data.validation=town/text[:2%]",
]
SMALL = {
    "memory:sft": [
        *("--config.train.steps=6", "--config.data.train=memory/dialogue[:2%]"),
        *("--config.data.validation=memory/dialogue[:2%]", "--config.data.row_length=1024"),
        "--config.data.replay=town/text[:2%]",
    ],
    "persona:sft": [
        *("--config.train.steps=6", "--config.data.train=persona/dialogue[:2%]"),
        *("--config.data.validation=persona/dialogue[:2%]", "--config.data.row_length=1024"),
        *("--config.data.replay=", "--config.data.trained_turns=last"),
    ],
    "persona:dpo": [
        *("--config.train.steps=2", "--config.data.train=persona/pair[:1%]"),
        *("--config.data.validation=persona/pair[:2%]", "--config.data.row_length=1024"),
    ],
    "persona:grpo": [
        *("--config.train.steps=2", "--config.train.eval_every=2"),
        *("--config.rollout.prompts=2", "--config.rollout.samples=4", "--config.eval.during=4"),
        *("--config.rollout.max_prompt_tokens=200", "--config.rollout.max_new_tokens=300"),
    ],
}
RATES = {
    "memory": [
        *(f"memory/known/recall/distance/{n}" for n in (1, 2, 4, 8)),
        *(f"memory/new/{name}" for name in ("updated", "resurrected", "abstained", "false_memory")),
    ],
    "persona": [
        *("persona/prompt_to_line", "persona/line_to_line", "persona/leak"),
        *(f"persona/rule/turn/{n}" for n in range(1, 9)),
        *("persona/asked_after/2", "persona/asked_after/8"),
    ],
}


def test_every_stage_says_what_is_remembered_and_kept(tmp_path):
    base = str(tmp_path / "base")
    common = ["--config.train.tensorboard=False", "--config.optimizer.warmup_steps=0"]
    done = run_main("--config=experiments/memory.py:base", f"--workdir={base}", *common, *BASE)
    assert done.returncode == 0, done.stderr
    parents = {"persona:dpo": "persona:sft", "persona:grpo": "persona:sft"}
    for variant, flags in SMALL.items():
        name, _, stage = variant.partition(":")
        parent = str(tmp_path / parents[variant]) if variant in parents else base
        where = (f"--workdir={tmp_path / variant}", f"--config.init.policy={parent}")
        config = f"--config=experiments/{name}.py:{stage}"
        done = run_main(config, *where, "--config.eval.count=60", *common, *flags)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / variant / "summary.json").read_text())["metrics"]
        for rate in RATES[name]:
            low, high = (metrics[f"eval/{rate}_{end}"] for end in ("low", "high"))
            assert 0 <= low <= metrics[f"eval/{rate}"] <= high + 1e-9, rate
        assert "eval/correct/facts" in metrics
        assert ("eval/pass^8" in metrics) == (name == "persona")
        drawn = json.loads((tmp_path / variant / "evaluation.json").read_text())["plots"]
        curve = {"memory": "memory/known/recall/distance", "persona": "persona/rule/turn"}[name]
        assert curve in {plot["title"] for plot in drawn}
