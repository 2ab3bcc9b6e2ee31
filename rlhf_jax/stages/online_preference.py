"""Online preference optimisation: the policy's own answers, labelled as they come, make the pairs.

The best and the worst of a prompt's answers by `reward.scorers` are chosen and rejected; the
loss is any of losses/preference.py against the model it started from. "Direct Language Model
Alignment from Online AI Feedback", https://arxiv.org/abs/2402.04792; several updates on one set of
pairs make it iterated DPO, https://arxiv.org/abs/2312.11456.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import Config
from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.encode import is_identical
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.evaluation.row_passes import response_logprobs
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import SHORTEST, Rollout
from rlhf_jax.rl.objectives import shape_scores
from rlhf_jax.rl.on_policy import minibatches, over_updates, updates_per_iteration
from rlhf_jax.rl.rollouts import row_multiple, text_rollout
from rlhf_jax.stages.preference import loss
from rlhf_jax.stages.preference_rows import CHOSEN, REJECTED
from rlhf_jax.stages.sampled import (
    evaluate,
    finish,
    first_evaluation,
    held_out_set,
    sampled_tokens,
    training_prompts,
)
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.loop import Loop
from rlhf_jax.training.mesh import mesh_of, shard_batch, step_tokens
from rlhf_jax.training.metrics import joined, weighted
from rlhf_jax.training.progress import Clock
from rlhf_jax.training.rundir import RunDirectory, fault_point
from rlhf_jax.training.saved_model import Model, save_model
from rlhf_jax.training.state import TrainState


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Optimises `init.policy` on pairs of its own answers; returns the metrics of summary.json."""
    reference = load_start(config, parents["policy"])
    mesh = mesh_of(config)
    prompts, batches = training_prompts(config, reference)
    held_out = held_out_set(config, reference)
    per_iteration = updates_per_iteration(config)
    learner = make_learner(
        config,
        config.optimizer,
        reference.params,
        partial(loss, config, reference.config),
        updates=config.train.steps * per_iteration,
        mesh=mesh,
    )
    with Judge(config, parents, reference, run.path) as judge:

        def evaluation(state: TrainState) -> dict[str, float]:
            model = dataclasses.replace(reference, params=learner.params(state))
            number = int(state.step) // per_iteration
            return evaluate(config, run.path, model, reference, held_out, judge, number)

        before = first_evaluation(config, run, reference, held_out, judge)
        loop = Loop(
            config.train,
            run,
            partial(iterate, config, reference, prompts, judge, learner, mesh),
            batches,
            evaluation,
            clock=Clock(tokens=sampled_tokens),
            tokenizer_hash=reference.tokenizer.hash,
        )
        state, rates = loop.train(learner.init())
    model = dataclasses.replace(reference, params=learner.params(state))
    save_model(run.path, model)
    return finish(config, run.path, model, parents["policy"], before) | rates


def iterate(
    config: Config,
    reference: Model,
    prompts: PromptSet,
    judge: Judge,
    learner: Learner,
    mesh: Mesh | None,
    state: TrainState,
    batch: Mapping[str, np.ndarray],
) -> tuple[TrainState, dict[str, Any]]:
    """A step of the loop: samples, labels, and updates on the pairs."""
    number = int(state.step) // updates_per_iteration(config)
    asked, params = prompts.take(np.asarray(batch["row_ids"]).tolist()), learner.params(state)
    rollout = text_rollout(config, reference, judge, mesh, params, asked, number)
    fault_point("rollout", number + 1)
    rows, tied = pack_best_and_worst(config, rollout, row_multiple(config, mesh))
    rows["reference_logprobs"] = response_logprobs(
        reference.config, reference.params, rows, step_tokens(config)
    )
    count = len(rollout.prompts.records)
    judge.ties.add("prompts have no better and worse answer", count, tied < count)
    taken = []
    for chosen in minibatches(config, (rows["valid"] > 0).any(axis=1), number):
        part = {name: x[chosen] for name, x in rows.items()}
        state, metrics = learner.step(state, part if mesh is None else shard_batch(mesh, part))
        taken.append(metrics)
        fault_point("update", len(taken))
    counted = rollout.weights.sum()
    of_rollout = {
        "pairs/tied": (tied, 1.0),
        "completions/mean_length": (rollout.lengths.mean(), 1.0),
        "completions/eos_rate": (rollout.finished.mean(), 1.0),
    }
    shaped = np.asarray(shape_scores(config, rollout))
    for name, scores in {"scores": rollout.scores, "shaped_scores": shaped}.items():
        total = (scores * rollout.weights).sum()
        of_rollout[f"objective/{name}"] = total / max(counted, 1), counted
    return state, joined(over_updates(taken), of_rollout, weighted(rollout.metrics))


def pack_best_and_worst(config: Config, rollout: Rollout, multiple: int) -> tuple[Arrays, int]:
    """Rows of pairs, a prompt's best answer before its worst, and how many prompts had none.

    Best and worst are by the shaped scores: an answer that never ended pays for it first. A prompt
    whose answers tie or are the same tokens, or with fewer than two that count, keeps its place
    with weight 0.
    """
    row_length = config.data.row_length
    scores = np.asarray(shape_scores(config, rollout)).reshape(-1, rollout.each)
    counts = rollout.weights.reshape(scores.shape) > 0
    best = np.where(counts, scores, -np.inf).argmax(1)
    worst = np.where(counts, scores, np.inf).argmin(1)
    span = np.arange(len(scores))
    useful = (counts.sum(1) > 1) & (scores[span, best] > scores[span, worst])
    groups = []
    for i, tokens in enumerate(rollout.prompts.tokens):
        pair = {CHOSEN: best[i], REJECTED: worst[i]}
        answers = [rollout.completions[i * rollout.each + pair[k]].tokens for k in sorted(pair)]
        groups.append(Group(tokens, tuple(answers), i))
        useful[i] &= not is_identical(groups[-1])
    most = max(1, row_length // (2 * SHORTEST))
    rows, _ = pack_groups(groups, row_length, branches=2, most=most)
    valid = (rows["example_ids"] >= 0) & useful[rows["example_ids"]]
    rows["valid"] = valid.astype(np.float32)
    return pad_rows(rows, rows=multiple, slots=row_length, groups=most), int((~useful).sum())
