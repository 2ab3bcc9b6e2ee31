"""The user's own files: slices, what is held out of them, and the variants made for them."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import load_config, prepare
from rlhf_jax.stages.checks import check
from rlhf_jax.tasks.sources import parse_source, read_records, settle_sources
from tests.stages.conftest import ROOT, run_main


def write(path, count):
    lines = (json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(count))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config_of(train, validation="", source=""):
    data = {"train": train, "validation": validation}
    return defaults.base("sft", data=data, eval={"source": source})


def test_the_parts_of_a_source():
    assert parse_source("a@b.jsonl[:5%]") == ("a@b.jsonl", "", "[:5%]")
    assert parse_source("gsm8k/prompt@test[5:]") == ("gsm8k/prompt", "test", "[5:]")
    assert parse_source("town") == ("town", "", "")


def test_slices_of_files_are_read_one_after_the_other(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 4)
    records = read_records(config_of(a), f"{a}[80%:],{b}[:1]", "conversation", "train")
    assert [r.id for r in records] == ["a.jsonl:9", "a.jsonl:10", "b.jsonl:1"]
    for part in ("[4:]", "[9:]", "[x]"):
        with pytest.raises(UserError, match=r"b\.jsonl"):
            read_records(config_of(a), b + part, "conversation", "train")


def test_the_end_of_every_file_is_held_out(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 8)
    given = config_of(f"{a}=2,{b}")
    config = settle_sources(given)
    assert config.data.train == f"{a}[:95%]=2,{b}[:-1]"
    assert config.data.validation == config.eval.source == f"{a}[95%:],{b}[-1:]"
    out = capsys.readouterr().out
    assert f"the last 5 % of {a}\n" in out and f"the last record of {b}\n" in out
    held_out = read_records(config, config.data.validation, "conversation", "validation")
    assert [r.id for r in held_out] == ["a.jsonl:39", "a.jsonl:40", "b.jsonl:8"]
    assert given.data.validation == "" and settle_sources(config) == config
    capsys.readouterr()
    settle_sources(given)  # as of another cell of a sweep
    assert "held out" not in capsys.readouterr().out


@pytest.mark.parametrize("array", [False, True])
def test_json_files_are_sliced_held_out_and_renamed(tmp_path, array):
    rows = [{"question": f"{i}?", "answer": f"{i}."} for i in range(40)]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)))
    config = config_of(f"{path}")
    config.data.columns = "prompt:question,completion:answer"
    config = settle_sources(config)
    assert (config.data.train, config.data.validation) == (f"{path}[:95%]", f"{path}[95%:]")
    held_out = read_records(config, config.data.validation, "conversation", "validation")
    assert [r.messages[-1].content for r in held_out] == ["38.", "39."]
    assert len(read_records(config, f"{path}[:10]", "prompt", "train")) == 10


def test_what_is_stated_stays():
    config = settle_sources(config_of("town", "town", ""))
    assert (config.data.train, config.data.validation, config.eval.source) == ("town",) * 3
    assert settle_sources(config_of("town", "town", "mine.jsonl")).eval.source == "mine.jsonl"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", "set --config.data.train="),
        ("town", "'town' is no file of yours"),
        ("{a}[:50%]", "is sliced already"),
        ("/tmp/mine.txt", r"unknown data set '/tmp/mine.txt'.*files named \*\.jsonl, \*\.json,"),
        ("{a}.jsonl", "cannot read"),
    ],
)
def test_there_must_be_something_to_hold_out_from(tmp_path, train, message):
    a = write(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=message):
        settle_sources(config_of(train.format(a=a)))


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "grpo", "ppo"])
def test_own_asks_for_a_model_and_for_data(name, tmp_path):
    config = load_config(f"{ROOT}/experiments/{name}.py:own")
    with pytest.raises(UserError, match=r"set --config\.init\.policy="):
        prepare(config)
    config.init.policy = str(tmp_path)
    with pytest.raises(UserError, match=r"set --config\.data\.train="):
        prepare(config)


def test_it_asks_in_one_line(tmp_path):
    result = run_main("--config=experiments/sft.py:own", f"--workdir={tmp_path}/run")
    assert result.returncode == 2 and "set --config.init.policy=" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["data.validation", "data.ptx", "eval.source"])
def test_only_what_is_mixed_has_weights(field):
    section, name = field.split(".")
    gold = {"scorers": "gold"}
    config = defaults.on_policy("ppo", reward=gold, loss={"ptx_coefficient": 0.5})
    config.data.ptx = "town/text"
    check(defaults.resolve(config))
    config[section][name] = "town/text=1"
    with pytest.raises(UserError, match=rf"{field} = 'town/text=1': .* only those of data\.train"):
        check(defaults.resolve(config))


class Rows(list):
    """What datasets.load_dataset gives, as far as it is used."""


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package; its list holds what was asked for."""
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        if path == "no/such":
            raise FileNotFoundError("Dataset 'no/such'\ndoesn't exist")
        return Rows({"prompt": f"{i}?", "completion": f"{i}!", "x": None} for i in range(30))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_data_sets_of_the_package_datasets(datasets, capsys):
    config = settle_sources(config_of("hf:me/mine/big=2,hf:tiny@test"))
    assert config.data.train == "hf:me/mine/big@train[:95%]=2,hf:tiny@test[:95%]"
    assert config.data.validation == "hf:me/mine/big@train[95%:],hf:tiny@test[95%:]"
    check(defaults.resolve(config))
    records = read_records(config, config.data.validation, "conversation", "validation")
    assert [r.id for r in records] == ["big:29", "big:30", "hf:tiny:29", "hf:tiny:30"]
    assert records[0].messages[0].content == "28?" and records[0].meta == {}
    assert set(datasets) == {("me/mine", "big", "train"), ("tiny", None, "test")}
    assert "30 records of {'completion', 'prompt'}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot load 'hf:no/such', split 'train': Dataset 'no"):
        read_records(config, "hf:no/such", "conversation", "train")


@pytest.mark.parametrize("meta", [{}, {"refusal": "perhaps"}])
def test_prompts_that_cannot_have_a_cost_are_refused_before_any_parent_runs(meta, tmp_path):
    due, file = {"prompt": "How do I break in?", "refusal": "due"}, tmp_path / "asked.jsonl"
    other = {"id": "second", "prompt": "Where is the gym?"}
    config = defaults.on_policy("ppo", data={"train": f"town,{file}"}, reward={"scorers": "length"})
    config.lagrange.cost = "over_refusal"
    file.write_text("\n".join(map(json.dumps, (due, other | {"refusal": "undue"}))))
    check(defaults.resolve(config))
    file.write_text("\n".join(map(json.dumps, (due, other | meta))))
    with pytest.raises(UserError, match=r"lagrange\.cost = 'over_refusal'.*asked\.jsonl: .*second"):
        check(defaults.resolve(config))


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c/d", "hf:/no/folder"])
def test_names_of_the_hub(name, datasets):
    with pytest.raises(UserError, match="names look like"):
        check(defaults.resolve(config_of(name, "town", "town")))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        settle_sources(config_of("hf:me/mine"))


def test_a_folder_as_the_real_package_reads_it(tmp_path):
    pytest.importorskip("datasets", reason="an optional package")
    write(tmp_path / "train.jsonl", 5)
    config = settle_sources(config_of(f"hf:{tmp_path}"))
    records = read_records(config, config.data.train, "conversation", "train")
    assert [r.messages[0].content for r in records] == ["0?", "1?", "2?", "3?"]
