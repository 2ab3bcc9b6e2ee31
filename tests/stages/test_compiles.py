"""After its first step and its first evaluation a run compiles nothing more, whatever comes."""

from __future__ import annotations

import json
import logging
import re

import jax
import numpy as np
import pytest

from rlhf_jax.config import document
from rlhf_jax.stages import defaults, policy, preference, sft
from rlhf_jax.training import mesh
from rlhf_jax.training.metrics_writer import MetricsWriter
from rlhf_jax.training.rundir import RunDirectory
from tests.stages.test_reference_logprobs import saved, small_model

TRAIN = {"steps": 6, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "tensorboard": False}
WORDS = ["Fine,", "thank", "you.", "No.", "Who", "is", "it?", "A", "friend.", "Go", "away!"]


class Compiled(logging.Handler):
    """Names of the functions that are compiled, by the line of metrics that comes next."""

    def __init__(self):
        super().__init__()
        self.before_line: list[list[str]] = [[]]

    def emit(self, record):
        found = re.match(r"Finished XLA compilation of (\S+)", record.getMessage())
        if found:
            self.before_line[-1].append(found[1])


@pytest.fixture
def compiled(monkeypatch):
    handler, write = Compiled(), MetricsWriter.write

    def counted(self, number, values):
        write(self, number, values)
        handler.before_line.append([])

    monkeypatch.setattr(MetricsWriter, "write", counted)
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "propagate", False)
    with jax.log_compiles():
        yield handler
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "parent", small_model())


def said(random, most):
    """A few words: no two records are equally long."""
    return " ".join(random.choice(WORDS, random.integers(1, most)))


def config_of(stage, folder, parent):
    random = np.random.default_rng(0)
    records = [
        {"prompt": said(random, 6), "chosen": said(random, 12), "rejected": said(random, 12)}
        for _ in range(150)
    ]
    chats = [
        {"messages": [{"role": role, "content": r[name]} for role, name in
                      (("user", "prompt"), ("assistant", "chosen"))]}
        for r in records
    ]  # fmt: skip
    prompts = [{"prompt": r["prompt"]} for r in records]
    files = {"pairs": records, "chats": chats, "prompts": prompts}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)

    def data(name):
        return {"train": f"{folder}/{name}.jsonl", "validation": f"{folder}/{name}.jsonl[:37]"}

    shared = {
        "init": {"policy": str(parent)},
        "train": TRAIN,
        "batch": {"rows": 8},
        "eval": {
            "source": f"{folder}/prompts.jsonl[:11]",
            "count": 11,
            "max_new_tokens": 6,
        },
    }
    if stage is sft:
        return defaults.base(
            "sft",
            **shared,
            data=data("chats") | {"row_length": 128},
            loss={"label_smoothing": 0.0, "z_loss": 0.0},
        )
    shared["eval"]["during"] = 7  # of the stages that sample in the middle
    if stage is preference:
        return defaults.base(
            "preference",
            **shared,
            data=data("pairs") | {"row_length": 192},
            loss={"name": "sigmoid", "beta": 0.1, "sft_coefficient": 0.0},
        )
    return defaults.on_policy(
        "grpo",
        **shared | {"train": TRAIN | {"minibatches": 2}},
        data=data("prompts") | {"row_length": 96},
        rollout={
            "prompts": 12,
            "samples": 4,
            "max_prompt_tokens": 48,
            "max_new_tokens": 12,
            "slots": 16,
        },
        reward={"scorers": "length=-0.1"},
    )


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(sft, marks=pytest.mark.slow, id="sft"),
        pytest.param(preference, id="dpo"),
        pytest.param(policy, id="grpo"),
    ],
)
def test_nothing_is_compiled_after_the_first_step_and_evaluation(
    tmp_path, monkeypatch, parent, compiled, stage, devices
):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:devices])
    config = config_of(stage, tmp_path, parent)
    config = defaults.resolve(config)
    with RunDirectory(tmp_path / "run", document(config)) as run:
        stage.run(config, run, {"policy": parent})
    lines = compiled.before_line
    assert len(lines) == TRAIN["steps"] + 1
    assert any("step" in name for name in lines[0])
    # The line of step 2 comes after its evaluation, then comes the first checkpoint.
    assert not [name for name in lines[2] if name != "jit(slice)"]
    assert lines[3:-1] == [[]] * (TRAIN["steps"] - 3)
