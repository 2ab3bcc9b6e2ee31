"""One iteration of on-policy reinforcement learning, as a step the training loop can take.

    rollouts → log-probs and values → rewards, advantages → epochs of minibatch updates → controller

If there is but one update, the policy's log-probs before it are those it computes itself, and no
pass over the samples is spent on them (unless a KL in the reward needs them sooner).

An iteration is atomic: a run is saved between iterations only, and everything in one is a function
of the state, the batch of prompts and the iteration's number. So a run killed in the middle of a
rollout or an epoch does the same iteration again, bit for bit.

What is sampled, and by what policy, is a `Task`: text from a transformer (`rl/rollouts.py`) or
the letters of a world of which everything is known (`oracle/stage.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.packing import Arrays
from rlhf_jax.errors import UserError
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.reductions import mean
from rlhf_jax.losses.shaping import adaptive_coefficient
from rlhf_jax.rl.objectives import (
    Sampled,
    advantages,
    policy_objective,
    value_objective,
)
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.mesh import TRANSFORMER_RULES, Rules, placed, shard_batch
from rlhf_jax.training.metrics import Metrics, joined, weighted
from rlhf_jax.training.rundir import fault_point
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Coupled

# The largest |ratio − 1| of a policy to itself, by what it computes in.
RATIO_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("iteration", "policy", "value", "kl_coefficient"),
    meta_fields=(),
)
@dataclass(frozen=True)
class OnPolicyState:
    """What an iteration maps to the next one.

    Attributes:
      iteration: int32, iterations done.
      policy, value: of the policy and, if there is one, the critic (else None).
      kl_coefficient: f32, of the KL controller.
    """

    iteration: jax.Array
    policy: TrainState
    value: TrainState | None
    kl_coefficient: jax.Array


@dataclass(frozen=True)
class Rollouts:
    """N sampled sequences, the samples of a prompt together, as rows that can be trained on.

    Attributes:
      rows: [R, …] what the task's functions read, and of every row its S sequences: members [R, S]
        int32, the sequence's index in the rollout or −1, and slots [R, S, T] int32, the place of
        its token t among the row's M targets.
      mask: f32 [N, T], 1 on response tokens, EOS included.
      logprobs: f32 [N, T] nats, as the sampler said.
      scores, weights: [N]; weight 0 leaves a sequence out. finished: bool [N].
      shaped_scores: [N] scores after `shape_scores`; None where the task leaves that to others.
      greedy_scores: [N / G] of the greedy answers; zeros where nobody asked.
      metrics: of the rollout, numbers by name.
      version: iteration of the policy that sampled.
      samples: whatever the task wants to remember of them.
    """

    rows: Arrays
    mask: np.ndarray
    logprobs: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    finished: np.ndarray
    greedy_scores: np.ndarray
    metrics: dict[str, float]
    version: int
    samples: Any = None
    shaped_scores: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """What a policy is trained on.

    Attributes:
      rollout: (policy params, host batch of prompts, iteration) → Rollouts.
      statistics: (policy params, rows) → TokenStatistics of [R, M] arrays, compiled by the caller.
      values: (value params, rows) → ([R, M] value before each target, [R, S] value after the last
        token of each sequence), or None without a critic.
      exact_kl: (policy params, reference params, rows) → [R, M] full-vocabulary KL at each target,
        or None.
      dtype: what the policy computes in.
      extra_rows: number of an update → further arrays of its minibatch, as of a pre-training mix;
        `extra_loss` (params, batch) → ((total, weight), metrics) of them, both or neither.
    """

    rollout: Callable[[Any, Mapping[str, np.ndarray], int], Rollouts]
    statistics: Callable[[Any, Mapping[str, Any]], TokenStatistics]
    values: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]] | None = None
    exact_kl: Callable[[Any, Any, Mapping[str, jax.Array]], jax.Array] | None = None
    dtype: str = "float32"
    extra_rows: Callable[[int], Arrays] | None = None
    extra_loss: Callable | None = None


@dataclass(frozen=True)
class Iteration:
    """A step of the loop, and what comes with it.

    Attributes:
      step: (state, batch of prompts) → (state, metrics).
      init: () → the state before the first iteration.
      params: state → all of the policy's parameters.
      assess: (state, rollouts) → (arrays [N, …], metrics), what the policy, its reference and the
        critic say of samples, the advantages included; trains nothing.
      last: the newest iteration's rollouts and arrays, for a report.
    """

    step: Callable[[OnPolicyState, Mapping[str, np.ndarray]], tuple[OnPolicyState, dict]]
    init: Callable[[], OnPolicyState]
    params: Callable[[OnPolicyState], Any]
    assess: Callable[[OnPolicyState, Rollouts], tuple[dict[str, np.ndarray], dict]]
    last: dict[str, Any]


def make_iteration(
    config: ConfigDict,
    task: Task,
    start: Any,
    critic: Any = None,
    *,
    reference: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
    from_reference: bool = True,
) -> Iteration:
    """The iteration a config describes; see `stages/defaults.py` for its fields.

    Args:
      start: params of the policy as it starts; under an adapter only that is trained.
      critic: params of the critic as it starts, for a task that has values.
      reference: params of the reference policy, never changed; None: `start`.
      mesh: rows are split over it; None for one device.
      from_reference: the policy starts as the reference, so their KL must start at 0.

    Returns:
      Iteration. Its step raises UserError where the ratio of the policy to itself is not 1: what
      trains is then not what scored, and nothing that follows would mean anything.
    """
    reference = start if reference is None else reference
    start, critic, reference = placed(mesh, (start, critic, reference), rules)
    updates = config.train.steps * _updates(config)
    learn = functools.partial(make_learner, config, updates=updates, mesh=mesh, rules=rules)
    policy = learn(config.optimizer, start, functools.partial(_policy_loss, config, task))
    values: Learner | None = None
    if task.values is not None:
        section = {k: v for k, v in config.critic.items() if k != "value_clip"}
        values = learn(section, critic, functools.partial(_value_loss, config, task))
    score = jax.jit(functools.partial(_score, task))
    value = jax.jit(functools.partial(_values, task))
    prepare = jax.jit(functools.partial(advantages, config))
    exact = None if task.exact_kl is None else jax.jit(task.exact_kl)
    # Then the policy's log-probs are not needed before the update, which computes them anyway.
    single = _updates(config) == 1 and config.kl.placement != "reward"
    last: dict[str, Any] = {}

    def init() -> OnPolicyState:
        return OnPolicyState(
            iteration=jnp.zeros((), jnp.int32),
            policy=policy.init(),
            value=None if values is None else values.init(),
            kl_coefficient=jnp.asarray(config.kl.coefficient, jnp.float32),
        )

    def params(state: OnPolicyState) -> Any:
        return policy.params(state.policy)

    def scored(ours: Any, state: OnPolicyState, rollouts: Rollouts) -> dict[str, np.ndarray]:
        parts = list(_parts(rollouts.rows, config.train.minibatches))
        found = [score(ours, reference, shard_batch(mesh, p)) for p in parts]
        arrays = _unpack(parts, found) | {"behaviour_logprobs": rollouts.logprobs}
        if values is not None and state.value is not None:
            found = [value(values.params(state.value), shard_batch(mesh, p)) for p in parts]
            arrays |= _unpack(parts, found)
        return arrays

    def prepared(rollouts: Rollouts, arrays: dict[str, np.ndarray], coefficient: jax.Array):
        made, metrics = jax.device_get(prepare(_sampled(rollouts, arrays), coefficient))
        return arrays | made, metrics

    def assess(state: OnPolicyState, rollouts: Rollouts) -> tuple[dict[str, np.ndarray], dict]:
        return prepared(rollouts, scored(params(state), state, rollouts), state.kl_coefficient)

    def update(state: OnPolicyState, rows: Arrays, number: int, version: int):
        """(policy, critic, metrics, what the updates scored) after all epochs over the rows."""
        ours, theirs, taken, of_critic, found = state.policy, state.value, [], [], []
        chosen = minibatches(config, (rows["members"] >= 0).any(axis=1), number)
        for i, indices in enumerate(chosen):
            minibatch = {name: x[indices] for name, x in rows.items()}
            _check_version(config, version, number, i)
            if task.extra_rows is not None:
                minibatch |= task.extra_rows(number * _updates(config) + i)
            minibatch = shard_batch(mesh, minibatch)
            with jax.transfer_guard("disallow"):
                ours, of_policy, *seen = policy.step(ours, minibatch)
            taken.append(of_policy)
            found += seen
            if i == 0:
                _check_ratio(of_policy["policy/ratio_deviation"], task.dtype)
            if values is not None and theirs is not None:
                with jax.transfer_guard("disallow"):
                    theirs, of_value = values.step(theirs, minibatch)
                of_critic.append(of_value)
            fault_point("update", i + 1)
        metrics = over_updates(taken)
        square, weight = metrics.pop("policy/ratio_square")
        metrics["policy/ratio_var"] = square - metrics["policy/ratio"][0] ** 2, weight
        if of_critic:
            its = over_updates(of_critic)
            shared = (name for name in _OF_CRITIC if name in its)
            metrics |= {name.replace("train/", "val/"): its[name] for name in shared}
        return ours, theirs, metrics, found

    def step(state: OnPolicyState, batch):
        number = int(state.iteration)
        rollouts = task.rollout(params(state), batch, number)
        fault_point("rollout", number + 1)
        coefficient = state.kl_coefficient
        arrays = scored(None if single else params(state), state, rollouts)
        arrays, metrics = prepared(rollouts, arrays, coefficient)
        fault_point("scored", number + 1)
        exactly = {}
        if exact is not None:
            shown = _some_rows(rollouts.rows, config, number)
            divergence = exact(params(state), reference, shown)
            exactly["objective/kl_exact"] = _by_sequence(divergence, shown)
        rows = _trainable(rollouts, arrays, float(coefficient))
        ours, theirs, of_updates, found = update(state, rows, number, rollouts.version)
        if single:  # the same advantages again, and metrics of what is known only now
            arrays, metrics = prepared(rollouts, arrays | _unpack([rows], found), coefficient)
        if number == 0 and from_reference:
            _check_start(arrays, rollouts.mask, task.dtype)
        measured = exactly | _mismatch(arrays, rollouts.mask)
        of_rollout = weighted(rollouts.metrics)
        whole = joined(weighted(metrics), of_updates, of_rollout, measured)
        last.update(rollouts=rollouts, arrays=arrays)
        count = float(rollouts.weights.sum())
        after = OnPolicyState(
            iteration=state.iteration + 1,
            policy=ours,
            value=theirs,
            kl_coefficient=_controlled(config, coefficient, whole.get("objective/kl", 0), count),
        )
        return after, whole

    return Iteration(step, init, params, assess, last)


def _updates(config: ConfigDict) -> int:
    """Of one iteration."""
    return config.train.epochs * config.train.minibatches


_OF_CRITIC = (
    *("loss/value_avg", "val/clipfrac", "val/mean", "train/grad_norm"),
    *("train/skipped", "train/consecutive_skipped"),
)


def _sampled(rollouts: Rollouts, arrays: Mapping[str, np.ndarray]) -> Sampled:
    """What `objectives.advantages` wants to know of a rollout."""
    count = len(rollouts.mask)
    return Sampled(
        scores=rollouts.scores.astype(np.float32),
        weights=rollouts.weights,
        finished=rollouts.finished,
        mask=rollouts.mask,
        logprobs=arrays.get("old_logprobs", rollouts.logprobs),
        ref_logprobs=arrays["ref_logprobs"],
        values=arrays.get("old_values", np.zeros_like(rollouts.mask)),
        last_values=arrays.get("last_values", np.zeros(count, np.float32)),
        greedy_scores=rollouts.greedy_scores.astype(np.float32),
    )


def select(values: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Takes values of target slots [R, M] to sequences [R·S, T]; 0 outside the responses."""
    rows, sequences, length = batch["slots"].shape
    taken = jnp.take_along_axis(values, batch["slots"].reshape(rows, -1), axis=1)
    taken = jnp.where(batch["mask"].reshape(rows, -1) > 0, taken, 0)
    return taken.reshape(rows * sequences, length)


