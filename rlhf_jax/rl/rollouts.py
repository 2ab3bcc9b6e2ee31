"""Text rollouts: prompts → sampled answers → rewards, and the rows a policy is trained on.

An answer is never made of text again: the tokens that were sampled are the tokens that are scored
and trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import Config
from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.packing import Arrays
from rlhf_jax.environments.trajectories import Play, Trajectory, trajectory_seeds
from rlhf_jax.errors import UserError
from rlhf_jax.losses.advantages import zero_variance
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import (
    target_cross_entropy,
    target_kl,
    target_statistics,
    target_values,
)
from rlhf_jax.models.sharding import batch_shards
from rlhf_jax.rewards.costs import COSTS
from rlhf_jax.rewards.scorers import COMPARING, Scores, check_records, parse_rewards
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout, pack_rows
from rlhf_jax.rl.objectives import shape_scores
from rlhf_jax.rl.on_policy import Task
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.tasks.prompts import PromptSet, prompts_within
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.training.metrics import Metrics
from rlhf_jax.training.saved_model import Model


def read_prompts(config: Config, tokenizer: Tokenizer, source: str, split: str) -> PromptSet:
    """The prompts of a source that leave room for an answer; the others are counted.

    Raises:
        UserError: there is none, or a scorer needs what a prompt's record does not have.
    """
    limit = config.rollout.max_prompt_tokens
    records = read_records(config, source, "prompt", split)
    why = f"left out, longer than rollout.max_prompt_tokens = {limit}"
    prompts = prompts_within(limit, f"{source} ({split}) prompts", records, tokenizer, why)
    if not prompts.records:
        raise UserError(
            f"none of the {len(records)} prompts of {source!r} has at most "
            f"rollout.max_prompt_tokens = {limit} tokens"
        )
    if config.reward.on_error == "fail":
        for name in sorted(COMPARING.keys() & parse_rewards(config.reward.scorers)):
            check_records(name, prompts.records)
    return prompts


def sample_answers(
    config: Config,
    model: Model,
    prompts: PromptSet,
    *,
    samples: int,
    seed: int,
    multiple: int,
    temperature: float | None = None,
    ids: Sequence[int] | None = None,
) -> Rollout:
    """`samples` answers to each prompt by the engine, in a `multiple` of rows.

    They are drawn as the rollout says, or with a `temperature` at that one, from the whole
    distribution. `ids` name the prompts in the random numbers, by default their place.
    """
    options, drawn, play = config.rollout, dict[str, Any](temperature=temperature), None
    if temperature is None:
        everything = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # which the policy stage always draws
        stated = {name: getattr(options, name, value) for name, value in everything.items()}
        drawn = {name: value for name, value in stated.items() if value != everything[name]}
        drawn["temperature"] = options.temperature
    if prompts.environments is not None:
        seeds = trajectory_seeds(seed, range(len(prompts.records)) if ids is None else ids)
        play = prompts.environments.open(model.tokenizer, prompts.records, samples, seeds)
        longest = options.max_prompt_tokens
        play.check_room(longest, f"rollout.max_prompt_tokens = {longest}: raise that")
        prompts = dataclasses.replace(prompts, records=play.records, tokens=play.prompts)
        drawn["respond"] = play.respond
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        stop_ids=model.tokenizer.ends,
        samples_per_prompt=samples,
        batch_size=options.slots,
        cache_length=options.max_prompt_tokens + options.max_new_tokens,
        **drawn,
    )
    completions = generate(
        model.config, model.params, prompts.tokens, sampling, seed=seed, prompt_ids=ids
    )
    texts = [model.tokenizer.decode_text(completion.last_turn) for completion in completions]
    rollout = Rollout.of(prompts, completions, texts, options.max_new_tokens)
    if play is not None:
        play.end(rollout.finished.tolist())
        rollout = dataclasses.replace(
            rollout,
            trajectories=play.trajectories,
            turn_rewards=_turn_rewards(play, rollout),
            extents=np.array([len(c.tokens) + c.unread for c in completions], np.float32),
        )
    return with_rows(config, rollout, multiple)


def _turn_rewards(play: Play, rollout: Rollout) -> np.ndarray:
    """`Rollout.turn_rewards`; an answer's other rewards are its last turn's."""
    rewards = np.zeros(rollout.mask.shape, np.float32)
    for n, completion in enumerate(rollout.completions):
        for given, reward in zip(completion.given, play.trajectories[n].rewards, strict=False):
            rewards[n, given.start - 1] = reward
    return rewards


def with_rows(config: Config, rollout: Rollout, multiple: int) -> Rollout:
    """The rollout with its rows, in number a `multiple`, as config.data and config.rollout say."""
    limits = {"row_length": config.data.row_length, "max_prompt": config.rollout.max_prompt_tokens}
    return dataclasses.replace(rollout, rows=pack_rows(rollout, multiple=multiple, **limits))


def text_rollout(
    config: Config,
    policy: Model,
    judge: Judge,
    mesh: Mesh | None,
    params: Any,
    prompts: PromptSet,
    number: int,
) -> Rollout:
    """Samples, scores and packs one iteration's answers: rollout.prompts × rollout.samples.

    The policy answers with its present `params`. Of `prompts`, the first rollout.prompts are
    answered. With `rollout.filter_zero_std`, those whose answers all score the same are left out,
    and as many of the following are answered in their place while there are any (dynamic sampling
    as in DAPO, https://arxiv.org/abs/2503.14476; `rollout.resample` times at most). They are judged
    by what is trained: the shaped scores of the answers that count.
    """
    options, multiple = config.rollout, row_multiple(config, mesh)
    model = dataclasses.replace(policy, params=params)
    seed = int(random_bits([number], config.seed)[0] >> np.uint64(33))
    blocks, scored, failures = list[Rollout](), list[Scores](), 0
    while True:
        places = range(len(blocks) * options.prompts, (len(blocks) + 1) * options.prompts)
        block, scores, failed = _sample_block(
            config, model, prompts.take(places), judge, multiple, seed=seed, ids=places
        )
        blocks.append(block)
        scored.append(scores)
        failures += failed
        drawn = Rollout.joined(blocks)
        counts = drawn.weights.reshape(-1, options.samples)
        shaped = shape_scores(config, drawn).reshape(counts.shape)
        same, judged = np.asarray(zero_variance(shaped, counts)), counts.any(1)
        teaches = ~same if options.filter_zero_std else np.ones_like(same)
        if teaches.sum() >= options.prompts or len(blocks) > options.resample:
            break
    rollout = drawn
    if len(blocks) > 1:  # those that teach, others only where they are too few; all in order
        taken = np.sort(np.argsort(~teaches, kind="stable")[: options.prompts]).tolist()
        rollout, teaches = with_rows(config, drawn.take(taken), multiple), teaches[taken]
    weights = rollout.weights * np.repeat(teaches, options.samples)
    metrics = _metrics_of_scores(scored) | _metrics_of_tools(drawn)
    metrics |= {
        "rewards/failures": (failures, 1.0),
        "rollout/tokens": (drawn.lengths.sum(), 1.0),
        "rollout/blocks": (len(blocks), 1.0),
    }
    metrics |= _metrics_of_groups(options.samples, same, judged, weights)
    if getattr(options, "given", "mask") == "train":
        rollout = with_rows(config, rollout.with_answers_drawn(), multiple)
    return dataclasses.replace(
        rollout,
        scores=np.where(weights > 0, rollout.scores, 0.0),
        weights=weights,
        metrics=Metrics.of_pairs(metrics),
    )


def _sample_block(
    config: Config,
    model: Model,
    prompts: PromptSet,
    judge: Judge,
    multiple: int,
    *,
    seed: int,
    ids: Sequence[int],
) -> tuple[Rollout, Scores, int]:
    """(answers to rollout.prompts prompts, packed and scored; their scores; rewards that failed).

    Answers that may not be trained on have weight 0.
    """
    each, failed = config.rollout.samples, 0
    greedy, greedy_costs = np.zeros((2, len(prompts.records)))
    block = sample_answers(
        config, model, prompts, samples=each, seed=seed, multiple=multiple, ids=ids
    )
    scores = judge.score(block)
    counted = scores.valid.copy()
    if config.rollout.truncated == "mask":
        counted &= block.finished
    if block.turn_rewards is not None:
        weight = judge.weights.get("environment", 0.0)
        block = dataclasses.replace(block, turn_rewards=block.turn_rewards * np.float32(weight))
    if getattr(config.advantage, "name", "") == "remax":  # whose baseline is the greedy answer
        # Greedy answers draw nothing by the seed, but environments begin by it, as for the samples.
        answers = sample_answers(
            config,
            model,
            prompts,
            samples=1,
            seed=seed,
            multiple=multiple,
            temperature=0.0,
            ids=ids,
        )
        of_greedy = judge.score(answers)
        answers = dataclasses.replace(answers, scores=np.nan_to_num(of_greedy.total))
        greedy, failed = np.asarray(shape_scores(config, answers)), sum(of_greedy.failures.values())
        counted &= np.repeat(of_greedy.valid, each)
        if config.lagrange.cost:
            paid = np.nan_to_num(_costs(config.lagrange.cost, answers))
            charged = dataclasses.replace(answers, charges=paid)
            greedy_costs = greedy - np.asarray(shape_scores(config, charged))
    block = dataclasses.replace(
        block,
        scores=np.nan_to_num(scores.total),
        weights=counted.astype(np.float32),
        greedy_scores=greedy,
        greedy_costs=greedy_costs,
    )
    return block, scores, failed + sum(scores.failures.values())


def _metrics_of_scores(scored: Sequence[Scores]) -> dict[str, tuple[float, float]]:
    """Means and spreads of all that was scored, also what is not trained on, and its number."""
    metrics: dict[str, tuple[float, float]] = {}
    columns = {name: [s.components[name] for s in scored] for name in scored[0].components}
    for name, parts in (columns | {"total": [s.total for s in scored]}).items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if len(values):
            metrics[f"rewards/{name}/mean"] = float(values.mean()), len(values)
            metrics[f"rewards/{name}/std"] = float(values.std()), len(values)
    return metrics


def _metrics_of_groups(
    each: int, same: np.ndarray, judged: np.ndarray, weights: np.ndarray
) -> dict[str, tuple[float, float]]:
    """How many groups score the same, of all that were judged, those left out too."""
    if each == 1:
        return {"rollout/zero_std_groups": (0, 1.0)}
    count, uniform = int(judged.sum()), int((same & judged).sum())
    metrics = {
        "rollout/zero_std_groups": (float(uniform), 1.0),
        "frac_reward_zero_std": (uniform / max(count, 1), float(count)),
    }
    if not weights.any():  # all that were judged were dropped, because it is 0
        metrics["reward_std"] = 0.0, float(count)
    return metrics


def _metrics_of_tools(rollout: Rollout) -> dict[str, tuple[float, float]]:
    """Of all trajectories: what they called, and what could not be used; means over them."""
    played: Sequence[Trajectory] = rollout.trajectories
    if not played:
        return {}
    count, calls = float(len(played)), sum(each.calls for each in played)
    given = sum(len(part) for completion in rollout.completions for part in completion.given)
    return {
        "tools/calls": (calls / count, count),
        "tools/invalid": (sum(each.invalid for each in played) / max(calls, 1), float(calls)),
        "tools/truncated": (float(1 - np.mean(rollout.finished)), count),
        "tools/tokens": (given / count, count),
        "tools/failures": (float(sum(bool(each.fault) for each in played)), 1.0),
    }


def row_multiple(config: Config, mesh: Mesh | None) -> int:
    """The number that an iteration's rows are a multiple of, so that few shapes are compiled."""
    part = config.batch.rows
    if part % (config.batch.microbatches * batch_shards(mesh)):
        raise UserError(
            f"batch.rows = {part} does not split into batch.microbatches = "
            f"{config.batch.microbatches} over {batch_shards(mesh)} devices"
        )
    return part * config.train.minibatches


def text_task(
    config: Config,
    policy: Model,
    judge: Judge,
    mesh: Mesh | None,
    texts: Any = None,
) -> Task:
    """Makes the task of a chat model, whose samples are answers to the prompts of a batch.

    `texts`, a data set of packed raw text, is the pre-training mix (PPO-ptx of InstructGPT,
    https://arxiv.org/abs/2203.02155): every update takes its next batch.
    """
    shape, temperature = policy.config, config.rollout.temperature
    value_shape = dataclasses.replace(shape, head="scalar")
    return Task(
        rollout=partial(text_rollout, config, policy, judge, mesh),
        statistics=partial(target_statistics, shape, temperature=temperature),
        values=partial(target_values, value_shape) if config.advantage.name == "gae" else None,
        exact_kl=partial(target_kl, shape, temperature=temperature),
        costs=partial(_costs, config.lagrange.cost) if config.lagrange.cost else None,
        dtype=shape.compute_dtype,
        extra_rows=None if texts is None else partial(_text_rows, texts),
        extra_loss=None if texts is None else partial(_text_loss, shape),
    )


def _costs(name: str, rollout: Rollout) -> np.ndarray:
    """[N] f64, the cost of each answer to its own prompt; NaN where it cannot have one."""
    asked = [record for record in rollout.prompts.records for _ in range(rollout.each)]
    pairs = zip(asked, rollout.texts, strict=True)
    return np.array([COSTS[name](prompt, text) for prompt, text in pairs], np.float64)


def _text_rows(texts: Any, update: int) -> Arrays:
    return {f"ptx/{name}": array for name, array in texts[update].items()}


def _text_loss(shape: ModelConfig, params: Any, batch: Mapping[str, jax.Array]):
    rows = {k.removeprefix("ptx/"): v for k, v in batch.items() if k.startswith("ptx/")}
    total, _ = target_cross_entropy(shape, params, rows)
    return total, {"loss/ptx": total}
