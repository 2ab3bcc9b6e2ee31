"""A model directory as it comes from the Hub goes through the stages and out again."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.hub.hf_weights import write_weights
from rlhf_jax.models import PRESETS, init
from rlhf_jax.training.saved_model import load_model
from tests.hub.test_hub_tokenizer import write
from tests.stages.conftest import run_main


@pytest.mark.slow
def test_from_a_directory_through_sft_to_an_export(experiments, tmp_path):
    source = tmp_path / "given"
    source.mkdir()
    tokenizer = write(source, "chatml")
    config = dataclasses.replace(
        PRESETS["1b"], vocab_size=tokenizer.vocab_size, layers=2, width=32, heads=4, kv_heads=2,
        head_dim=8, mlp_width=64, max_length=1024, compute_dtype="float32", tied_embeddings=False,
    )  # fmt: skip
    write_weights(source, config, init(config, jax.random.key(0)))

    def run(stage, policy, *more):
        arguments = [f"--config={experiments}/{stage}.py", f"--workdir={tmp_path}/{stage}"]
        result = run_main(*arguments, f"--config.init.policy={policy}", *more)
        assert result.returncode == 0, result.stderr[-2000:]
        return tmp_path / stage

    sft = run("sft", source, "--config.data.row_length=768")
    tuned = load_model(sft)
    assert tuned.tokenizer.ends == tokenizer.ends and tuned.config.rope_theta == 500_000.0
    parents = json.loads((sft / "summary.json").read_text())["parents"]
    assert parents["policy"] == str(source)

    result = run_main(f"--workdir={sft}", f"--out={tmp_path}/out", module="rlhf_jax.export")
    assert result.returncode == 0, result.stderr[-2000:]
    again, trained = load_model(tmp_path / "out"), tuned
    assert again.config == dataclasses.replace(
        trained.config, remat="none", init_std=again.config.init_std
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_a_directory_that_cannot_be_used_is_named(experiments, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    result = run_main(
        f"--config={experiments}/sft.py",
        f"--workdir={tmp_path}/run",
        f"--config.init.policy={tmp_path}",
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "model_type = 't5' is not supported" in line


@pytest.mark.slow
def test_rows_that_pad_a_vocabulary_are_in_no_answer_and_in_no_ratio(experiments, tmp_path):
    """Their logits are ±100 here: one that was drawn, or counted in a sum, would show."""
    given = tmp_path / "given"
    given.mkdir()
    words = write(given, "chatml").vocab_size
    config = dataclasses.replace(
        PRESETS["1b"], vocab_size=words + 40, layers=1, width=32, heads=2, kv_heads=1, head_dim=16,
        mlp_width=64, max_length=1024, compute_dtype="float32", tied_embeddings=False,
    )  # fmt: skip
    params = init(config, jax.random.key(0))
    head = params["lm_head"]["kernel"]
    signs = jnp.where(jnp.arange(40) % 2, 100.0, -100.0)
    params["lm_head"]["kernel"] = head.at[:, words:].set(head[:, :1] * signs)
    write_weights(given, config, params)
    (tmp_path / "mine.py").write_text(
        "def legible(prompts, responses):\n    return [len(set(r)) for r in responses]\n"
    )
    result = run_main(
        "--config=experiments/grpo.py:own", f"--workdir={tmp_path}/run",
        f"--config.init.policy={given}", f"--config.reward.scorers={tmp_path}/mine.py:legible",
        f"--config.data.train={experiments}/prompts.jsonl", "--config.rollout.prompts=4",
        "--config.rollout.samples=4", "--config.rollout.max_new_tokens=16",
        "--config.eval.max_new_tokens=16", "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert abs(line["policy/ratio"] - 1) < 1e-5 and abs(line["policy/ratio_max"] - 1) < 1e-5
    assert line["rollout/logprob_difference"] < 1e-4 and abs(line["objective/kl"]) < 1e-5
