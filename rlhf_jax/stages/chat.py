"""What a chat stage ends with: held-out prompts answered by every model of the lineage, and judged.

What is judged are the answers a user would get, by default the greedy ones. The KL to the model it
started from is estimated from answers sampled at temperature 1, where that estimate is unbiased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.encode import length_of_share
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.gold import (
    correct_metrics,
    correct_table,
    gold_metrics,
    gold_plots,
    gold_scores,
)
from rlhf_jax.evaluation.responses import Answer, answer, sequence_kl
from rlhf_jax.evaluation.statistics import bootstrap_interval
from rlhf_jax.files import write_jsonl
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.sources import check_unrendered, read_records
from rlhf_jax.tasks.town.gold import GoldScore
from rlhf_jax.training.mesh import mesh_of, step_tokens
from rlhf_jax.training.saved_model import Model, load_model
from rlhf_jax.training.summary import ancestry, write_evaluation


def evaluate_chat(
    config: Config,
    run: Path,
    model: Model,
    start: Path,
    plots: Sequence[dict[str, Any]] = (),
    further: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Answers held-out prompts with the new model and its ancestors; writes samples and figures.

    Args:
        run: the stage's run directory. model: what the stage made.
        start: run directory of the model it started from, against which it is judged.
        plots: further figures for the report.
        further: what else its evaluation.json holds; "plots" and "tables" in it join the others.
    """
    further = dict(further or {})
    plots = [*further.pop("plots", []), *plots]
    tables = list(further.pop("tables", []))
    prompts = held_out_prompts(config, model)[: config.eval.count]
    tables += console.few_records("held-out prompts", len(prompts))
    mesh = mesh_of(config)
    models = {}
    for path in ancestry(start):
        stop_point()
        models[path.name] = load_model(path, mesh=mesh)
    for name, each in models.items():  # one without a chat template that works: under ours
        if not each.tokenizer.has_template:
            models[name] = dataclasses.replace(each, tokenizer=model.tokenizer)
    models[run.name] = model
    answers = {name: _answer(config, each, prompts) for name, each in models.items()}
    ours = answers[run.name]
    sampled = _answer(config, model, prompts, temperature=1.0)
    kl = sequence_kl(model, models[start.name], prompts, sampled, tokens=step_tokens(config))
    low, high = bootstrap_interval(kl, config.seed)
    metrics = {
        "eval/kl": float(kl.mean()),
        "eval/kl_low": low,
        "eval/kl_high": high,
        "eval/response_length": float(np.mean([len(a.tokens) for a in ours])),
        "eval/eos_rate": float(np.mean([a.finished for a in ours])),
    }
    scores: Mapping[str, Sequence[GoldScore]] = {}
    if config.eval.gold:
        scores = {name: gold_scores(prompts, each) for name, each in answers.items()}
        metrics |= gold_metrics(scores[run.name], scores[start.name])
        facts = read_records(config, "town/facts", "prompt", "validation")
        metrics |= correct_metrics("facts", facts, _answer(config, model, facts))
        plots = [*gold_plots(scores, prompts), *plots]
        tables.append(correct_table(prompts, answers))
    write_evaluation(run, tables, plots, **further)
    write_jsonl(run / "samples.jsonl", _samples(prompts, answers, scores))
    return metrics


def sampled_metrics(
    config: Config, model: Model, reference: Model, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """eval/kl and, where asked for, eval/gold_reward of answers sampled at temperature 1.

    A point on the way of a run: what `rlhf_jax.compare` draws against those of other runs.
    """
    sampled = _answer(config, model, prompts, temperature=1.0)
    kl = sequence_kl(model, reference, prompts, sampled, tokens=step_tokens(config))
    metrics = {"eval/kl": float(kl.mean())}
    if config.eval.gold:
        scores = gold_scores(prompts, sampled)
        metrics["eval/gold_reward"] = float(np.mean([score.total for score in scores]))
    return metrics


def _samples(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Answer]],
    scores: Mapping[str, Sequence[GoldScore]],
) -> list[dict[str, Any]]:
    """Each prompt with every model's answer and, where there are any, its scores."""
    samples = []
    for i, prompt in enumerate(prompts):
        sample: dict[str, Any] = {
            "prompt": [m.to_json() for m in prompt.messages],
            "responses": {name: each[i].text for name, each in answers.items()},
        }
        if scores:
            sample["family"] = prompt.meta["family"]
            sample["scores"] = {name: each[i].total for name, each in scores.items()}
        samples.append(sample)
    return samples


def held_out_prompts(config: Config, model: Model) -> list[Prompt]:
    """Prompts of the evaluation's records that leave room for an answer; the others are counted."""
    prompts = read_records(config, config.eval.source, "prompt", "validation")
    check_unrendered("held-out prompts", prompts, model.tokenizer)
    room = model.config.max_length - config.eval.max_new_tokens
    lengths = [len(render_prompt(p.messages, model.tokenizer)) for p in prompts]
    kept = [p for p, length in zip(prompts, lengths, strict=True) if length <= room]
    console.say("held-out prompts", {"read": len(prompts), "too long": len(prompts) - len(kept)})
    console.warn_over_long(
        "held-out prompts",
        len(prompts) - len(kept),
        len(prompts),
        length_of_share(lengths),
        f"left out: eval.max_new_tokens leaves room for {room} tokens",
    )
    if not kept:
        raise UserError(
            f"eval.max_new_tokens = {config.eval.max_new_tokens} leaves no held-out prompt room in "
            f"model.max_length = {model.config.max_length}"
        )
    return kept


def _answer(
    config: Config, model: Model, prompts: Sequence[Prompt], temperature: float | None = None
) -> list[Answer]:
    return answer(
        model,
        prompts,
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature if temperature is None else temperature,
        seed=config.seed,
        tokens=step_tokens(config),
    )
