"""Reward modelling: a chat model and human judgements → a scalar score of (prompt, response).

The score is read at the response's last token. It is trained with the Bradley–Terry loss on pairs,
or, with `loss.name = "pointwise"`, with the logistic loss on conversations whose `meta["label"]`
says how good the last reply is, from 0 to 1. Its mean and standard deviation over what
`init.policy` answers are kept with the model, since a score has neither zero nor unit of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.chat import AnyTokenizer, render_prompt, render_reply
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.data.records import Conversation
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.preferences import preference_metrics, preference_plots
from rlhf_jax.evaluation.responses import answer
from rlhf_jax.evaluation.rows import in_record_order, map_rows
from rlhf_jax.evaluation.statistics import calibration, wilson_interval
from rlhf_jax.losses.reward import bradley_terry, pointwise_logistic
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.rewards import normalization_of
from rlhf_jax.stages.common import (
    Evaluated,
    batches_of,
    fit,
    load_start,
    parse_sources,
    read_records,
    say,
    write_evaluation,
)
from rlhf_jax.stages.pairs import CHOSEN, REJECTED, pack_pairs
from rlhf_jax.training.model import Model, save_model
from rlhf_jax.training.rundir import RunDirectory

LOSSES = ("bradley_terry", "pointwise")


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Trains a reward model on the body of `init.policy`; returns the metrics of summary.json."""
    _check_loss(config)
    policy = load_start(config, parents["policy"])
    initial = with_score_head(policy, config.seed)
    sources = parse_sources(config.data.train)
    pointwise = config.loss.name == "pointwise"
    pack = partial(pack_labelled if pointwise else pack_pairs, config, tokenizer=policy.tokenizer)
    rows = [pack(source, "train") for source in sources]
    held_out = pack(config.data.validation, "validation")
    score = jax.jit(partial(sequence_scores, initial.config))

    def evaluate(params: Any) -> Evaluated:
        scores = map_rows(score, params, held_out, config.eval.batch_rows)
        return (label_metrics if pointwise else score_metrics)(scores, held_out)

    batches = batches_of(config, initial, rows, [*sources.values()])
    loss_fn = partial(loss, config, initial.config)
    model, metrics, plots = fit(config, run, initial, loss_fn, batches, evaluate)
    if config.normalize.prompts:
        mean, std = reference_scores(config, model, policy, [*sources])
        model = dataclasses.replace(model, normalization=(mean, std))
        metrics |= {"eval/reference_score_mean": mean, "eval/reference_score_std": std}
    save_model(run.path, model)
    write_evaluation(run.path, plots=plots)
    return metrics


def _check_loss(config: ConfigDict) -> None:
    name = config.loss.name
    if name not in LOSSES:
        raise UserError(f"config.loss.name = {name!r}: choose one of {', '.join(LOSSES)}")
    if name == "pointwise" and config.loss.centering:
        raise UserError("config.loss.centering is for pairs: labels already say where a score is 0")


def with_score_head(model: Model, seed: int) -> Model:
    """The same body under a fresh scalar head."""
    shape = dataclasses.replace(model.config, head="scalar")
    head = jax.jit(lambda key: transformer.init(shape, key)["score_head"])(jax.random.key(seed))
    body = {name: value for name, value in model.params.items() if name != "lm_head"}
    params = body | {"score_head": head}
    return dataclasses.replace(model, config=shape, params=params, normalization=None)


def pack_labelled(config: ConfigDict, source: str, split: str, tokenizer: AnyTokenizer) -> Arrays:
    """Rows of groups of one reply, and beside them `labels` [B, P, 1] in [0, 1]."""
    records = read_records(config, source, "conversation", split)
    length, over_long = config.data.row_length, config.data.over_long
    if over_long not in ("error", "drop"):
        raise UserError(f"data.over_long = {over_long!r}: labelled replies know error and drop")
    by_record = np.array([_label(record) for record in records], np.float32)
    groups, dropped = [], 0
    for index, record in enumerate(records):
        prompt = render_prompt(record.messages[:-1], tokenizer)
        reply = render_reply(record.messages[-1].content, tokenizer)
        if len(prompt) + len(reply) <= length:
            groups.append(Group(prompt, (reply,), index))
            continue
        dropped += 1
        if over_long == "error":
            raise UserError(
                f"record {record.id!r} has {len(prompt) + len(reply)} tokens, more than a row of "
                f'{length}; raise data.row_length or set data.over_long to "drop"'
            )
    if not groups:
        raise UserError(f"no examples of {source!r} are left: {dropped} were over-long")
    rows, packing = pack_groups(groups, length, branches=1)
    labels = np.where(rows["valid"] > 0, by_record[rows["example_ids"]], 0)
    counts = {"records": len(records), "dropped": dropped, "good": float(by_record.mean())}
    say(f"{source} ({split})", counts | packing)
    return rows | {"labels": labels[..., None].astype(np.float32)}