_BY_SEQUENCE = (
    *("mask", "old_logprobs", "ref_logprobs", "behaviour_logprobs", "advantages", "returns"),
    *("old_values", "sequence_weights"),
)


def _sequences(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of a minibatch that are by sequence, [R, S, …] → [R·S, …]."""
    flat = {n: batch[n].reshape(-1, *batch[n].shape[2:]) for n in _BY_SEQUENCE if n in batch}
    return flat | {"kl_coefficient": batch["kl_coefficient"]}


def _policy_loss(config: ConfigDict, task: Task, params, batch, rng):
    """Also returns the policy's own scores [R, S, T], if the batch comes without."""
    statistics = TokenStatistics(*(select(x, batch) for x in task.statistics(params, batch)))
    sequences, found = _sequences(batch), []
    if "old_logprobs" not in batch:
        old, entropy = jax.lax.stop_gradient((statistics.logprobs, statistics.entropy))
        sequences["old_logprobs"] = old
        shape = batch["slots"].shape
        found.append({"old_logprobs": old.reshape(shape), "entropy": entropy.reshape(shape)})
    (total, weight), metrics = policy_objective(config, statistics, sequences)
    if task.extra_loss is None:
        return (total, weight), metrics, *found
    extra, its_metrics = task.extra_loss(params, batch)
    parts = jax.tree.map(lambda x: jnp.reshape(x, 1), ((total, weight), extra))
    finish = functools.partial(_mixed, config)
    sums, loss = finish(parts, batch)
    return Coupled(sums, parts, finish), metrics | its_metrics | loss, *found


def _mixed(config: ConfigDict, parts: Any, batch: Any):
    """The policy's loss and, in the coefficient's share, the mean of the extra one."""
    (total, weight), extra = jax.tree.map(jnp.sum, parts)
    mixed = total + config.loss.ptx_coefficient * mean(extra) * weight, weight
    return mixed, {"loss": mixed}


def _value_loss(config: ConfigDict, task: Task, params, batch, rng):
    assert task.values is not None
    values, _ = task.values(params, batch)
    return value_objective(config, select(values, batch), _sequences(batch))


def _score(task: Task, params, reference, batch) -> dict[str, jax.Array]:
    """[R, S, T] of the function that trains: before the first update the ratio is exactly 1.

    Without `params` of the reference only.
    """
    shape, found = batch["slots"].shape, {}
    if params is not None:
        ours = task.statistics(params, batch)
        found = {"old_logprobs": ours.logprobs, "entropy": ours.entropy}
    found["ref_logprobs"] = task.statistics(reference, batch).logprobs
    return {name: select(x, batch).reshape(shape) for name, x in found.items()}


def _values(task: Task, params, batch) -> dict[str, jax.Array]:
    assert task.values is not None
    values, after = task.values(params, batch)
    return {
        "old_values": select(values, batch).reshape(batch["slots"].shape),
        "last_values": after.reshape(batch["members"].shape),
    }


def _parts(rows: Arrays, count: int) -> Iterator[Arrays]:
    """Consecutive parts of the size of a minibatch, so that all are compiled once."""
    size = len(rows["members"]) // count
    for start in range(0, size * count, size):
        yield {name: x[start : start + size] for name, x in rows.items()}


def _unpack(parts: list[Arrays], found: list[Any]) -> dict[str, np.ndarray]:
    """Arrays of rows [R, S, …] in the order of the rollout: [N, …]."""
    members = np.concatenate([part["members"] for part in parts])
    real = members >= 0
    order = np.argsort(members[real], kind="stable")
    whole = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(found))
    return {name: x[real][order] for name, x in whole.items()}


