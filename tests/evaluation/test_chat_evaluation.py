"""What a run's answers are compared with, and how the models of a lineage are told apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.evaluation import chat_evaluation
from rlhf_jax.evaluation.chat_evaluation import _ancestors, evaluate_chat
from rlhf_jax.evaluation.held_out_answers import log_ratios
from rlhf_jax.models import PRESETS
from rlhf_jax.stages import defaults
from rlhf_jax.stages.defaults import Compute, MeshAxes
from rlhf_jax.training.saved_model import Model, load_model
from rlhf_jax.training.summary import names_of
from tests.chat_model import make_chat_model


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/pretrain", "runs/sft", "runs/dpo"], ["pretrain", "sft", "dpo"]),
        (["/models/sft", "runs/sft"], ["models/sft", "sft"]),
        (["/a/x/sft", "/b/x/sft", "/c/dpo"], ["x/sft", "sft", "dpo"]),
        (["/a/x/sft", "/b/x/sft", "/c/sft"], ["a/x/sft", "x/sft", "sft"]),
    ],
)
def test_runs_of_one_name_are_told_apart_by_their_folders(paths, names):
    assert names_of([*map(Path, paths)]) == names


def test_a_run_is_compared_with_what_it_started_from_also_under_one_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Who is {i}?"}}\n' for i in range(4)))
    first, start = tmp_path / "old/sft", tmp_path / "models/sft"
    make_chat_model(first, seed=0)
    make_chat_model(start, seed=1, parent=first)
    trained = make_chat_model(tmp_path / "other", seed=2)
    config = defaults.base(
        "sft",
        init={"policy": str(start)},
        data={"train": str(prompts), "validation": str(prompts), "row_length": 64},
        eval={"source": str(prompts), "count": 4, "max_new_tokens": 8},
    )
    measured = []
    for name in ("sft", "mine"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        measured.append(evaluate_chat(defaults.resolve(config), run, trained, start))
        line, *_ = (run / "samples.jsonl").read_text().splitlines()
        before = ["models/sft", "old/sft"] if name == "sft" else ["sft", "old/sft"]
        assert [*json.loads(line)["responses"]] == [*reversed(before), name]
    assert measured[0] == measured[1] and measured[0]["eval/kl"] > 0.1


def test_answers_whose_environment_failed_are_counted(tmp_path, capsys):
    """They are judged with the others, and a rate of them may say more of it than of the model."""
    prompts, start = tmp_path / "prompts.jsonl", tmp_path / "start"
    prompts.write_text("".join(f'{{"prompt": "Who is {i}?"}}\n' for i in range(4)))
    (tmp_path / "mine.py").write_text(
        "class Env:\n"
        "    def reset(self, row, seed):\n"
        "        if row['prompt'][-1]['content'] in ('Who is 1?', 'Who is 3?'):\n"
        "            raise RuntimeError('no such person')\n"
        "        return row['prompt']\n"
        "    def step(self, text):\n"
        "        return [], 1.0, True\n"
    )
    model = make_chat_model(start)
    config = defaults.base(
        "sft",
        init={"policy": str(start)},
        data={"train": str(prompts), "validation": str(prompts), "row_length": 64},
        environment={"file": str(tmp_path / "mine.py:Env"), "on_error": "mask"},
        eval={"source": str(prompts), "count": 4, "max_new_tokens": 8},
    )
    metrics = evaluate_chat(defaults.resolve(config), tmp_path, model, start)
    assert metrics["eval/environment_failures"] == 2 and "eval/eos_rate" in metrics
    assert "left out of training, and counted" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_has_no_kl_to_its_start_by_what_it_computes_in(tmp_path, dtype):
    """The start was saved computing in float32; the run that is evaluated may not compute so."""
    make_chat_model(tmp_path / "sft")
    model = load_model(tmp_path / "sft", compute_dtype=dtype)
    compute, data = Compute(compute_dtype=dtype), SimpleNamespace(chat_template="")
    config = SimpleNamespace(compute=compute, mesh=MeshAxes(), data=data)
    start = _ancestors(config, {"sft": tmp_path / "sft"}, model)["sft"]
    rows, _ = pack_groups([Group([8, 9, 10], ([11, 12, 13, 14],), 0)], 32, branches=1)
    np.testing.assert_array_equal(log_ratios(model, start, rows, 32), 0)


@pytest.mark.parametrize(("named", "answers"), [("", "its own"), ("qwen", "the run's")])
def test_a_template_that_a_run_names_is_that_of_what_it_started_from(monkeypatch, named, answers):
    """A Hub model whose own template takes no tools is trained with tools under another one."""
    own, given = (SimpleNamespace(has_template=True, name=n) for n in ("its own", "the run's"))
    start = Model(PRESETS["tiny"], {}, own)
    monkeypatch.setattr(chat_evaluation, "load_like", lambda *_, **__: start)
    data = SimpleNamespace(chat_template=named)
    config = SimpleNamespace(compute=None, mesh=MeshAxes(), data=data)
    model = dataclasses.replace(start, tokenizer=given)
    assert _ancestors(config, {"hub": Path("hub")}, model)["hub"].tokenizer.name == answers
