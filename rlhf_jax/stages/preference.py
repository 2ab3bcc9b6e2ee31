"""Preference optimisation: a chat model and preference pairs → an aligned model, without RL.

DPO and its family, losses/preference.py; KTO also of replies that are labelled one by one. The
reference is the model it starts from; its log-probs are computed once, before training, kept for
the next run on the same data, and travel with the rows. A reward model of the same pairs, if
`init.reward` names one, only has its accuracy reported beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.packing import Arrays
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.before_after import Evaluated, Values
from rlhf_jax.evaluation.chat_evaluation import (
    check_held_out_prompts,
    evaluate_chat,
    sampled_metrics,
)
from rlhf_jax.evaluation.pair_scores import (
    Judged,
    evaluate_pairs,
    label_metrics,
    pair_values,
    right_values,
)
from rlhf_jax.evaluation.row_passes import in_record_order, response_logprobs
from rlhf_jax.losses.preference import Pairs, kto_baseline, preference_loss, unpaired_kto
from rlhf_jax.losses.reductions import weighted_sum
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import sequence_logprobs
from rlhf_jax.stages.fit import Training, batches_of, fit
from rlhf_jax.stages.preference_rows import CHOSEN, MISMATCHED, REJECTED, pack_preferences
from rlhf_jax.stages.reference_logprobs import reference_logprobs
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.sources import parse_sources
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, save_model
from rlhf_jax.training.step import Coupled
from rlhf_jax.training.summary import read_summary


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Optimises `init.policy` on pairs and returns the metrics of summary.json."""
    beside = reward_model_metrics(parents["reward"]) if "reward" in parents else {}
    reference = load_start(config, parents["policy"])
    what, tokenizer = config.data.validation, reference.tokenizer
    held_out = pack_preferences(config, what, "validation", tokenizer, mismatched=False)
    trained = training(config, reference, parents, unpaired="labels" in held_out)
    held_out_reference = reference_logprobs(
        reference, parents["policy"], held_out, step_tokens(config)
    )

    prompts = check_held_out_prompts(config, reference).records[: config.eval.during]
    on_the_way = config.train.eval_every > 0 and config.eval.during > 0

    measure = evaluation(config, reference, held_out, held_out_reference)

    def evaluate(params: Any) -> Evaluated:
        evaluated = measure(params)
        if on_the_way:
            model = dataclasses.replace(reference, params=params)
            evaluated.metrics.update(sampled_metrics(config, model, reference, prompts))
        return evaluated

    # From here on only the KL of answers sampled on the way asks the reference itself.
    model, metrics, plots = fit(
        config, run, *trained, evaluate,
        before=lambda params: logprob_values(config, held_out_reference, held_out),
        keeps_start=on_the_way,
    )  # fmt: skip
    save_model(run.path, model)
    tables = console.few_records("held-out preferences", int(held_out["valid"].sum()))
    further = {"plots": plots, "tables": tables}
    return metrics | evaluate_chat(config, run.path, model, parents["policy"], further) | beside


def reward_model_metrics(directory: Path) -> dict[str, float]:
    """The accuracy that a reward model's run came to, with its interval, by the names shown here.

    Raises:
        UserError: the run has none, so that it is no reward model's.
    """
    names = ("accuracy", "accuracy_low", "accuracy_high")
    metrics = read_summary(directory)["metrics"]
    if missing := [name for name in names if f"eval/{name}" not in metrics]:
        raise UserError(
            f"config: init.reward = {directory} has no eval/{missing[0]} to show beside: name the "
            "run of a reward model, or leave init.reward empty"
        )
    return {f"eval/reward_model/{name}": metrics[f"eval/{name}"] for name in names}


def training(
    config: Config, reference: Model, parents: Mapping[str, Path], unpaired: bool | None = None
) -> Training:
    """What is trained, by which loss and on which batches; log-probs of `reference` are in them.

    Args:
        unpaired: whether records are to be labelled one by one; None: they need not be of one kind
            with those held out.
    """
    sources, kto = parse_sources(config.data.train), config.loss.name == "kto"
    rows = {
        source: pack_preferences(config, source, "train", reference.tokenizer, mismatched=kto)
        for source in sources
    }
    kinds = {unpaired, *("labels" in arrays for arrays in rows.values())} - {None}
    if len(kinds) > 1:
        raise UserError("data: train and validation mix pairs and unpaired records; use one kind")
    for arrays in rows.values():
        arrays["reference_logprobs"] = reference_logprobs(
            reference, parents["policy"], arrays, step_tokens(config)
        )
    batches = batches_of(config, reference, rows, [*sources.values()])
    return Training(reference, partial(loss, config, reference.config), batches)


def evaluation(
    config: Config, reference: Model, held_out: Arrays, reference_logprobs: np.ndarray
) -> Callable[[Any], Evaluated]:
    """The metrics of held-out preferences, as a function of parameters of the reference's shape."""
    unpaired, tokens = "labels" in held_out, step_tokens(config)

    def evaluate(params: Any) -> Evaluated:
        policy = response_logprobs(reference.config, params, held_out, tokens)
        measure = labelled_rewards if unpaired else implicit_rewards
        metrics, figures = measure(config, policy, reference_logprobs, held_out)
        return Evaluated(metrics, figures, logprob_values(config, policy, held_out))

    return evaluate


