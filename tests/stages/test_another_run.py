"""What a finished or interrupted run is made from is edited between two real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from rlhf_jax.hub.chat_formats import TEMPLATES
from rlhf_jax.hub.hf_weights import write_weights
from rlhf_jax.models import PRESETS, init
from tests.hub.test_hub_tokenizer import write
from tests.stages.conftest import ROOT

REWARD = "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"


@pytest.fixture(scope="module")
def place(experiments, tmp_path_factory):
    """A folder with a copy of the package, the experiments and finished runs of sft, dpo, grpo."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "rlhf_jax", folder / "rlhf_jax")
    for path in experiments.iterdir():
        if path.suffix == ".jsonl":
            shutil.copy(path, folder)
        elif path.suffix == ".py":
            (folder / path.name).write_text(path.read_text().replace(f"{experiments}/", ""))
    (folder / "mine.py").write_text(REWARD)
    for name in ("dpo", "grpo"):
        assert run(folder, name).returncode == 0
    return folder


def run(folder, name, *arguments, fault=None):
    """`main --config=NAME.py` there; GRPO is rewarded by mine.py."""
    mine = ["--config.reward.scorers=mine.py:score", "--config.init.reward="]
    environment = os.environ | {"PYTHONPATH": "", "RLHF_JAX_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "rlhf_jax.main", f"--config={name}.py"]
        + (mine if name == "grpo" else [])
        + list(arguments),
        cwd=folder,
        env=environment | ({"FAULT": fault} if fault else {}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def copied(place, target):
    return shutil.copytree(place, target / "place")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def refused(result):
    """What differs, from the one line of a refusal."""
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--rerun" in line and "Traceback" not in result.stderr
    told = re.search(r"made from something else \((.*?)\); --rerun", line)[1]
    assert not re.search(r"has changed|->", result.stdout)  # said once
    return told


def every_reply(path):
    """Edits every reply of a file of conversations."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] += " Indeed."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_nothing_that_decides_a_finished_run_is_reused_after_an_edit(place, tmp_path):
    folder = copied(place, tmp_path)
    with (folder / "dpo.py").open("a") as file:
        file.write("# a comment\n")
    assert run(folder, "dpo").stdout.count("reusing") == 3

    edit(folder / "mine.py", "float(len", "-float(len")
    assert refused(run(folder, "grpo")) == "reward.scorers: mine.py has changed"
    edit(folder / "mine.py", "-float(len", "float(len")
    assert run(folder, "grpo").stdout.count("reusing") == 3

    loss = folder / "rlhf_jax/losses/preference.py"
    edit(loss, "def preference_loss(", "THRESHOLD = 1\n\n\ndef preference_loss(")
    assert refused(run(folder, "dpo")) == "losses/preference.py has changed"
    result = run(folder, "grpo")  # which has no such loss
    assert result.returncode == 0 and result.stdout.count("reusing") == 3
    edit(folder / "rlhf_jax/losses/advantages.py", "SCALE_EPS = 1e-4", "SCALE_EPS = 2e-4")
    assert refused(run(folder, "grpo")) == "losses/advantages.py has changed"


@pytest.mark.slow
def test_a_parent_on_other_data_makes_another_child(place, tmp_path):
    folder = copied(place, tmp_path)
    every_reply(folder / "chats.jsonl")
    result = run(folder, "dpo")
    told = refused(result)
    assert told == "data.train: chats.jsonl has changed, data.validation: chats.jsonl has changed"
    assert "--config.init.policy=runs/sft starts from what is there" in result.stderr
    old = (folder / "runs/dpo/summary.json").read_text()
    assert run(folder, "sft", "--rerun").returncode == 0
    assert refused(run(folder, "dpo")) == "the model of init.policy has changed"
    result = run(folder, "dpo", "--rerun")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "runs/dpo is kept as runs/dpo.1" in result.stdout
    assert (folder / "runs/dpo.1/summary.json").read_text() == old
    summary = json.loads((folder / "runs/dpo/summary.json").read_text())
    assert summary["made_from"]["parents"] != json.loads(old)["made_from"]["parents"]
    assert run(folder, "dpo").stdout.count("reusing") == 3
    # To the bit the same data again is the same parent, whatever became of it meanwhile.
    shutil.copy(place / "chats.jsonl", folder)
    assert run(folder, "sft", "--rerun").returncode == 0
    assert refused(run(folder, "dpo")) == "the model of init.policy has changed"
    shutil.rmtree(folder / "runs/dpo")
    os.rename(folder / "runs/dpo.1", folder / "runs/dpo")
    assert run(folder, "dpo").stdout.count("reusing") == 3


@pytest.mark.slow
def test_an_interrupted_run_does_not_go_on_with_other_data(place, tmp_path):
    folder = copied(place, tmp_path)
    workdir = "--workdir=runs/again"
    assert run(folder, "dpo", workdir, fault="step:11").returncode == -9
    text = (folder / "pairs.jsonl").read_text()
    edit(folder / "pairs.jsonl", '"chosen": "', '"chosen": "So. ')
    assert "pairs.jsonl has changed" in refused(run(folder, "dpo", workdir))
    (folder / "pairs.jsonl").write_text(text)
    result = run(folder, "dpo", workdir)
    assert result.returncode == 0 and "continuing after step" in result.stdout
    ours, theirs = (
        json.loads((folder / f"runs/{name}/summary.json").read_text()) for name in ("again", "dpo")
    )
    assert ours["config_hash"] == theirs["config_hash"]
    assert ours["metrics"]["eval/kl"] == theirs["metrics"]["eval/kl"]


@pytest.mark.slow
def test_another_template_and_a_first_try_that_failed(place, tmp_path):
    folder = copied(place, tmp_path)
    given = folder / "given"
    given.mkdir()
    tokenizer = write(given, "chatml")
    config = dataclasses.replace(
        PRESETS["1b"], vocab_size=tokenizer.vocab_size, layers=1, width=32, heads=4, kv_heads=2,
        head_dim=8, mlp_width=64, max_length=1024, compute_dtype="float32",
    )  # fmt: skip
    write_weights(given, config, init(config, jax.random.key(0)))
    template = folder / "mine.jinja"
    template.write_text(TEMPLATES["chatml"])
    hub = ["--workdir=runs/hub", "--config.init.policy=given", "--config.data.replay="]
    hub += ["--config.data.chat_template=mine.jinja", "--config.data.train=chats.jsonl"]

    failed = run(folder, "sft", *hub, "--config.data.row_length=32")
    assert failed.returncode == 2 and (folder / "runs/hub/config.json").exists()
    done = run(folder, "sft", *hub, "--config.data.row_length=768")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "->" not in done.stdout
    assert "reusing" in run(folder, "sft", *hub, "--config.data.row_length=768").stdout
    template.write_text("{# other #}" + template.read_text())
    told = refused(run(folder, "sft", *hub, "--config.data.row_length=768"))
    assert told == "data.chat_template: mine.jinja has changed"
