"""The town's tools through the front door: what an evaluation of episodes says."""

from __future__ import annotations

import json

import pytest

from rlhf_jax.tasks.town.tool_exercises import FAMILIES
from tests.stages.conftest import run_main

pytestmark = pytest.mark.slow

SMALL = {
    "base": [
        *("--config.model.width=32", "--config.model.heads=2", "--config.model.kv_heads=2"),
        *("--config.model.head_dim=16", "--config.model.mlp_width=64", "--config.train.steps=30"),
        *("--config.tokenizer.vocab_size=400", "--config.data.train=town_tools/dialogue[:2%]"),
        "--config.data.validation=town/text[:2%]",
    ],
    "sft": [
        *("--config.train.steps=12", "--config.data.train=town_tools/dialogue[:2%]"),
        "--config.data.validation=town_tools/dialogue[:2%]",
    ],
    "grpo": [
        *("--config.train.steps=2", "--config.optimizer.warmup_steps=0"),
        *("--config.rollout.prompts=2", "--config.rollout.samples=4", "--config.eval.during=4"),
        "--config.train.eval_every=2",
    ],
}


def test_every_stage_says_how_it_uses_tools(tmp_path):
    parent = ""
    for stage, flags in SMALL.items():
        more = [f"--config.init.policy={parent}"] if parent else []
        if stage != "base":
            more.append("--config.eval.count=60")
        parent = str(tmp_path / stage)
        config = f"--config=experiments/tools.py:{stage}"
        done = run_main(config, f"--workdir={parent}", "--config.train.tensorboard=False",
                        *flags, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        if stage == "base":
            continue
        metrics = json.loads((tmp_path / stage / "summary.json").read_text())["metrics"]
        shares = [metrics[f"eval/success/{family}"] for family in FAMILIES]
        shares += [metrics[f"eval/pass^{k}"] for k in (1, 2, 4, 8)]
        shares += [metrics["eval/needless_calls"], metrics["eval/gold_reward"]]
        assert all(0 <= share <= 1 for share in shares)
        tables = json.loads((tmp_path / stage / "evaluation.json").read_text())["tables"]
        (table,) = [each for each in tables if each["title"] == "What came of the replies"]
        numbers = {row[0]: row[1] for row in table["rows"]}
        assert sum(numbers[f"success/{family}"] for family in FAMILIES) == 60
