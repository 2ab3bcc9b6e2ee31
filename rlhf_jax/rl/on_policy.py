"""One iteration of on-policy reinforcement learning: rollout → score → advantages → update.

    answers → log-probs and values → rewards, advantages → epochs of minibatch updates → controller

If there is but one update, the policy's log-probs before it are those it computes itself, and no
pass over the samples is spent on them (unless a KL in the reward needs them sooner).

An iteration is atomic: a run is saved between iterations only, and everything in one is a function
of the state, the batch of prompts and the iteration's number. So a run killed in the middle of a
rollout or an epoch does the same iteration again, bit for bit.

What is sampled, and by what policy, is a `Task`: text from a transformer (`rl/rollouts.py`) or
the letters of a world of which everything is known (`oracle/stage.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import Config
from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.packing import Arrays
from rlhf_jax.errors import UserError
from rlhf_jax.global_arrays import to_host
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.policy import Objective
from rlhf_jax.losses.reductions import mean
from rlhf_jax.losses.shaping import adaptive_coefficient, lagrange_multiplier
from rlhf_jax.models.sharding import TRANSFORMER_RULES, Rules, split_over
from rlhf_jax.rl import objectives
from rlhf_jax.rl.layout import Rollout, from_rows, select, to_rows
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.mesh import placed, shard_batch
from rlhf_jax.training.metrics import Metrics, joined, weighted
from rlhf_jax.training.rundir import fault_point
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Coupled

# The largest |ratio − 1| of a policy to itself, by what it computes in.
RATIO_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
Pairs = dict[str, tuple[float, float]]  # metrics with what they are means over


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("iteration", "policy", "value", "kl_coefficient", "multiplier"),
    meta_fields=(),
)
@dataclass(frozen=True)
class OnPolicyState:
    """The state that an iteration maps to the next one.

    Attributes:
      iteration: int32, iterations done.
      policy, value: of the policy and, if there is one, the critic (else None).
      kl_coefficient: f32, of the KL controller.
      multiplier: f32, λ of the limit on a cost; None where there is no limit.
    """

    iteration: jax.Array
    policy: TrainState
    value: TrainState | None
    kl_coefficient: jax.Array
    multiplier: jax.Array | None = None


@dataclass(frozen=True)
class Task:
    """The source of a policy's samples, and how they are scored.

    Attributes:
      rollout: (policy params, the iteration's prompts, its number) → Rollout, scored and packed;
        a world of which everything is known has its own prompts and takes nothing for them.
      statistics: (policy params, rows) → TokenStatistics of [R, M] arrays, compiled by the caller.
      values: (value params, rows) → ([R, M] value before each target, [R, S] value after the last
        token of each sequence), or None without a critic.
      exact_kl: (policy params, reference params, rows) → [R, M] full-vocabulary KL at each target,
        or None.
      costs: Rollout → [N] costs of its answers, NaN where there can be none; None without a limit.
      dtype: what the policy computes in.
      extra_rows: number of an update → further arrays of its minibatch, as of a pre-training mix;
        `extra_loss` (params, batch) → ((total, weight), metrics) of them, both or neither.
    """

    rollout: Callable[[Any, Any, int], Rollout]
    statistics: Callable[[Any, Mapping[str, Any]], TokenStatistics]
    values: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]] | None = None
    exact_kl: Callable[[Any, Any, Mapping[str, jax.Array]], jax.Array] | None = None
    costs: Callable[[Rollout], np.ndarray] | None = None
    dtype: str = "float32"
    extra_rows: Callable[[int], Arrays] | None = None
    extra_loss: Callable | None = None


@dataclass(frozen=True)
class Trainer:
    """All that stays the same from iteration to iteration.

    Attributes:
      policy, critic: what trains them; no critic without values.
      reference: params of the reference policy, never changed.
      score_rows: compiled `_score_rows`. value_rows: compiled `_value_rows`.
      exact_kl: compiled, of the task.
      advantages, sample_metrics: compiled functions of `objectives` under the config.
    """

    config: Config
    task: Task
    mesh: Mesh | None
    policy: Learner
    critic: Learner | None
    reference: Any
    score_rows: Callable[..., dict[str, jax.Array]]
    value_rows: Callable[..., dict[str, jax.Array]]
    exact_kl: Callable[..., jax.Array] | None
    advantages: Callable[[Rollout, jax.Array], tuple[dict[str, jax.Array], Metrics]]
    sample_metrics: Callable[[Rollout, jax.Array], Metrics]


def make_trainer(
    config: Config,
    task: Task,
    start: Any,
    critic: Any = None,
    *,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
) -> Trainer:
    """The trainer that a config describes; see `rl/options.py` for its fields.

    The first iteration refuses a policy that is not its reference: their KL must start at 0.

    Args:
      start: params of the policy as it starts, and of its reference; under an adapter only that is
        trained.
      critic: params of the critic as it starts, for a task that has values.
      mesh: rows are split over it; None for one device.
    """
    start, critic = placed(mesh, (start, critic), rules)
    updates = config.train.steps * updates_per_iteration(config)
    learn = functools.partial(make_learner, config, updates=updates, mesh=mesh, rules=rules)
    objective, valued = config.loss.objective, None
    if task.values is not None:
        optimizer = config.critic.optimizer(config.optimizer)
        valued = learn(optimizer, critic, functools.partial(value_loss, config, task))
    return Trainer(
        config,
        task,
        mesh,
        learn(config.optimizer, start, functools.partial(policy_loss, config, task, objective)),
        valued,
        start,
        jax.jit(split_over(mesh, functools.partial(_score_rows, task))),
        jax.jit(split_over(mesh, functools.partial(_value_rows, task))),
        None if task.exact_kl is None else jax.jit(split_over(mesh, task.exact_kl)),
        jax.jit(functools.partial(objectives.advantages, config)),
        jax.jit(functools.partial(objectives.sample_metrics, config)),
    )


def updates_per_iteration(config: Config) -> int:
    """Updates of the policy on one rollout."""
    return config.train.epochs * config.train.minibatches


def first_state(trainer: Trainer) -> OnPolicyState:
    """The state before the first iteration."""
    config, multiplier = trainer.config, None
    if trainer.task.costs is not None:
        multiplier = jnp.asarray(config.lagrange.start, jnp.float32)
    numbers = jnp.zeros((), jnp.int32), jnp.asarray(config.kl.coefficient, jnp.float32), multiplier
    iteration, coefficient, multiplier = placed(trainer.mesh, numbers)
    return OnPolicyState(
        iteration=iteration,
        policy=trainer.policy.init(),
        value=None if trainer.critic is None else trainer.critic.init(),
        kl_coefficient=coefficient,
        multiplier=multiplier,
    )


def iterate(
    trainer: Trainer, state: OnPolicyState, prompts: Any
) -> tuple[OnPolicyState, Metrics, Rollout]:
    """(the state after one iteration on a batch of prompts, its metrics, its rollout).

    Raises:
      UserError: the ratio of the policy to itself is not 1, so what trains is not what scored, and
        nothing that follows would mean anything.
    """
    config, task, number = trainer.config, trainer.task, int(state.iteration)
    params, coefficient = trainer.policy.params(state.policy), state.kl_coefficient
    rollout = task.rollout(params, prompts, number)
    fault_point("rollout", number + 1)
    rollout, multiplier, of_costs = charge(trainer, state, rollout)
    # If an iteration has a single update, that update computes the old log-probs itself.
    sooner = updates_per_iteration(config) > 1 or config.kl.placement == "reward"
    rollout = score(trainer, state, rollout, own=sooner)
    exact = _exact_kl(trainer, params, rollout, number)
    rollout, of_advantages = advantages(trainer, rollout, coefficient)
    fault_point("scored", number + 1)
    policy, value, of_updates, rollout = update(trainer, state, rollout)
    if number == 0:
        _check_start(rollout, task.dtype)
    metrics = joined(
        weighted(trainer.sample_metrics(rollout, coefficient)),
        weighted(of_advantages),
        of_updates,
        weighted(rollout.metrics),
        exact | of_costs | _mismatch(rollout),
    )
    if config.kl.target:
        coefficient = adaptive_coefficient(
            coefficient,
            jnp.float32(metrics.get("objective/kl", 0)),
            target=config.kl.target,
            horizon=config.kl.horizon,
            count=round(float(rollout.weights.sum())),
        )
    state = OnPolicyState(state.iteration + 1, policy, value, coefficient, multiplier)
    return state, metrics, rollout


def charge(
    trainer: Trainer, state: OnPolicyState, rollout: Rollout
) -> tuple[Rollout, jax.Array | None, Pairs]:
    """(the rollout with its answers' charges of price·cost, greedy ones too, the next λ, metrics).

    The price is max(0, λ + κ·(mean cost − limit)), a proportional and an integral controller:
    "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
    https://arxiv.org/abs/2007.03964. The mean is over the answers that count and can have a cost;
    without any there is no charge, and λ stays.
    """
    multiplier = state.multiplier
    if trainer.task.costs is None or multiplier is None:
        return rollout, None, {}
    options, costs = trainer.config.lagrange, trainer.task.costs(rollout)
    counted = np.isfinite(costs) & (rollout.weights > 0)
    paid = np.where(counted, costs, 0)
    count, price = float(counted.sum()), multiplier
    metrics = {"objective/multiplier": (float(multiplier), 1.0)}
    if count:
        cost = float(paid.sum() / count)
        metrics["objective/cost"] = cost, count
        step = functools.partial(
            lagrange_multiplier, multiplier, jnp.float32(cost), limit=options.limit
        )
        price, multiplier = step(rate=options.damping), step(rate=options.rate)
    charged: dict[str, Any] = {"charges": float(price) * paid}
    if rollout.greedy_costs is not None:
        charged["greedy_scores"] = rollout.greedy_scores - float(price) * rollout.greedy_costs
    return dataclasses.replace(rollout, **charged), multiplier, metrics


def score(trainer: Trainer, state: OnPolicyState, rollout: Rollout, *, own: bool = True) -> Rollout:
    """The rollout with what the policy (if `own`), its reference and the critic say of it."""
    params = trainer.policy.params(state.policy) if own else None
    count = trainer.config.train.minibatches
    size = len(rollout.rows["members"]) // count  # of a minibatch, so that both are compiled once
    scored = []
    for start in range(0, size * count, size):
        part = {name: array[start : start + size] for name, array in rollout.rows.items()}
        part = shard_batch(trainer.mesh, part)
        scored.append(trainer.score_rows(params, trainer.reference, part))
        if trainer.critic is not None and state.value is not None:
            scored[-1] |= trainer.value_rows(trainer.critic.params(state.value), part)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *to_host(scored))
    members = rollout.rows["members"]
    arrays: dict[str, Any] = {name: from_rows(x, members) for name, x in whole.items()}
    return dataclasses.replace(rollout, **arrays)


def advantages(
    trainer: Trainer, rollout: Rollout, coefficient: jax.Array
) -> tuple[Rollout, Metrics]:
    """The scored rollout with advantages and returns, and their metrics."""
    made, metrics = to_host(trainer.advantages(rollout, coefficient))
    return dataclasses.replace(rollout, **made), metrics


def update(
    trainer: Trainer, state: OnPolicyState, rollout: Rollout
) -> tuple[TrainState, TrainState | None, Pairs, Rollout]:
    """(policy, critic, metrics) after all epochs over the rollout's rows, and the rollout.

    An update that scores the samples itself leaves their log-probs and entropy in the rollout.
    """
    config, task, number = trainer.config, trainer.task, int(state.iteration)
    policy, value, of_policy, of_value = state.policy, state.value, [], []
    rows = trainable_rows(rollout, float(state.kl_coefficient))
    members = rows["members"]
    for i, chosen in enumerate(minibatches(config, (members >= 0).any(axis=1), number)):
        batch = {name: array[chosen] for name, array in rows.items()}
        if task.extra_rows is not None:
            batch |= task.extra_rows(number * updates_per_iteration(config) + i)
        batch = shard_batch(trainer.mesh, batch)
        with jax.transfer_guard("disallow"):
            policy, metrics, *own = trainer.policy.step(policy, batch)
        of_policy.append(metrics)
        for scored in to_host(own):  # by the only update
            mine: dict[str, Any] = {k: from_rows(x, members[chosen]) for k, x in scored.items()}
            rollout = dataclasses.replace(rollout, **mine)
        if i == 0:
            _check_ratio(metrics["policy/ratio_deviation"], task.dtype)
        if trainer.critic is not None and value is not None:
            with jax.transfer_guard("disallow"):
                value, metrics = trainer.critic.step(value, batch)
            of_value.append(metrics)
        fault_point("update", i + 1)
    averages = over_updates(of_policy)
    excess, _ = averages.pop("policy/ratio_excess")
    square, weight = averages.pop("policy/ratio_excess_square")
    averages["policy/ratio_var"] = square - excess**2, weight
    if of_value:
        of_critic = over_updates(of_value)
        shared = (name for name in _OF_CRITIC if name in of_critic)
        averages |= {name.replace("train/", "val/"): of_critic[name] for name in shared}
    return policy, value, averages, rollout


_OF_CRITIC = (
    *("loss/value_avg", "val/clipfrac", "val/mean", "train/grad_norm"),
    *("train/skipped", "train/consecutive_skipped"),
)
_TRAINED = (
    *("old_logprobs", "ref_logprobs", "behaviour_logprobs", "advantages", "returns"),
    "old_values",
)


def trainable_rows(rollout: Rollout, coefficient: float) -> Arrays:
    """The rows with everything a loss reads, what is known of each sequence where it lies."""
    members, rows = rollout.rows["members"], dict(rollout.rows)
    for name in _TRAINED:
        if (values := getattr(rollout, name)) is not None:
            rows[name] = to_rows(np.asarray(values, np.float32), members)
    rows["sequence_weights"] = to_rows(rollout.weights, members)
    rows["kl_coefficient"] = np.full(len(members), coefficient, np.float32)
    return rows


def minibatches(config: Config, real: Any, number: int) -> Iterator[np.ndarray]:
    """Row indices of every minibatch of every epoch: a function of (seed, iteration, epoch).

    `real` [R] tells rows from padding: the real ones are dealt out evenly.
    """
    count = config.train.minibatches
    for epoch in range(config.train.epochs):
        bits = random_bits(range(len(real)), config.seed, number, epoch)
        order = np.lexsort((bits, ~real)) if count > 1 else np.arange(len(real))
        yield from order.reshape(-1, count).T


def _sequences(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of a minibatch that are by sequence, [R, S, …] → [R·S, …]."""
    names = [name for name in ("mask", "sequence_weights", *_TRAINED) if name in batch]
    flat = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}
    return flat | {"kl_coefficient": batch["kl_coefficient"]}


def policy_loss(config: Config, task: Task, objective: Objective, params, batch, rng):
    """The policy's loss on a minibatch, as `make_step` takes it.

    Also returns the policy's own scores [R, S, T], if the batch comes without.
    """
    statistics = TokenStatistics(*(select(x, batch) for x in task.statistics(params, batch)))
    sequences, own = _sequences(batch), []
    if "old_logprobs" not in batch:
        old, entropy = jax.lax.stop_gradient((statistics.logprobs, statistics.entropy))
        sequences["old_logprobs"] = old
        shape = batch["slots"].shape
        own.append({"old_logprobs": old.reshape(shape), "entropy": entropy.reshape(shape)})
    (total, weight), metrics = objectives.policy_objective(config, objective, statistics, sequences)
    if task.extra_loss is None:
        return (total, weight), metrics, *own
    extra, of_extra = task.extra_loss(params, batch)
    parts = jax.tree.map(lambda x: jnp.reshape(x, 1), ((total, weight), extra))
    finish = functools.partial(_mixed, config)
    sums, loss = finish(parts, batch)
    return Coupled(sums, parts, finish), metrics | of_extra | loss, *own


def _mixed(config: Config, parts: Any, batch: Any):
    """The policy's loss and, in the coefficient's share, the mean of the extra one."""
    (total, weight), extra = jax.tree.map(jnp.sum, parts)
    mixed = total + config.loss.ptx_coefficient * mean(extra) * weight, weight
    return mixed, {"loss": mixed}


def value_loss(config: Config, task: Task, params, batch, rng):
    """The critic's loss on a minibatch, as `make_step` takes it."""
    assert task.values is not None
    values, _ = task.values(params, batch)
    return objectives.value_objective(config, select(values, batch), _sequences(batch))


def _score_rows(task: Task, params, reference, rows) -> dict[str, jax.Array]:
    """[R, S, T] of the function that trains: before the first update the ratio is exactly 1.

    Without `params` of the reference only.
    """
    of_targets = {"ref_logprobs": task.statistics(reference, rows).logprobs}
    if params is not None:
        ours = task.statistics(params, rows)
        of_targets |= {"old_logprobs": ours.logprobs, "entropy": ours.entropy}
    return {name: select(x, rows).reshape(rows["slots"].shape) for name, x in of_targets.items()}


def _value_rows(task: Task, params, rows) -> dict[str, jax.Array]:
    assert task.values is not None
    values, after = task.values(params, rows)
    return {
        "old_values": select(values, rows).reshape(rows["slots"].shape),
        "last_values": after.reshape(rows["members"].shape),
    }


def _check_ratio(deviation, dtype: str) -> None:
    if not float(deviation) <= RATIO_TOLERANCE[dtype]:
        raise UserError(
            "before its first update the policy's ratio to itself is off 1 by "
            f"{float(deviation):.1e}, over {RATIO_TOLERANCE[dtype]:.0e} for {dtype}: the function "
            "that trains is not the one that scored the samples (dropout, another precision, other "
            "positions?)"
        )


def _check_start(rollout: Rollout, dtype: str) -> None:
    apart = np.abs(np.where(rollout.mask > 0, rollout.old_logprobs - rollout.ref_logprobs, 0)).max()
    if not apart <= RATIO_TOLERANCE[dtype]:
        raise UserError(
            f"the policy starts as its reference, yet their log-probs differ by up to {apart:.1e}, "
            f"over {RATIO_TOLERANCE[dtype]:.0e} for {dtype}: KL would not start at 0"
        )


def _exact_kl(trainer: Trainer, params: Any, rollout: Rollout, number: int) -> Pairs:
    """The full-vocabulary KL per sequence on one row, and the sequences it holds.

    The row is chosen by chance: packing has put the longest first.
    """
    if trainer.exact_kl is None:
        return {}
    config, rows = trainer.config, rollout.rows
    real = np.flatnonzero((rows["members"] >= 0).any(1))
    bits = random_bits(range(len(real)), config.seed, number, config.train.epochs)
    chosen = real[np.argsort(bits, kind="stable")][:1]
    some = {name: array[chosen] for name, array in rows.items()}
    divergence = trainer.exact_kl(params, trainer.reference, some)
    total = (to_host(divergence) * (some["weights"] > 0)).sum()
    count = float((some["members"] >= 0).sum())
    return {"objective/kl_exact": (float(total / count), count)}


def _mismatch(rollout: Rollout) -> Pairs:
    """How far the sampler's log-probs are from those of the function that trains, with weights."""
    mask, sampled = rollout.mask, rollout.sampled
    gap = np.where(sampled > 0, rollout.old_logprobs - rollout.behaviour_logprobs, 0)
    tokens = float(sampled.sum())
    return {
        "rollout/logprob_difference": (float(np.abs(gap).max()), 1.0),
        "rollout/logprob_difference_mean": (float(np.abs(gap).sum() / tokens), tokens),
        "rollout/kl_k3": (float((np.expm1(gap) - gap).sum() / tokens), tokens),
        "rollout/ratio_max": (float(np.exp(gap.max())), 1.0),
        "objective/entropy": (float((rollout.entropy * mask).sum() / max(len(mask), 1)), 1.0),
    }


def over_updates(taken: Sequence[Metrics]) -> Pairs:
    """(value, weight) of an iteration's updates: means over what they counted, the most of maxima.

    Updates in which nothing counts, minibatches of padding or of masked answers, have no share.
    Skips, rate and parameters are those after the last update; train/updates is their number.
    """
    updates = [weighted(metrics) for metrics in to_host(taken)]
    counted = [update for update in updates if update["train/weight"][0] != 0]
    averages = {"train/updates": (float(len(updates)), 1.0)}
    for name in taken[0]:
        if name.endswith(("skipped", "param_norm", "learning_rate")):
            averages[name] = updates[-1][name]
            continue
        largest = name.endswith(("_max", "_deviation"))
        having = counted if largest or name.endswith(("_norm", "train/weight")) else updates
        values, weights = np.array([update[name] for update in having] or [(0.0, 0.0)]).T
        total = float(weights.sum())
        if largest:
            value = float(values.max(initial=-np.inf, where=weights != 0))
        else:
            value = float((values * weights).sum() / (total or 1))
        averages[name] = value, total
    return averages
