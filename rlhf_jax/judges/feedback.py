"""What the stages of AI feedback share: what they make is kept in the run, and trained on there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.config import Config
from rlhf_jax.console import say
from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object, write_json, write_jsonl
from rlhf_jax.judges.constitution import DEFAULT, Principle, choose, read_constitution
from rlhf_jax.judges.sampled import Policy
from rlhf_jax.label.files import Line
from rlhf_jax.stages.start import with_chat_template
from rlhf_jax.tasks.sources import hold_out, parse_source
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import load_speaker

FILE, MADE = "feedback.jsonl", "feedback.made.json"
Made = tuple[list[Line], dict[str, int], dict[str, float]]
"""Lines, how many there are of what, and what was measured of them."""


def keep(run: RunDirectory, make: Callable[[], Made]) -> dict[str, float]:
    """Writes the lines to `FILE` of a run, once, and returns what was measured of them.

    Raises:
        UserError: there are several hosts, of which each would sample answers of its own.
    """
    if hosts.count() > 1:
        raise UserError("answers are judged on one host: start this stage on one")
    made = run.path / MADE
    if not (run.path / FILE).exists():
        lines, counts, measured = make()
        say(FILE, counts | measured)
        write_json(made, {"counts": counts, "measured": measured})
        write_jsonl(run.path / FILE, lines)
    return read_object(made)["measured"]


def reading(config: Config, run: RunDirectory) -> Config:
    """The config with the run's `FILE` as what is trained on.

    Where what is held out is of the prompts' own file, and so has no answers, the last 5 % of the
    lines are held out too.
    """
    train, validation = str(run.path / FILE), config.data.validation
    asked = parse_source(config.data.train)
    if asked.name == parse_source(validation).name and (asked.is_file or asked.is_hub):
        train, validation = hold_out(train)
    data = dataclasses.replace(config.data, train=train, validation=validation)
    return dataclasses.replace(config, data=data)


def principles_of(config: Config) -> list[Principle]:
    """The principles under which it is asked.

    Raises:
        UserError: there is no such constitution or principle.
    """
    options = config.feedback
    return choose(read_constitution(Path(options.constitution or DEFAULT)), options.principles)


def policy_of(config: Config, directory: Path, temperature: float | None = None) -> Policy:
    """The model of a directory as one that answers, at `feedback.temperature` or another one."""
    options, model = config.feedback, load_speaker(str(directory))
    tokenizer = with_chat_template(model.tokenizer, config.data.chat_template)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    drawn = options.temperature if temperature is None else temperature
    return Policy(str(directory), model, options.max_new_tokens, drawn, config.seed)


def judge_named(config: Config, parents: Mapping[str, Path]) -> str:
    """The judge as `kinds.open_judge` names it.

    Raises:
        UserError: it is to be that of init.judge, and there is none.
    """
    if config.feedback.judge != "model":
        return config.feedback.judge
    if "judge" not in parents:
        raise UserError("config: feedback.judge is 'model', but there is no init.judge")
    return str(parents["judge"])
