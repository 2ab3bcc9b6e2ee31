"""A town's records as small JSONL files, and experiments that chain the stages on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from rlhf_jax.tasks.town.town import Town

ROOT = Path(__file__).resolve().parents[2]

COMMON = """
from rlhf_jax.stages import defaults

TRAIN = dict(steps={steps}, log_every=2, checkpoint_every=4, tensorboard=False)
OPTIMIZER = dict(name="adamw", learning_rate=3e-3)
EVAL = dict(source="{folder}/prompts.jsonl", count=8, max_new_tokens=12)
"""

PRETRAIN = """
def get_config():
    return defaults.base(
        "pretrain",
        model=defaults.model("tiny", layers=2, width=32, heads=2, kv_heads=1, head_dim=16,
                             mlp_width=64),
        tokenizer=dict(kind="bpe", vocab_size=320),
        data=dict(train="{folder}/texts.jsonl", validation="{folder}/texts.jsonl",
                  layout="documents", row_length=128, over_long="split"),
        batch=dict(rows=8), optimizer=OPTIMIZER, train=TRAIN, loss=dict(z_loss=1e-4),
    )
"""

SFT = """
def get_config():
    return defaults.base(
        "sft",
        init=dict(policy="{folder}/pretrain.py"),
        data=dict(train="{folder}/chats.jsonl=2,{folder}/more.jsonl=1",
                  validation="{folder}/chats.jsonl", row_length=256,
                  replay="{folder}/texts.jsonl=0.5"),
        batch=dict(rows=4), optimizer=OPTIMIZER, train=TRAIN,
        loss=dict(label_smoothing=0.0, z_loss=0.0), eval=EVAL,
    )
"""

PAIRS = """
def get_config():
    return defaults.base(
        "{stage}",
        init=dict(policy="{folder}/sft.py"),
        data=dict(train="{folder}/pairs.jsonl", validation="{folder}/pairs.jsonl",
                  row_length=512),
        batch=dict(rows=4), optimizer=OPTIMIZER, train=TRAIN,
        loss=dict({loss}),{eval}
    )
"""

# On-policy stages, on top of sft.py and reward.py.
SAMPLING = """
ROLLOUT = dict(max_prompt_tokens=160, max_new_tokens=10, slots=16)
ON_POLICY = dict(
    init=dict(policy="{folder}/sft.py", reward="{folder}/reward.py"),
    data=dict(train="{folder}/prompts.jsonl", row_length=256),
    eval=EVAL | dict(during=6),
)


def get_config():
    return {made}
"""

MADE = {
    "ppo": """defaults.on_policy(
        "ppo", **ON_POLICY, rollout=ROLLOUT | dict(prompts=8), batch=dict(rows=2),
        reward=dict(scorers="model=1,gold=0.5,length=-0.01"),
        optimizer=OPTIMIZER, critic=dict(learning_rate=3e-3), kl=dict(target=2.0, horizon=100.0),
        train=dict(steps=4, epochs=2, minibatches=2, log_every=1, checkpoint_every=2,
                   eval_every=2, tensorboard=False),
    )""",
    "grpo": """defaults.on_policy(
        "dapo", **ON_POLICY, batch=dict(rows=2), optimizer=OPTIMIZER,
        rollout=ROLLOUT | dict(prompts=4, samples=4, filter_zero_std=True, resample=1),
        reward=dict(scorers="gold"),
        loss=dict(ptx_coefficient=0.5), advantage=dict(scale="batch"),
        train=TRAIN | dict(steps=2, log_every=1),
    )""",
    "ensemble": """defaults.on_policy(
        "rloo", **ON_POLICY | dict(init=ON_POLICY["init"] | dict(
            reward_2="{folder}/reward.py")), rollout=ROLLOUT | dict(prompts=4, samples=2),
        batch=dict(rows=2), optimizer=OPTIMIZER, reward=dict(ensemble="mean_minus_std"),
        kl=dict(placement="loss", estimator="k3", level="token", importance=True),
        loss=dict(importance="token"), train=TRAIN | dict(steps=1, log_every=1),
    )""",
    "online": """defaults.online_preference(
        **ON_POLICY, rollout=ROLLOUT | dict(prompts=6, samples=3), batch=dict(rows=2),
        optimizer=OPTIMIZER, train=TRAIN | dict(steps=2, minibatches=2, log_every=1),
    )""",
    "best_of_n": """defaults.best_of_n(
        **ON_POLICY | dict(data=dict(train="{folder}/prompts.jsonl", row_length=340)),
        rollout=ROLLOUT, batch=dict(rows=1), optimizer=OPTIMIZER,
        best_of_n=dict(samples=8, n=2, prompts=8), train=TRAIN | dict(steps=3),
    )""",
}


def _lines(records) -> str:
    lines = []
    for record in records:
        fields = dict(vars(record))
        for name in fields.keys() & {"messages", "prompt"}:
            fields[name] = [message.to_json() for message in fields[name]]
        meta = fields.pop("meta")
        fields.pop("margin", None)
        lines.append(json.dumps(fields | meta))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def experiments(tmp_path_factory) -> Path:
    """A folder with an experiment of every stage and the data they read."""
    folder = tmp_path_factory.mktemp("experiments")
    town = Town()
    (folder / "texts.jsonl").write_text(_lines(town.texts("train", 300)))
    (folder / "chats.jsonl").write_text(_lines(town.demonstrations("train", 200)))
    (folder / "more.jsonl").write_text(_lines(list(town.demonstrations("train", 300))[200:]))
    (folder / "pairs.jsonl").write_text(_lines(town.pairs("train", 80)))
    (folder / "prompts.jsonl").write_text(_lines(town.prompts("heldout", 12)))
    dpo = PAIRS.replace("{loss}", 'name="sigmoid", beta=0.1, sft_coefficient=0.5')
    reward = PAIRS.replace("{loss}", "centering=0.0")
    stages = {
        "pretrain": PRETRAIN,
        "sft": SFT,
        "dpo": dpo.replace("{stage}", "preference").replace("{eval}", " eval=EVAL,"),
        "reward": reward.replace("{stage}", "reward").replace("{eval}", ""),
    }
    stages["reward"] = stages["reward"].replace(
        "loss=dict(", "normalize=dict(prompts=8, max_new_tokens=10), loss=dict("
    )
    for name, made in MADE.items():
        stages[name] = SAMPLING.replace("{made}", made)
    stages["grpo"] = stages["grpo"].replace("data=dict(", 'data=dict(ptx="{folder}/texts.jsonl", ')
    for name, text in stages.items():
        text = (COMMON + text).replace("{folder}", str(folder)).replace("{steps}", "12")
        (folder / f"{name}.py").write_text(text)
    return folder


def run_main(
    *arguments: str,
    fault: str | None = None,
    signal: str = "SIGKILL",
    module: str = "rlhf_jax.main",
) -> subprocess.CompletedProcess:
    """The command line in a process of its own, on one device."""
    faults = {"FAULT": fault, "FAULT_SIGNAL": signal} if fault else {}
    with started(*arguments, module=module, **faults) as process:
        try:
            output, errors = process.communicate(timeout=600)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def started(
    *arguments: str,
    output: int | IO = subprocess.PIPE,
    module: str = "rlhf_jax.main",
    **variables: str,
) -> subprocess.Popen:
    """The same while it runs."""
    derived = os.path.join(tempfile.gettempdir(), "rlhf_jax_test_derived")
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={"RLHF_JAX_CACHE": derived} | os.environ | variables,
        stdout=output,
        stderr=output,
        text=True,
    )
