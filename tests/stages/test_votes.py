"""The stages on votes of people who differ."""

from __future__ import annotations

import json

import pytest

from tests.stages.conftest import run_main

STAGE = """
from rlhf_jax.stages import defaults


def get_config():
    return defaults.base(
        "{stage}",
        init=dict(policy="{folder}/sft.py"),
        data=dict(train="{folder}/votes.jsonl", validation="{folder}/votes.jsonl", row_length=256),
        batch=dict(rows=2), optimizer=dict(name="adamw", learning_rate=1e-2),
        train=dict(steps=20, log_every=5, checkpoint_every=20, tensorboard=False), {more}
    )
"""
MORE = {
    "reward": "normalize=dict(prompts=0),",
    "preference": 'eval=dict(source="{folder}/prompts.jsonl", count=8, max_new_tokens=12),',
}


@pytest.fixture(scope="module")
def voted(experiments):
    """A folder with votes: two of three always prefer "no", one the reply shown first."""
    lines = []
    for i in range(24):
        for who in ("ann", "bob", "cyd"):
            first = "no" if (i + (who == "ann")) % 2 else "yes"
            chosen = first if who == "cyd" else "no"
            lines.append(
                {
                    "prompt": f"Was it good, number {i}?",
                    "chosen": chosen,
                    "rejected": "yes" if chosen == "no" else "no",
                    "labeler": who,
                    "order": "chosen_first" if first == chosen else "rejected_first",
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (experiments / "votes.jsonl").write_text(text)
    for stage, more in MORE.items():
        config = STAGE.replace("{stage}", stage).replace("{more}", more)
        config = config.replace("{folder}", str(experiments))
        (experiments / f"voted_{stage}.py").write_text(config)
    return experiments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how"),
    [("reward", "nuisance"), ("reward", "majority"), ("preference", "weighted")],
)
def test_votes_train_a_model_that_agrees_with_most_of_them(voted, stage, how):
    run = voted.parent / "voted_runs" / f"{stage}-{how}"
    result = run_main(
        f"--config={voted}/voted_{stage}.py", f"--config.data.labelers={how}", f"--workdir={run}"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "72 votes" in result.stdout
    accuracy = json.loads((run / "summary.json").read_text())["metrics"]["eval/accuracy"]
    # Ann and bob are always for "no", cyd on half of the pairs: 5 votes of 6.
    assert accuracy == pytest.approx(5 / 6, abs=0.01)