def _label(record: Conversation) -> float:
    try:
        label = float(record.meta["label"])
    except (KeyError, ValueError):
        label = -1.0
    if not 0 <= label <= 1:
        raise UserError(
            f"record {record.id!r}: a pointwise loss needs a 'label' from 0 to 1, not "
            f"{record.meta.get('label')!r}"
        )
    return label


def loss(config: ConfigDict, shape: ModelConfig, params: Any, batch, rng):
    """The configured loss over a batch of pairs or labelled replies: ((total, weight), metrics)."""
    scores = sequence_scores(shape, params, batch)
    scores = scores.reshape(-1, scores.shape[-1])
    valid = batch["valid"].reshape(-1)
    if config.loss.name == "pointwise":
        return pointwise_logistic(scores[:, 0], batch["labels"].reshape(-1), valid)
    return bradley_terry(
        scores[:, CHOSEN], scores[:, REJECTED], valid, centering=config.loss.centering
    )


def score_metrics(scores: np.ndarray, rows: Arrays) -> Evaluated:
    """(metrics, plots) of scores [B, P, 2] on held-out pairs."""
    ordered = in_record_order(scores, rows)
    lengths = in_record_order(rows["lengths"], rows)
    chosen, rejected = ordered[:, CHOSEN], ordered[:, REJECTED]
    metrics = preference_metrics(chosen, rejected, lengths)
    metrics |= {"eval/score_mean": float(ordered.mean()), "eval/score_std": float(ordered.std())}
    return metrics, preference_plots(chosen, rejected, lengths)


def label_metrics(scores: np.ndarray, rows: Arrays) -> Evaluated:
    """(metrics, plots) of scores [B, P, 1] on held-out labelled replies.

    Right is a score with the sign of label − ½ (0 counts ½); a label of ½ is left out of accuracy
    and AUC, the share of (good, bad) couples that are in order, which no threshold enters.
    """
    ordered = in_record_order(scores, rows)[:, 0].astype(np.float64)
    labels = in_record_order(rows["labels"], rows)[:, 0].astype(np.float64)
    good, bad = ordered[labels > 0.5], ordered[labels < 0.5]
    correct = (1 + np.sign(np.concatenate([good, -bad]))) / 2
    low, high = wilson_interval(float(correct.sum()), len(correct))
    reliability = calibration(1 / (1 + np.exp(-ordered)), labels)
    metrics = {
        "eval/loss": float(np.mean(np.logaddexp(0, ordered) - labels * ordered)),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": reliability.ece,
        "eval/score_mean": float(ordered.mean()),
        "eval/score_std": float(ordered.std()),
    }
    if len(correct):
        metrics["eval/accuracy"] = float(correct.mean())
    if len(good) and len(bad):
        metrics["eval/auc"] = _auc(good, bad)
    plots = [
        {"kind": "reliability", "title": "Calibration"} | dataclasses.asdict(reliability),
        {
            "kind": "histogram",
            "title": "Scores of held-out replies",
            "values": {"good": good.tolist(), "bad": bad.tolist()},
            "xlabel": "nats",
        },
    ]
    return metrics, plots


def _auc(good: np.ndarray, bad: np.ndarray) -> float:
    """P(good > bad) + ½ P(good = bad)."""
    below = np.sort(bad)
    lower, upper = (np.searchsorted(below, good, side) for side in ("left", "right"))
    return float((lower + upper).mean() / (2 * len(bad)))


def reference_scores(
    config: ConfigDict, model: Model, policy: Model, sources: Sequence[str]
) -> tuple[float, float]:
    """Mean and population std of the model's scores of the policy's own answers.

    `normalize.prompts` prompts are drawn from the training records of all sources, among those that
    leave room for an answer, and answered once each at temperature 1: "Fine-Tuning Language Models
    from Human Preferences", https://arxiv.org/abs/1909.08593, normalises by these.
    """
    options = config.normalize
    records = [p for s in sources for p in read_records(config, s, "prompt", "train")]
    room = model.config.max_length - options.max_new_tokens
    prompts, tokens = [], []
    for i in np.random.default_rng(config.seed).permutation(len(records)):
        rendered = render_prompt(records[i].messages, model.tokenizer)
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
    answers = answer(
        policy,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=1.0,
        seed=config.seed,
        batch_rows=config.eval.batch_rows,
    )
    groups = [
        Group(prompt, (each.tokens,), i)
        for i, (prompt, each) in enumerate(zip(tokens, answers, strict=True))
    ]
    longest = max(len(prompt) for prompt in tokens) + options.max_new_tokens
    rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=1)
    score = jax.jit(partial(sequence_scores, model.config))
    scores = map_rows(score, model.params, rows, config.eval.batch_rows)
    found = normalization_of(in_record_order(scores, rows))
    print(
        f"normalization: scores of {len(prompts)} answers of the policy have mean "
        f"{found.mean:.3f}, std {found.std:.3f}",
        flush=True,
    )
    return found.mean, found.std
