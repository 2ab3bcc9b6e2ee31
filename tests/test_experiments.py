"""Every experiment and variant is a valid configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.main import parse
from rlhf_jax.stages.chain import load_config, prepare
from rlhf_jax.stages.checks import check_objective
from rlhf_jax.stages.defaults import STAGES, resolve
from rlhf_jax.training.optimizer import make_optimizer

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
VARIANTS = {
    "pretrain": [
        "town",
        "sums",
        "fables",
        "hh",
        "imdb",
        "shakespeare_char",
        "shakespeare_char_best",
    ],
    "sft": ["town", "sums", "fables", "gsm8k", "hh", "imdb", "own"],
    "reward": ["town", "member1", "member2", "hh", "imdb", "own"],
    "dpo": ["town", "hh", "own"],
    "ppo": ["town", "ensemble", "hh", "sentiment", "own"],
    "grpo": [
        *("grpo", "dr_grpo", "dapo", "rloo", "reinforce", "reinforce_pp", "remax"),
        *("gspo", "cispo", "arithmetic", "gsm8k", "own"),
    ],
    "online_dpo": ["town", "sentiment"],
    "best_of_n": ["town", "sentiment"],
    "labelers": ["nuisance", "pooled", "majority", "weighted", "pairs", "rated", "ratings"],
    "tools": ["base", "sft", "direct", "grpo", "ppo", "bfcl"],
    "rlaif": ["town", "people", "judge", "hh", "own"],
    "constitutional": ["town", "critic"],
    "filtering": ["all"],
    "safety": ["pretrain", "helpful", "careful", "sft0.1", "dpo", "limited"],
    "claims": ["blank", "small", "small_sft"],
    "memory": ["base", "chat", "sft", "last"],
    "persona": ["sft", "dpo", "grpo", "real"],
    "questions": ["base", "chat", "sft", "grpo"],
    "llama": ["dpo-8b", "dpo-70b", "grpo-8b", "grpo-70b", "8b", "70b"],
}


@pytest.mark.parametrize(
    ("name", "variant"), [(name, v) for name, variants in VARIANTS.items() for v in variants]
)
def test_experiment(name, variant, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    config = load_config(f"experiments/{name}.py:{variant}")
    assert config.stage in STAGES
    options = resolve(config)
    make_optimizer(options.optimizer, config.train.steps)
    if config.stage == "policy":
        check_objective(options)
    if config.stage == "pretrain":
        options.model.model(vocab_size=65).validate()
    elif variant == "own":
        assert not (config.init.policy or config.data.train or config.data.validation)
        assert not config.eval.get("source", "") and "gold" not in config.eval
    elif variant == "bfcl":
        assert not config.init.policy
    else:
        parent = load_config(config.init.policy)
        order = [*STAGES]
        assert order.index(parent.stage) <= order.index(config.stage)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_unknown_variant_lists_the_known(name):
    with pytest.raises(UserError, match="there are: "):
        load_config(f"{EXPERIMENTS}/{name}.py:tow")


def test_the_oracle_is_a_valid_config():
    assert load_config(f"{EXPERIMENTS}/oracle.py").stage == "oracle"


def test_all_experiments_are_tested():
    assert {path.stem for path in EXPERIMENTS.glob("*.py")} == {*VARIANTS, "oracle"}


TOLD = [EXPERIMENTS.parent / "README.md", *sorted(EXPERIMENTS.parent.glob("docs/*.md"))]


@pytest.mark.parametrize("path", TOLD, ids=lambda path: path.stem)
def test_the_commands_of_a_document_run_as_they_are_written(path, tmp_path, monkeypatch):
    """With stand-ins for the files that a reader has, up to where a run would begin."""
    monkeypatch.chdir(tmp_path)
    Path("experiments").symlink_to(EXPERIMENTS)
    text = path.read_text("utf-8").replace("\\\n", " ")
    rows = [f'{{"prompt": "{i}?", "chosen": "Yes.", "rejected": "No {i}."}}\n' for i in range(40)]
    for name in {*re.findall(r"=([\w/.-]+\.jsonl)", text), "gym/bin/python"}:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(rows))
        Path(name).chmod(0o755)
    names = {*re.findall(r"mine\.py:(\w+)", text)}
    Path("mine.py").write_text("".join(f"def {name}(*given): ...\n" for name in names))
    for written in re.findall(r"python -m rlhf_jax\.main (--config=[^`\n]*)", text):
        given, _, stated, _ = parse(shlex.split(written.partition(" #")[0]))
        prepare(given, stated)