def _trainable(rollouts: Rollouts, arrays: Mapping[str, np.ndarray], coefficient: float) -> Arrays:
    """The rows with everything a loss wants, [N, …] put back where its sequence lies."""
    members = rollouts.rows["members"]
    real = members >= 0
    rows = dict(rollouts.rows)
    wanted = ("old_logprobs", "ref_logprobs", "behaviour_logprobs", "advantages", "returns")
    for name in (*wanted, "old_values"):
        if name in arrays:
            values = np.asarray(arrays[name], np.float32)
            rows[name] = np.where(real[..., None], values[members], 0)
    rows["sequence_weights"] = np.where(real, rollouts.weights[members], 0)
    rows["kl_coefficient"] = np.full(len(members), coefficient, np.float32)
    return rows


def minibatches(config: ConfigDict, real: Any, number: int) -> Iterator[np.ndarray]:
    """Row indices of every minibatch of every epoch: a function of (seed, iteration, epoch).

    `real` [R] tells rows from padding: the real ones are dealt out evenly.
    """
    count = config.train.minibatches
    for epoch in range(config.train.epochs):
        bits = random_bits(range(len(real)), config.seed, number, epoch)
        order = np.lexsort((bits, ~real)) if count > 1 else np.arange(len(real))
        yield from order.reshape(-1, count).T


