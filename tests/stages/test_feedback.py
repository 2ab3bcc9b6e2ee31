"""A stage of AI feedback in a chain: its run is one like any other."""

from __future__ import annotations

import json

import jax
import pytest

from rlhf_jax.judges import feedback
from rlhf_jax.stages import chain
from rlhf_jax.training import mesh
from rlhf_jax.training.summary import read_summary


@pytest.mark.slow
def test_a_run_of_ai_feedback_is_a_run_like_any_other(experiments, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:1])
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
