"""What --help, --print and --version say, and what is said of a field that does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_jax.config import document, own_fields
from rlhf_jax.errors import nearest
from rlhf_jax.main import main
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import load_config, prepare
from rlhf_jax.usage import _comments, commands, config_help, overview

ROOT = Path(__file__).parents[1]


def said(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 2
    return capsys.readouterr().err


def line_of(text: str, start: str) -> str:
    """The entry of that name in a list, on one line."""
    lines = iter(text.splitlines())
    entry = next(line for line in lines if line.startswith(f"  {start}"))
    for line in lines:
        if not line.startswith("    "):
            break
        entry += f" {line}"
    return " ".join(entry.split())


def test_help_lists_the_commands_and_the_experiments_with_a_line_each(capsys):
    text = said(capsys, "--help")
    assert {"chat", "compare", "export", "main", "plan"} <= commands().keys()
    for name in [*commands(), *(path.stem for path in (ROOT / "experiments").glob("*.py"))]:
        assert line_of(text, f"{name} ").endswith("."), name
    assert line_of(text, "dpo ") == "dpo Direct preference optimisation of a fine-tuned model."
    assert "--config.SECTION.FIELD=VALUE" in text and text == f"{overview()}\n"


def test_help_of_a_config_gives_each_field_its_value_default_and_comment(capsys):
    text = said(capsys, "--config=dpo", "--help", "--config.loss.beta=0.3")
    assert text.startswith("Direct preference optimisation of a fine-tuned model; times are")
    rows = "rows=16 packed rows per update, over all devices (at least 1; default 32)"
    assert line_of(text, "rows=") == rows
    assert line_of(text, "beta=") == (
        "beta=0.3 strength of the tie to the reference, or what the loss calls so. "
        "(in (0, inf); default 0.1)"
    )
    assert "(read only with rank)" in line_of(text, "alpha=16.0")
    assert 'default "")' in line_of(text, "policy=") and 'reward=""' in line_of(text, "reward=")
    assert "simpo: beta, gamma" in line_of(text, "(of others)")


@pytest.mark.parametrize("stage", defaults.STAGES)
def test_every_field_of_a_stage_is_there_with_its_comment(stage):
    text = config_help(defaults.base(stage), f"{ROOT}/experiments/dpo.py:hh")
    for name, section in defaults.STAGES[stage].items():
        comments, part = _comments(section), text.partition(f"\n{name}: ")[2].partition("\n\n")[0]
        for field in own_fields(section):
            assert line_of(part, f"{field}=").partition(" ")[2].startswith(comments[field][:20])


def test_print_is_the_config_that_would_be_run_and_version_what_this_is(tmp_path, capsys):
    printed = said(capsys, "--config=grpo:rloo", "--print", "--config.kl.coefficient=0.5")
    config = load_config("grpo:rloo")
    config.kl.coefficient = 0.5
    assert json.loads(printed) == document(prepare(config))
    assert said(capsys, "--version").startswith("rlhf_jax 0.")
    own = ("--config=dpo:own", "--print")
    assert "init.policy is empty" in refused(capsys, *own)
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "Yes", "rejected": "No"}\n' * 40)
    flags = (f"--config.data.train={tmp_path}/pairs.jsonl", "--config.init.policy=x")
    printed = said(capsys, *own, *flags)  # what is held out is told beside it
    assert json.loads(printed)["data"]["validation"].endswith("pairs.jsonl[95%:]")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("optimizer.lr=1", "no optimizer.lr; did you mean optimizer.learning_rate? The fields of "
         "optimizer are: b2, decay_fraction, eps, "),
        ("optimizer.lr", "did you mean optimizer.learning_rate?"),
        ("lr=1", "no lr; did you mean optimizer.learning_rate?"),
        ("steps=1", "no steps; did you mean train.steps? The fields of train are: "),
        ("optimizr.lr=1", "no section optimizr; did you mean optimizer? The fields of optimizer"),
        ("critic.lr=1", "no section critic; it is of policy"),
        ("loss.bta=1", "no loss.bta; did you mean loss.beta? The fields of loss are: alpha, beta"),
        ("optimizer=1", "optimizer is a section. The fields of optimizer are: "),
        ("train.steps=many", "invalid literal for int() with base 10: 'many'"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_there_names_the_nearest_and_its_section(flag, expected, capsys):
    text = refused(capsys, "--config=dpo", f"--config.{flag}")
    assert expected in text and text.startswith("error: in the command line: ")
    assert text.count("\n") == 1


def test_a_section_of_other_stages_is_told_with_them(capsys):
    text = refused(capsys, "--config=pretrain", "--config.eval.cout=3")
    assert "the pretrain stage has no section eval; it is of sft, reward, preference" in text


def test_the_nearest_name_may_be_of_the_same_initials():
    assert nearest("lr", ["b2", "learning_rate"]) == "learning_rate"
    assert nearest("bta", ["b_t_a_x", "beta"]) == "beta"


def test_without_anything_it_says_where_help_is(capsys):
    assert "--help" in refused(capsys)