def _check_version(config: ConfigDict, version: int, number: int, update: int) -> None:
    """Samples of another iteration, or too many updates old, are refused."""
    stale = (number - version) * config.train.epochs * config.train.minibatches + update
    if config.rollout.max_staleness and stale > config.rollout.max_staleness:
        raise UserError(
            f"iteration {number + 1}: samples of iteration {version + 1} are {stale} updates old, "
            f"over rollout.max_staleness = {config.rollout.max_staleness}"
        )


def _check_ratio(deviation, dtype: str) -> None:
    if not float(deviation) <= RATIO_TOLERANCE[dtype]:
        raise UserError(
            "before its first update the policy's ratio to itself is off 1 by "
            f"{float(deviation):.1e}, over {RATIO_TOLERANCE[dtype]:.0e} for {dtype}: the function "
            "that trains is not the one that scored the samples (dropout, another precision, other "
            "positions?)"
        )


def _check_start(arrays: Mapping[str, np.ndarray], mask: np.ndarray, dtype: str) -> None:
    apart = np.abs(np.where(mask > 0, arrays["old_logprobs"] - arrays["ref_logprobs"], 0)).max()
    if not apart <= RATIO_TOLERANCE[dtype]:
        raise UserError(
            f"the policy starts as its reference, yet their log-probs differ by up to {apart:.1e}, "
            f"over {RATIO_TOLERANCE[dtype]:.0e} for {dtype}: KL would not start at 0"
        )


