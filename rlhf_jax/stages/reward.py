"""Reward modelling: a chat model and human judgements → a scalar score of (prompt, response).

The score is read at the response's last token. It is trained with the Bradley–Terry loss on pairs,
or, with `loss.name = "pointwise"`, with the logistic loss on conversations whose `meta["label"]`
says how good the last reply is, from 0 to 1 or false or true. Where pairs are the votes of labelers
that differ, `data.labelers` says what becomes of them. Its mean and standard deviation over
what `init.policy` answers are kept with the model, since a score has neither zero nor unit of its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.encode import length_of_share
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.before_after import Evaluated
from rlhf_jax.evaluation.held_out_answers import answer
from rlhf_jax.evaluation.pair_scores import label_metrics, right_values, score_metrics
from rlhf_jax.evaluation.row_passes import in_record_order, map_rows
from rlhf_jax.losses.reward import bradley_terry, pointwise_logistic
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.rewards.ensemble import normalization_of
from rlhf_jax.stages.fit import Training, batches_of, fit
from rlhf_jax.stages.preference_rows import CHOSEN, REJECTED, pack_labelled, pack_pairs
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.sources import names_pairs, parse_sources, read_records
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, save_model
from rlhf_jax.training.summary import write_evaluation


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Trains a reward model on the body of `init.policy`; returns the metrics of summary.json."""
    policy = load_start(config, parents["policy"])
    trained = training(config, policy, parents)
    evaluate = evaluation(config, trained.model)
    model, metrics, plots = fit(
        config, run, *trained, evaluate,
        before=lambda params: evaluate(params).values, keeps_start=config.normalize.prompts > 0,
    )  # fmt: skip
    if config.normalize.prompts:
        mean, std = reference_scores(config, model, policy, [*trained.batches.rows])
        model = dataclasses.replace(model, normalization=(mean, std))
        metrics |= {"eval/reference_score_mean": mean, "eval/reference_score_std": std}
    save_model(run.path, model)
    tables = console.few_records("held-out preferences", int(metrics["change/accuracy_records"]))
    write_evaluation(run.path, tables, plots)
    return metrics


def training(config: Config, policy: Model, parents: Mapping[str, Path]) -> Training:
    """What is trained, by which loss and on which batches, where `policy` has the body.

    It is called as `preference.training` is, which alone reads `parents`.
    """
    initial = with_score_head(policy, config.seed)
    sources = parse_sources(config.data.train)
    pack = packer(config, policy)
    rows = {source: pack(source, "train") for source in sources}
    batches = batches_of(config, initial, rows, [*sources.values()])
    return Training(initial, partial(loss, config, initial.config), batches)


def packer(config: Config, model: Model) -> Callable[[str, str], Arrays]:
    """(source, split) → packed pairs, or labelled replies."""
    pack = pack_labelled if config.loss.name == "pointwise" else pack_pairs
    return partial(pack, config, tokenizer=model.tokenizer)


def evaluation(config: Config, model: Model) -> Callable[[Any], Evaluated]:
    """The held-out metrics of scores, as a function of parameters of the model's shape.

    What was trained on labels may be judged by pairs: `data.validation` names a data set of them.
    """
    source = config.data.validation
    pack = packer(config, model)
    if names_pairs(source):
        pack = partial(pack_pairs, config, tokenizer=model.tokenizer)
    held_out = pack(source, "validation")
    score = jax.jit(partial(sequence_scores, model.config))

    def evaluate(params: Any) -> Evaluated:
        scores = map_rows(score, params, held_out, step_tokens(config))
        measure = label_metrics if "labels" in held_out else score_metrics
        return Evaluated(*measure(scores, held_out), right_values(scores, held_out))

    return evaluate


def with_score_head(model: Model, seed: int) -> Model:
    """Returns the model with a fresh scalar head on its body."""
    shape = dataclasses.replace(model.config, head="scalar")
    head = jax.jit(lambda key: transformer.init(shape, key)["score_head"])(jax.random.key(seed))
    body = {name: value for name, value in model.params.items() if name != "lm_head"}
    params = body | {"score_head": head}
    return dataclasses.replace(model, config=shape, params=params, normalization=None)


def loss(config: Config, shape: ModelConfig, params: Any, batch, rng):
    """The configured loss over a batch of pairs or labelled replies: ((total, weight), metrics)."""
    scores = sequence_scores(shape, params, batch)
    scores = scores.reshape(-1, scores.shape[-1])
    valid = batch["valid"].reshape(-1)
    if config.loss.name == "pointwise":
        return pointwise_logistic(scores[:, 0], batch["labels"].reshape(-1), valid)
    votes = batch["votes"].reshape(-1, 3) if "votes" in batch else None
    return bradley_terry(
        scores[:, CHOSEN], scores[:, REJECTED], valid, centering=config.loss.centering, votes=votes
    )


def reference_scores(
    config: Config, model: Model, policy: Model, sources: Sequence[str]
) -> tuple[float, float]:
    """Mean and population std of the model's scores of the policy's own answers.

    `normalize.prompts` prompts are drawn from the training records of all sources, among those that
    leave room for an answer, and answered once each at temperature 1: "Fine-Tuning Language Models
    from Human Preferences", https://arxiv.org/abs/1909.08593, normalises by these. Those without
    room are counted.
    """
    options = config.normalize
    records = [p for s in sources for p in read_records(config, s, "prompt", "train")]
    room = model.config.max_length - options.max_new_tokens
    prompts, tokens, lengths = [], [], []
    for i in np.random.default_rng(config.seed).permutation(len(records)):
        rendered = render_prompt(records[i].messages, model.tokenizer)
        lengths.append(len(rendered))
        if len(rendered) <= room:
            prompts.append(records[i])
            tokens.append(rendered)
        if len(prompts) == options.prompts:
            break
    if not prompts:
        raise UserError(
            f"normalize.max_new_tokens = {options.max_new_tokens} leaves no training prompt room "
            f"in model.max_length = {model.config.max_length}"
        )
    what, too_long = "normalization prompts", len(lengths) - len(prompts)
    console.say(what, {"asked for": options.prompts, "drawn": len(lengths), "too long": too_long})
    console.warn_over_long(
        what, too_long, len(lengths), length_of_share(lengths),
        f"left out, longer than the {room} tokens that normalize.max_new_tokens = "
        f"{options.max_new_tokens} leaves of model.max_length = {model.config.max_length}",
    )  # fmt: skip
    answers = answer(
        policy,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=1.0,
        seed=config.seed,
        tokens=step_tokens(config),
    )
    groups = [
        Group(prompt, (each.tokens,), i)
        for i, (prompt, each) in enumerate(zip(tokens, answers, strict=True))
    ]
    longest = max(len(prompt) for prompt in tokens) + options.max_new_tokens
    rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=1)
    score = jax.jit(partial(sequence_scores, model.config))
    scores = map_rows(score, model.params, rows, step_tokens(config))
    reference = normalization_of(in_record_order(scores, rows))
    print(
        f"normalization: scores of {len(prompts)} answers of the policy have mean "
        f"{reference.mean:.3f}, std {reference.std:.3f}",
        flush=True,
    )
    return reference.mean, reference.std
