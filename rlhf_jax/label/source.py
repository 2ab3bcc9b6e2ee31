"""What a command line has people compare: its models, its prompts, its gold checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Prompt
from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object
from rlhf_jax.label.disagreement import Ensemble
from rlhf_jax.label.files import Comparison, make_comparison
from rlhf_jax.label.pairs import Source
from rlhf_jax.tasks.prompts import PromptSet, prompts_within
from rlhf_jax.tasks.sources import parse_sources, read_source
from rlhf_jax.training.rundir import CONFIG
from rlhf_jax.training.saved_model import Model, fingerprint, load_speaker


def source_of(given: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """(what pairs are sampled from, the settings that decide what they are).

    Raises:
        UserError: a model or a file is not as it must be.
    """
    names = [path for path in (given.workdir, given.compare) if path]
    models = [load_speaker(path) for path in names]
    rewards = [path for path in given.rewards.split(",") if path]
    if rewards and len({model.tokenizer.hash for model in models}) > 1:
        raise UserError("--select=disagreement needs models with one tokenizer")
    prompts = given.prompts or _trained_on(Path(given.workdir))
    sets = read_prompts(prompts, models, given.max_new_tokens)
    source = Source(
        tuple(names), tuple(models), sets, given.temperature, given.max_new_tokens, given.seed,
        Ensemble.load(rewards, models[0].tokenizer.hash) if rewards else None,
    )  # fmt: skip
    asked = [[message.to_json() for message in r.messages] for r in sets[0].records]
    settings = {
        "models": {path: fingerprint(Path(path)) for path in names},
        "prompts": [prompts, json_digest(asked)],
        "temperature": given.temperature,
        "max_new_tokens": given.max_new_tokens,
        "seed": given.seed,
        "select": given.select,
        "rewards": {path: fingerprint(Path(path)) for path in rewards},
    }
    return source, settings


def _trained_on(workdir: Path) -> str:
    """The sources that a run was trained on."""
    config = read_object(workdir / CONFIG) if (workdir / CONFIG).exists() else {}
    train = config.get("data", {}).get("train", "")
    if not train:
        raise UserError(f"{workdir} does not say what it was trained on; name --prompts=file.jsonl")
    return ",".join(parse_sources(train))


def read_prompts(
    source: str, models: Sequence[Model], max_new_tokens: int
) -> tuple[PromptSet, ...]:
    """For each model the same prompts in its tokens: those that leave all of them room to answer.

    Raises:
        UserError: there is none.
    """
    records: Sequence[Prompt] = read_source(source, "prompt", "train")
    for model in models:
        limit = model.config.max_length - max_new_tokens
        why = f"left out: --max-new-tokens={max_new_tokens} leaves {limit} of the context"
        records = prompts_within(limit, f"{source} prompts", records, model.tokenizer, why).records
    if not records:
        raise UserError(f"no prompt of {source} leaves room for {max_new_tokens} tokens")
    return tuple(
        PromptSet(records, [render_prompt(r.messages, model.tokenizer) for r in records])
        for model in models
    )


def read_checks(path: str) -> list[Comparison]:
    """The pairs of a file as gold checks; the chosen side is what a careful labeler prefers."""
    about = {"models": (path, path), "seed": None, "check": True}
    return [
        make_comparison(pair.prompt, (pair.chosen, pair.rejected), {}, **about)
        for pair in read_source(path, "pair", "train")
        if pair.chosen != pair.rejected
    ]
