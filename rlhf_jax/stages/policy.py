"""On-policy reinforcement learning: a chat model, prompts and a reward → an aligned model.

PPO with a critic, GRPO, Dr.GRPO, DAPO, RLOO, REINFORCE++, GSPO and CISPO are one loop that differs
in `advantage`, `loss` and `kl`: see `defaults.ALGORITHMS`. Gold and proxy reward stand side by side
at every evaluation, because that is where over-optimisation shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import Config
from rlhf_jax.data.batches import make_dataset
from rlhf_jax.environments.trajectories import environments_of
from rlhf_jax.files import write_json, write_jsonl
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.on_policy import (
    OnPolicyState,
    first_state,
    iterate,
    make_trainer,
)
from rlhf_jax.rl.rollouts import text_task
from rlhf_jax.stages.fit import pack_texts
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.stages.sampled import (
    evaluate,
    finish,
    first_evaluation,
    held_out_set,
    sampled_tokens,
    training_prompts,
)
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.training.loop import Loop, is_evaluated
from rlhf_jax.training.mesh import mesh_of
from rlhf_jax.training.progress import Clock
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, as_trainable, save_model

VIEWS = 6  # samples a report shows token by token


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Optimises `init.policy` for `reward.scorers`; returns the metrics of summary.json."""
    policy = load_start(config, parents["policy"])
    mesh = mesh_of(config)
    prompts, batches = training_prompts(config, policy)
    held_out = held_out_set(config, policy)

    texts = None
    if config.loss.ptx_coefficient:
        records = read_records(config, config.data.ptx, "text", "train")
        what = f"{config.data.ptx} (ptx)"
        packed, _ = pack_texts(config, what, records, policy.tokenizer, "split")
        texts = make_dataset(packed, config.batch.rows, seed=config.seed)

    with (
        Judge(config, parents, policy, run.path) as judge,
        environments_of(config.environment) as environments,
    ):
        prompts, held_out = (
            dataclasses.replace(each, environments=environments) for each in (prompts, held_out)
        )
        task = text_task(config, policy, judge, mesh, texts)
        critic = critic_params(config, policy, judge)
        trainer = make_trainer(config, task, policy.params, critic, mesh=mesh)

        def evaluation(state: OnPolicyState) -> dict[str, float]:
            model = dataclasses.replace(policy, params=trainer.policy.params(state.policy))
            number = int(state.iteration)
            return evaluate(config, run.path, model, policy, held_out, judge, number)

        def step(state: OnPolicyState, batch: Mapping[str, np.ndarray]):
            asked = prompts.take(np.asarray(batch["row_ids"]).tolist())
            state, metrics, rollout = iterate(trainer, state, asked)
            number = int(state.iteration)
            if is_evaluated(config.train, number):  # where it may be interrupted
                write_jsonl(run.path / "views.jsonl", token_views(policy, rollout, number))
                write_json(run.path / "histograms.json", histograms(rollout))
            return state, metrics

        before = first_evaluation(config, run, policy, held_out, judge)
        loop = Loop(
            config.train,
            run,
            step,
            batches,
            evaluation,
            clock=Clock(tokens=sampled_tokens),
            tokenizer_hash=policy.tokenizer.hash,
        )
        state, rates = loop.train(first_state(trainer))
    model = dataclasses.replace(policy, params=trainer.policy.params(state.policy))
    save_model(run.path, model)
    return finish(config, run.path, model, parents["policy"], before) | rates


def critic_params(config: Config, policy: Model, judge: Judge) -> Any:
    """Where the critic starts: from the reward model if there is one, else from the policy's body.

    A reward model's score of a prefix already is a guess of its value; a fresh head starts at 0.
    """
    if config.advantage.name != "gae":
        return None
    shape = dataclasses.replace(policy.config, head="scalar")
    if judge.models and judge.models[0].config == shape:
        first = judge.models[0]
        if policy.adapter is None or first.adapter is None:
            first = as_trainable(first, policy.adapter or AdapterConfig(), config.seed)
        # Only the scale: a head has no bias, the critic learns the offset.
        scale = judge.weights.get("model", 1.0)
        if config.reward.normalize and first.normalization:
            scale /= first.normalization[1]
        head = {"kernel": first.params["score_head"]["kernel"] * scale}
        return {**first.params, "score_head": head}
    value = with_score_head(policy, config.seed).params
    return {**value, "score_head": jax.tree.map(np.zeros_like, value["score_head"])}


def histograms(rollout: Rollout) -> dict[str, list[float]]:
    """A rollout's advantages, returns and values, of every token: what is drawn."""
    drawn = {
        "advantages": rollout.advantages,
        "returns": rollout.returns,
        "old_values": rollout.old_values,
    }
    tokens = rollout.mask > 0
    return {name: x[tokens].tolist() for name, x in drawn.items() if x is not None}


def token_views(policy: Model, rollout: Rollout, number: int) -> list[dict[str, Any]]:
    """Some samples of iteration `number`: tokens with their advantage, KL and value."""
    arrays = {
        "advantage": rollout.advantages,
        "kl": rollout.old_logprobs - rollout.ref_logprobs,
        "value": rollout.old_values,
    }
    count = min(VIEWS, len(rollout.completions))
    views = []
    for n in range(0, len(rollout.completions) // count * count, len(rollout.completions) // count):
        tokens = rollout.completions[n].tokens
        record = rollout.prompts.records[n // rollout.each]
        views.append(
            {
                "title": f"iteration {number}, score {rollout.scores[n]:.2f}",
                "prompt": [message.to_json() for message in record.messages],
                "tokens": [policy.tokenizer.decode([token]) or "⏹" for token in tokens],
                "values": {
                    name: x[n, : len(tokens)].tolist()
                    for name, x in arrays.items()
                    if x is not None
                },
            }
        )
    return views
