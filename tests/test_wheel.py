"""A wheel, installed elsewhere, runs the experiments that it brings and those of its user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--config.train.steps=2", "--config.train.tensorboard=False", "--config.batch.rows=2"),
    *("--config.data.train=texts.jsonl", "--config.data.validation=texts.jsonl"),
]
MINE = """
from rlhf_jax.stages import defaults


def get_config():
    return defaults.base(
        "sft", init=dict(policy="base.py"), batch=dict(rows=1),
        data=dict(train="chats.jsonl", validation="chats.jsonl"),
        train=dict(steps=1, tensorboard=False), eval=dict(source="chats.jsonl", max_new_tokens=4),
    )
"""
BASE = """
from rlhf_jax.stages import defaults


def get_config():
    return defaults.base(
        "pretrain", model=defaults.model("tiny", layers=1), tokenizer=dict(vocab_size=300),
        data=dict(train="texts.jsonl", validation="texts.jsonl"), batch=dict(rows=1),
        train=dict(steps=1, tensorboard=False),
    )
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    """The command rlhf-jax of a fresh environment that sees this one's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # the build leaves files of its own
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "shared"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True)
    shutil.rmtree(source)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    of_venv = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = subprocess.run(of_venv, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "-q", "install", "--no-deps", wheel], check=True)
    return folder / "venv/bin/rlhf-jax"


def run(command: Path, folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_packaged_and_own_experiments_from_any_directory(command, tmp_path):
    text = '{"text": "Ada keeps the shop and Ben the mill, and both are at home on Sunday."}\n'
    (tmp_path / "texts.jsonl").write_text(text * 40)
    turns = '[{"role": "user", "content": "Who? "}, {"role": "assistant", "content": "Ada."}]'
    (tmp_path / "chats.jsonl").write_text(f'{{"messages": {turns}}}\n' * 40)
    assert run(command, tmp_path, "--version").startswith("rlhf_jax 0.")
    assert "dpo" in run(command, tmp_path)
    assert '"hh_rlhf/helpful"' in run(command, tmp_path, "--config=dpo:hh", "--print")
    told = run(command, tmp_path, "judges", "card", "--judge=gold", "--count=20", "--calibrate=10")
    assert "format" in told  # a principle of the packaged constitution

    flags = [*SMALL, "--config.tokenizer.vocab_size=300", "--config.model.layers=1"]
    flags.append("--config.optimizer.warmup_steps=0")
    run(command, tmp_path, "--config=pretrain", *flags)
    assert (tmp_path / "runs/pretrain/report.html").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sft.py").write_text(MINE)
    (tmp_path / "mine/base.py").write_text(BASE)
    said = run(command, tmp_path, "--config=mine/sft.py", "--workdir=runs/deep/sft")
    assert "running mine/base.py in runs/deep/base" in said
    assert (tmp_path / "runs/deep/sft/summary.json").is_file()
    written = run(command, tmp_path, "export", "--workdir=runs/deep/sft", "--out=hub")
    assert written.startswith("written: ")