def _some_rows(rows: Arrays, config: ConfigDict, number: int) -> Arrays:
    """`kl.exact_rows` rows by chance: packing has put the longest first."""
    real = np.flatnonzero((rows["members"] >= 0).any(1))
    bits = random_bits(range(len(real)), config.seed, number, config.train.epochs)
    chosen = real[np.argsort(bits, kind="stable")][: config.kl.exact_rows]
    return {name: x[chosen] for name, x in rows.items()}


def _by_sequence(divergence: jax.Array, rows: Arrays) -> tuple[float, float]:
    """Full-vocabulary KL [R, M] summed over targets, a sequence, and how many these are."""
    total = (np.asarray(divergence) * (rows["weights"] > 0)).sum()
    count = float((rows["members"] >= 0).sum())
    return float(total / count), count


def _mismatch(arrays: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """How far the sampler's log-probs are from those of the function that trains, with weights."""
    gap = np.where(mask > 0, arrays["old_logprobs"] - arrays["behaviour_logprobs"], 0)
    tokens = float(mask.sum())
    return {
        "rollout/logprob_difference": (float(np.abs(gap).max()), 1.0),
        "rollout/logprob_difference_mean": (float(np.abs(gap).sum() / tokens), tokens),
        "rollout/kl_k3": (float((np.expm1(gap) - gap).sum() / tokens), tokens),
        "rollout/ratio_max": (float(np.exp(gap.max())), 1.0),
        "objective/entropy": (float((arrays["entropy"] * mask).sum() / max(len(mask), 1)), 1.0),
    }


def over_updates(taken: Sequence[Metrics]) -> dict[str, tuple[float, float]]:
    """(value, weight) of an iteration's updates: means over what they counted, the most of maxima.

    Updates in which nothing counts, minibatches of padding or of masked answers, have no share.
    Skips, rate and parameters are those after the last update; train/updates is their number.
    """
    updates = [weighted(metrics) for metrics in jax.device_get(taken)]
    counted = [update for update in updates if update["train/weight"][0] != 0]
    found = {"train/updates": (float(len(updates)), 1.0)}
    for name in taken[0]:
        if name.endswith(("skipped", "param_norm", "learning_rate")):
            found[name] = updates[-1][name]
            continue
        largest = name.endswith(("_max", "_deviation"))
        of = counted if largest or name.endswith(("_norm", "train/weight")) else updates
        values, weights = np.array([update[name] for update in of] or [(0.0, 0.0)]).T
        total = float(weights.sum())
        if largest:
            value = float(values.max(initial=-np.inf, where=weights != 0))
        else:
            value = float((values * weights).sum() / (total or 1))
        found[name] = value, total
    return found


def _controlled(config: ConfigDict, coefficient: jax.Array, kl: float, count: float) -> jax.Array:
    """Ziegler's controller, or the coefficient as it is where no target is set."""
    if not config.kl.target:
        return coefficient
    return adaptive_coefficient(
        coefficient,
        jnp.float32(kl),
        target=config.kl.target,
        horizon=config.kl.horizon,
        count=round(count),
    )
