"""Reinforcement learning with tools through the front door: metrics, faults and mistakes."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.data.calls import render_call
from rlhf_jax.training.checkpoint import load_params
from tests.stages.conftest import run_main

TOOLS = '''
def calculate(expression: str) -> str:
    """Adds two numbers.

    Args:
        expression: Two whole numbers with + between, as "3 + 4".
    """
    first, second = map(int, expression.split("+"))
    return str(first + second)
'''

# The real thing: a process that is gone in the middle of a step, once.
COUNTING = """
import os, signal

class Env:
    def reset(self, row, seed):
        self.asked = 0
        return row["prompt"]

    def step(self, text):
        at = os.environ.get("KILL_AT")
        if at:
            path, number = at.split(",")
            with open(path, "a") as file:
                file.write("x")
            if os.path.getsize(path) == int(number):
                os.kill(os.getppid(), signal.SIGKILL)
        self.asked += 1
        if self.asked == 3:
            return [], float("4" in text), True
        return [{"role": "tool", "content": f"{len(text)}"}], 0.5 * text.isascii(), False
"""

STAGES = {
    "tools_sft": """defaults.base(
        "sft", init=dict(policy="{folder}/pretrain.py"),
        data=dict(train="{here}/chats.jsonl", validation="{here}/chats.jsonl", row_length=256),
        batch=dict(rows=8), optimizer=OPTIMIZER | dict(learning_rate=1e-2),
        train=TRAIN | dict(steps=80), eval=TOOL_EVAL,
    )""",
    "tools_grpo": """defaults.on_policy(
        "grpo", **ON_POLICY, rollout=ROLLOUT | dict(prompts=4, samples=4), batch=dict(rows=2),
        optimizer=OPTIMIZER, reward=dict(scorers="exact"), train=TRAIN | dict(steps=2, log_every=1),
        environment=dict(tools="{here}/tools.py:calculate", describe=False, max_calls=3),
    )""",
    "tools_ppo": """defaults.on_policy(
        "ppo", **ON_POLICY, rollout=ROLLOUT | dict(prompts=8), batch=dict(rows=2),
        optimizer=OPTIMIZER, reward=dict(scorers="environment"),
        train=TRAIN | dict(steps=3, epochs=2, minibatches=2, log_every=1, checkpoint_every=1),
        environment=dict(file="{here}/counting.py:Env"),
    )""",
}
FILE = """
from rlhf_jax.stages import defaults

TRAIN = dict(steps=2, log_every=2, checkpoint_every=4, tensorboard=False)
OPTIMIZER = dict(name="adamw", learning_rate=3e-3)
TOOL_EVAL = dict(source="{here}/prompts.jsonl", count=8, max_new_tokens=60)
ROLLOUT = dict(max_prompt_tokens=64, max_new_tokens=96, slots=16)
ON_POLICY = dict(
    init=dict(policy="{here}/tools_sft.py"),
    data=dict(train="{here}/prompts.jsonl", row_length=512), eval=TOOL_EVAL | dict(during=6),
)


def get_config():
    return {made}
"""


@pytest.fixture(scope="module")
def here(experiments, tmp_path_factory):
    """A folder of tool dialogues, tools, experiments, and a model that knows a call's form."""
    here = tmp_path_factory.mktemp("tools")
    chats, prompts = [], []
    for i in range(60):
        first, second = i % 8, i // 8
        asked = {"role": "user", "content": f"Add {first} and {second}."}
        total = str(first + second)
        call = render_call("calculate", {"expression": f"{first} + {second}"})
        said = [{"role": "assistant", "content": call}, {"role": "tool", "content": total}]
        chats.append({"messages": [asked, *said, {"role": "assistant", "content": total}]})
        prompts.append({"prompt": [asked], "answer": total})
    for name, records in (("chats", chats), ("prompts", prompts)):
        (here / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (here / "tools.py").write_text(TOOLS)
    (here / "counting.py").write_text(COUNTING)
    for name, made in STAGES.items():
        text = FILE.replace("{made}", made).replace("{here}", str(here))
        (here / f"{name}.py").write_text(text.replace("{folder}", str(experiments)))
    result = run_main(f"--config={here}/tools_sft.py", f"--workdir={here}/runs/tools_sft")
    assert result.returncode == 0, result.stderr[-3000:]
    return here


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_grpo_with_a_users_function_as_its_tool(here):
    result = run_main(f"--config={here}/tools_grpo.py", f"--workdir={here}/runs/tools_grpo")
    assert result.returncode == 0, result.stderr[-3000:]
    for line in lines(here / "runs/tools_grpo/metrics.jsonl"):
        assert line["tools/calls"] > 0 and line["tools/tokens"] > 2 * line["tools/calls"]
        assert 0 <= line["tools/invalid"] <= 1 and 0 <= line["tools/truncated"] <= 1
        assert line["rollout/logprob_difference"] < 2e-5
        assert line["policy/ratio_deviation"] < 1e-5
    summary = json.loads((here / "runs/tools_grpo/summary.json").read_text())["metrics"]
    assert "eval/kl" in summary


@pytest.mark.slow
def test_killed_in_the_middle_of_a_tool_it_ends_with_the_same_bits(here):
    runs = [here / name for name in ("whole", "killed")]
    for run in runs:
        shutil.copytree(here / "runs/tools_sft", run / "tools_sft")
    whole, killed = (
        (f"--config={here}/tools_ppo.py", f"--workdir={run}/tools_ppo") for run in runs
    )
    result = run_main(*whole)
    assert result.returncode == 0, result.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_AT", f"{here}/count,40")
        assert run_main(*killed).returncode == -9
        assert not (here / "killed/tools_ppo/summary.json").exists()
        result = run_main(*killed)
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = (load_params(run / "tools_ppo/model")[0] for run in runs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    logged = [lines(run / "tools_ppo/metrics.jsonl") for run in runs]
    assert len(logged[0]) == 3
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in each]
        for each in logged
    ]
    assert timeless[0] == timeless[1]
    assert all(line["tools/calls"] > 0 for line in timeless[0])
    assert any(line["rewards/environment/mean"] > 0 for line in timeless[0])


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--config.environment=gone.py:Env"], "there is no file gone.py"),
        (["--config.environment=gone:Env"], "write mine.py:Name"),
        (["--config.tools={here}/tools.py"], "write mine.py:Name"),
        (
            ["--config.environment=reasoning_gym:sums", "--config.environment.python=gone/python"],
            "environment.python = 'gone/python': there is no such program",
        ),
        (["--config.environment=reasoning_gym:sums"], "can't import reasoning_gym (No module"),
        (["--config.environment="], "reward.scorers names 'environment', but there is none"),
    ],
)
@pytest.mark.slow
def test_a_mistake_about_environments_is_told_before_anything_runs(here, flags, why):
    flags = [flag.replace("{here}", str(here)) for flag in flags]
    result = run_main(f"--config={here}/tools_ppo.py", f"--workdir={here}/none", *flags)
    assert result.returncode == 2 and why in result.stderr, result.stderr[-2000:]