def loss(config: Config, shape: ModelConfig, params: Any, batch, rng):
    """The configured loss of a batch of pairs: ((total, weight), metrics).

    Whatever its name, loss.sft_coefficient · −log π(chosen) / its tokens is added, in nats, which
    keeps what the model knows while its manners change: "Iterative Reasoning Preference
    Optimization", https://arxiv.org/abs/2404.19733.
    """
    logprobs = sequence_logprobs(shape, params, batch)
    sums, metrics = _loss_of_logprobs(config, logprobs, batch)
    if config.loss.objective.coupled:
        sums = Coupled(sums, logprobs, partial(_loss_of_logprobs, config))
    return sums, metrics


def _loss_of_logprobs(config: Config, logprobs: jax.Array, batch: Mapping[str, jax.Array]):
    objective, is_kto = config.loss.objective, config.loss.name == "kto"
    policy, reference, lengths = (
        x.reshape(-1, x.shape[-1])
        for x in (logprobs, batch["reference_logprobs"], batch["lengths"])
    )
    weights, kl = batch["valid"].reshape(-1), None
    unpaired = "labels" in batch
    if is_kto:
        other = MISMATCHED - unpaired  # there is no rejected one before it
        kl = kto_baseline(policy[:, other], reference[:, other], weights)
    if unpaired:
        of_sft = weights * batch["labels"].reshape(-1)
        (total, weight), metrics = unpaired_kto(
            objective,
            policy[:, 0],
            reference[:, 0],
            batch["labels"].reshape(-1),
            weights=weights,
            kl=kl,
        )
    else:
        of_sft = weights
        uses = objective.uses_reference
        pairs = Pairs(
            policy[:, CHOSEN],
            policy[:, REJECTED],
            reference[:, CHOSEN] if uses else None,
            reference[:, REJECTED] if uses else None,
            lengths[:, CHOSEN],
            lengths[:, REJECTED],
            weights,
            kl,
        )
        (total, weight), metrics = preference_loss(objective, pairs)
    metrics["sft_loss"] = weighted_sum(-policy[:, 0] / jnp.maximum(lengths[:, 0], 1), of_sft)
    total += config.loss.sft_coefficient * metrics["sft_loss"][0]
    return (total, weight), metrics | {"loss": (total, weight)}


def logprob_values(config: Config, logprobs: np.ndarray, rows: Arrays) -> dict[str, Values]:
    """What a model by itself says of each held-out record, with its log-probs [B, P, K] in nats.

    Those of a pair's replies, or of a labelled one's. Where the loss has no reference, also whether
    the chosen reply is the likelier one, per token if the loss is; against a reference that is no
    property of one model, and the model it is nothing can be told of by it.
    """
    if "labels" in rows:
        return {"logps": Values.of(in_record_order(logprobs, rows)[:, 0])}
    each = pair_values(logprobs, rows)
    measured = {
        "logps/chosen": Values.of(each[:, CHOSEN]),
        "logps/rejected": Values.of(each[:, REJECTED]),
    }
    objective = config.loss.objective
    if not objective.uses_reference:
        lengths = in_record_order(rows["lengths"], rows) if objective.per_token else 1
        measured |= right_values(logprobs, rows, divisors=lengths)
    return measured


def labelled_rewards(
    config: Config, logprobs: np.ndarray, reference_logprobs: np.ndarray, rows: Arrays
) -> Judged:
    """(metrics, plots) of β(log π − log π_ref) as scores of held-out replies and their labels."""
    rewards = config.loss.objective.beta * (logprobs - reference_logprobs)
    metrics, plots = label_metrics(rewards, rows)
    del metrics["eval/loss"]  # of a classifier; KTO's is another
    return metrics, plots


def implicit_rewards(
    config: Config, logprobs: np.ndarray, reference_logprobs: np.ndarray, rows: Arrays
) -> Judged:
    """(metrics, plots) on held-out pairs of what the configured loss takes for a reward.

    That is β(log π − log π_ref), or β log π without a reference, per token if the loss is.
    Chosen and rejected log-probs are reported apart: both falling while their margin grows is what
    likelihood displacement looks like.
    """
    policy = pair_values(logprobs, rows)
    moved = policy - pair_values(reference_logprobs, rows)
    objective = config.loss.objective
    rewards = objective.beta * (moved if objective.uses_reference else policy)
    if objective.per_token:
        rewards = rewards / np.maximum(in_record_order(rows["lengths"], rows), 1)
    metrics, plots = evaluate_pairs(rewards, rows)
    metrics |= {
        "eval/logps/chosen": float(policy[:, CHOSEN].mean()),
        "eval/logps/rejected": float(policy[:, REJECTED].mean()),
        "eval/logps/chosen_change": float(moved[:, CHOSEN].mean()),
        "eval/logps/rejected_change": float(moved[:, REJECTED].mean()),
    }
    return metrics, plots
