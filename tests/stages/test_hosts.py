"""Two processes on one machine, as on two hosts: together they are one process with all devices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import chain, sft
from rlhf_jax.training import mesh
from rlhf_jax.training.checkpoint import load_params
from rlhf_jax.training.saved_model import Model, save_model
from rlhf_jax.trees import named_leaves

ROOT = Path(__file__).parents[2]

COMMON = """
from rlhf_jax.stages import defaults

SHARED = dict(
    init=dict(policy="start"),
    batch=dict(rows=4),
    optimizer=dict(name="adamw", learning_rate=1e-3, eps=1e-4),
    eval=dict(source="prompts.jsonl", count=4, max_new_tokens=4),
)
TRAIN = dict(steps=6, log_every=1, checkpoint_every=2, tensorboard=False)
"""
STAGES = {
    "sft": """defaults.base(
        "sft", **SHARED, train=TRAIN, loss=dict(label_smoothing=0.0, z_loss=0.0),
        data=dict(train="chats.jsonl", validation="chats.jsonl", row_length=64),
    )""",
    "dpo": """defaults.base(
        "preference", **SHARED, train=TRAIN, loss=dict(name="sigmoid", beta=0.1),
        data=dict(train="pairs.jsonl", validation="pairs.jsonl", row_length=64),
    )""",
    "grpo": """defaults.on_policy(
        "grpo", **SHARED | dict(eval=SHARED["eval"] | dict(during=4)),
        data=dict(train="prompts.jsonl", row_length=64),
        rollout=dict(prompts=4, samples=4, slots=8, max_prompt_tokens=40, max_new_tokens=6),
        reward=dict(scorers="reward.py:vowels=1,length=-0.01"),
        train=TRAIN | dict(steps=3, checkpoint_every=1),
    )""",
}
# It writes down that it was asked, so that a test sees how often and by whom.
REWARD = """
def vowels(prompts, responses):
    with open("asked", "a") as file:
        file.write(f"{len(responses)}\\n")
    return [sum(c in "aeiou0123" for c in r) / 4 for r in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small model, data for it and an experiment of each stage."""
    folder = tmp_path_factory.mktemp("hosts")
    sums = [(f"{a} + {b}", str(a + b)) for a in range(8) for b in range(4)]
    asked = [[{"role": "user", "content": question}] for question, _ in sums]
    records = {
        "chats": [
            {"messages": [*q, {"role": "assistant", "content": answer}]}
            for q, (_, answer) in zip(asked, sums, strict=True)
        ],
        "pairs": [
            {"prompt": question, "chosen": answer, "rejected": answer + " or so"}
            for question, answer in sums
        ],
        "prompts": [{"prompt": question} for question, _ in sums[:12]],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for name, made in STAGES.items():
        text = f"{COMMON}\n\ndef get_config():\n    return {made}\n"
        (folder / f"{name}.py").write_text(text)
    (folder / "reward.py").write_text(REWARD)
    tokenizer = train_bpe([question for question, _ in sums], 290)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, layers=2, width=16, heads=2, kv_heads=1, head_dim=8,
        mlp_width=32, max_length=64,
    )  # fmt: skip
    start = folder / "start"
    start.mkdir()
    save_model(start, Model(shape, transformer.init(shape, jax.random.key(0)), tokenizer))
    summary = {"stage": "pretrain", "status": "done", "config_hash": "0", "parents": {}}
    summary |= {"wall_seconds": 0.0, "metrics": {}}
    (start / "summary.json").write_text(json.dumps(summary))
    return folder


def run(
    folder: Path,
    stage: str,
    workdir: Path,
    *arguments: str,
    processes: int = 2,
    of_each: list[list[str]] | None = None,
    folders: list[Path] | None = None,
    fault: tuple[int, str] | None = None,
    signal: str = "SIGKILL",
) -> list[tuple[int, str]]:
    """(exit code, output) of each of some processes that have four devices between them.

    If one is killed the others are killed too, as a cluster's manager does sooner or later. So are
    those that run for ten minutes: an exit code of -9 then fails the test that asked for another.

    Args:
      of_each: further arguments by process.
      folders: in which each runs, by default the one of the experiments.
      fault: (process, point) at which the signal is sent to that process; see `fault_point`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
    running = []
    for i in range(processes):
        words = [f"--config={folder / stage}.py", f"--workdir={workdir}", *arguments]
        if processes > 1:
            words += [coordinator, f"--processes={processes}", f"--process={i}"]
        words += of_each[i] if of_each else []
        variables = {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(4 // processes),
            "RLHF_JAX_CACHE": str(workdir) + ".cache",
        }
        if fault and fault[0] == i:
            variables |= {"FAULT": fault[1], "FAULT_SIGNAL": signal}
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.stages.training_alone", *words],
                cwd=folders[i] if folders else folder,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        end = time.monotonic() + 600
        while any(process.poll() is None for process in running):
            if any(process.poll() == -9 for process in running) or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
    outputs = [process.communicate()[0] for process in running]
    return [(process.returncode, out) for process, out in zip(running, outputs, strict=True)]


def finished(done: list[tuple[int, str]]) -> None:
    for code, output in done:
        assert code == 0, output[-3000:]


def results(workdir: Path):
    """(final parameters, lines of metrics without what a clock says)."""
    params, _ = load_params(workdir / "model")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((workdir / "summary.json").read_text())["metrics"])
    clocked = ("time/", "_per_second")
    lines = [{k: v for k, v in x.items() if not any(c in k for c in clocked)} for x in lines]
    return {name: np.asarray(x) for name, x in named_leaves(params).items()}, lines


def compare(found, expected) -> None:
    """To 1e-6, or of metrics relative to what is larger than 1."""
    for name, array in expected[0].items():
        np.testing.assert_allclose(found[0][name], array, rtol=0, atol=1e-6, err_msg=name)
    for line, wanted in zip(found[1], expected[1], strict=True):
        assert line.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(
                float(line[name]), float(wanted[name]), 1e-6, 1e-6, err_msg=name
            )


def same(found, expected) -> None:
    """To the last bit."""
    assert found[1] == expected[1]
    assert {k: x.tobytes() for k, x in found[0].items()} == {
        k: x.tobytes() for k, x in expected[0].items()
    }


def test_sft_on_two_hosts_is_that_on_one(folder, tmp_path, monkeypatch):
    done = run(folder, "sft", tmp_path / "two")
    finished(done)
    assert "step 6/6" in done[0][1]
    said = [line for line in done[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert said == []  # what the first one says is said once

    monkeypatch.chdir(folder)
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:4])
    monkeypatch.setattr(chain, "write_report", lambda *_: None)
    monkeypatch.setattr(sft, "evaluate_chat", lambda *_, **__: {})
    chain.run(chain.load_config("sft.py"), "sft.py", tmp_path / "one")
    compare(results(tmp_path / "two"), results(tmp_path / "one"))


LEAVES = """
import atexit, sys, time, jax
from rlhf_jax import hosts

flags = []
atexit.register(lambda: print("its part is done:", flags[0].is_ready(), file=sys.stderr))
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
if hosts.is_first():
    time.sleep(2)
hosts.anyone("stop", False)
flags.extend(hosts._late.values())
sys.exit(2)
"""


def test_a_process_that_ends_waits_for_what_it_does_together_with_others():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        words = [sys.executable, "-c", LEAVES, f"localhost:{free.getsockname()[1]}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    running = [
        subprocess.Popen(
            [*words, str(i)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        for process in running:
            assert "its part is done: True" in process.communicate(timeout=600)[1]
            assert process.returncode == 2
    finally:
        for process in running:
            process.kill()


def test_a_host_with_another_config_is_named(folder, tmp_path):
    of_each = [[], ["--config.train.steps=5"]]
    for code, output in run(folder, "sft", tmp_path / "run", of_each=of_each):
        host = socket.gethostname()
        said = f"error: process 1 on {host} would run something else than process 0 on {host}: "
        assert code == 2 and said + "config.train.steps: 6 -> 5\n" in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_text(path.read_text() + "\n"), " would run something else than "),
        (lambda path: path.unlink(), ": data: there is no file chats.jsonl"),
    ],
)
def test_a_host_with_other_data_is_named(change, told, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    change(other / "chats.jsonl")
    folders = [folder, other]
    given = f"--config.init.policy={folder}/start"
    for code, output in run(folder, "sft", tmp_path / "run", given, folders=folders):
        assert code == 2 and f"error: process 1 on {socket.gethostname()}{told}" in output, output
        assert "data.train: chats.jsonl is not the same" in output or "no file" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mesh", "faults"),
    [
        ("sft", "--config.mesh.fsdp=1", [(1, "step:3"), (0, "checkpoint:arrays:4")]),
        ("sft", "--config.mesh.fsdp=4", [(0, "metrics:5")]),
        ("dpo", "--config.mesh.fsdp=2", [(0, "checkpoint:renamed:2"), (1, "step:5")]),
        ("grpo", "--config.mesh.fsdp=1", [(1, "scored:2"), (0, "rollout:3")]),
        ("grpo", "--config.mesh.fsdp=4", [(1, "update:1")]),
    ],
)
def test_two_hosts_are_one_also_killed_and_begun_again(stage, mesh, faults, folder, tmp_path):
    asked = folder / "asked"
    asked.unlink(missing_ok=True)
    finished(run(folder, stage, tmp_path / "one", mesh, processes=1))
    by_one = asked.read_text() if stage == "grpo" else ""
    asked.unlink(missing_ok=True)
    finished(run(folder, stage, tmp_path / "two", mesh))
    assert stage != "grpo" or asked.read_text() == by_one  # a user's function runs once
    compare(results(tmp_path / "two"), results(tmp_path / "one"))
    for fault in faults:
        done = run(folder, stage, tmp_path / "killed", mesh, fault=fault)
        assert done[fault[0]][0] == -signal.SIGKILL, done[fault[0]][1]
        assert not (tmp_path / "killed/summary.json").exists()
    finished(run(folder, stage, tmp_path / "killed", mesh))
    same(results(tmp_path / "killed"), results(tmp_path / "two"))


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_at_the_same_step(folder, tmp_path):
    finished(run(folder, "sft", tmp_path / "whole"))
    fault = (1, "step:3")
    for code, output in run(folder, "sft", tmp_path / "run", fault=fault, signal="SIGTERM"):
        assert code == 75, output
        said = f"stopped: {tmp_path}/run is saved at step 4; run the same command to continue\n"
        assert output.endswith(said)
    finished(run(folder, "sft", tmp_path / "run"))
    same(results(tmp_path / "run"), results(tmp_path / "whole"))
