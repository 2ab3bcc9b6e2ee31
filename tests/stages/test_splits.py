"""Whatever a batch is split over, every stage logs the same numbers, in training and at its end."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rlhf_jax.stages import chain
from rlhf_jax.training import mesh

# Not best_of_n, which trains by SFT's loss: of so small a model too few answers end to be split.
NAMES = ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo", "ensemble", "online")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def logged(experiments, runs, name, microbatches=1, devices=1):
    """What a short run said: the lines of metrics.jsonl and then the metrics of summary.json."""
    source = f"{experiments}/{'dpo' if name == 'kto' else name}.py"
    config = chain.load_config(source)
    if name == "kto":
        config.loss.update({"name": "kto", "sft_coefficient": 0.1})
    config.batch.update(rows=max(4, config.batch.rows), microbatches=microbatches)
    config.train.update(steps=3, log_every=1)
    run = chain.run(config, source, runs / f"{name}-{microbatches}-{devices}")
    said = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said.append(json.loads((run / "summary.json").read_text())["metrics"])
    clocked = ("time/", "_per_second")
    return [{k: float(v) for k, v in x.items() if not any(c in k for c in clocked)} for x in said]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_split_changes_what_a_stage_logs(name, experiments, runs, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(runs / "cache"))
    monkeypatch.setattr(chain, "write_report", lambda *_: None)
    lines = {}
    for split in ((1, 1), (2, 2), (4, 1)):
        monkeypatch.setattr(mesh, "training_devices", lambda n=split[1]: jax.devices()[:n])
        lines[split] = logged(experiments, runs, name, *split)
    whole = lines.pop((1, 1))
    for split, said in lines.items():
        assert [line.keys() for line in said] == [line.keys() for line in whole]
        for i, (line, expected) in enumerate(zip(said, whole, strict=True)):
            for key in expected:
                np.testing.assert_allclose(
                    line[key], expected[key], 1e-4, 1e-4, err_msg=f"{split} {i} {key}"
                )
