"""From scores to advantages, and from advantages to a loss: the losses put together by a config.

Arrays are [N, T]: N sampled sequences, the samples of a prompt together, T response slots. What a
field of the config means stands in `stages/defaults.py`, its equation in `losses/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax.errors import UserError
from rlhf_jax.losses.advantages import (
    gae,
    group_advantages,
    remax,
    reward_to_go,
    whiten,
    zero_variance,
)
from rlhf_jax.losses.checks import check_choice
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.policy import (
    aggregate,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from rlhf_jax.losses.reductions import Reduction
from rlhf_jax.losses.shaping import (
    ESTIMATORS,
    kl_estimate,
    missing_eos,
    overlong_penalty,
    token_rewards,
)
from rlhf_jax.training.metrics import Metrics

ADVANTAGES = ("gae", "reward_to_go", "group", "remax")
PLACEMENTS = ("reward", "loss", "none")
Array = Any  # on the host or a device


class Sampled(NamedTuple):
    """What was sampled and what is known of it before the first update."""

    scores: Array  # [N]
    weights: Array  # [N], 0 = a sequence that is left out
    finished: Array  # [N] bool, ended by itself
    mask: Array  # [N, T], 1 on response tokens, EOS included
    logprobs: Array  # [N, T] nats, of the policy that sampled, by the function that trains
    ref_logprobs: Array  # [N, T] nats
    values: Array  # [N, T], of the state before each token; 0 without a critic
    last_values: Array  # [N], of the state after the last token
    greedy_scores: Array  # [N / G], of the greedy answer to each prompt, for ReMax


def parse_options(spec: str) -> dict[str, Any]:
    """ "gamma=1.6,divergence=js" → {"gamma": 1.6, "divergence": "js"}.

    Raises:
      UserError: a part is not name=value, or a number is negative or not finite.
    """
    options: dict[str, Any] = {}
    for part in filter(None, spec.split(",")):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            raise UserError(f"loss.options: {part!r} is not name=value")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
            continue
        if not 0 <= options[name] < math.inf:
            raise UserError(f"loss.options: {part!r} is not a finite number of 0 or more")
    return options


def shape_scores(config: ConfigDict, scores: Array, finished: Array, lengths: Array) -> jax.Array:
    """[N] scores after what is taken off for answers that did not end or grew too long."""
    rollout = config.rollout
    scores = missing_eos(
        scores, finished, mode=rollout.missing_eos, penalty=rollout.missing_eos_penalty
    )
    if rollout.overlong_buffer:
        scores = scores + overlong_penalty(
            lengths, limit=rollout.max_new_tokens, buffer=rollout.overlong_buffer
        )
    return scores


def advantages(
    config: ConfigDict, sampled: Sampled, coefficient: jax.Array
) -> tuple[dict[str, jax.Array], Metrics]:
    """Advantages and returns [N, T] of what was sampled; metrics are scalars with their weights.

    With `kl.placement = "reward"` every token pays coefficient · kl, so that what is maximised is
    E[score] − coefficient · KL(π‖π_ref), whose optimum is known: π_ref · exp(score / coefficient).
    """
    check_choice("kl.placement", config.kl.placement, PLACEMENTS)
    check_choice("advantage.name", config.advantage.name, ADVANTAGES)
    options, mask = config.advantage, sampled.mask * sampled.weights[:, None]
    scores = shape_scores(config, sampled.scores, sampled.finished, sampled.mask.sum(-1))
    kl = kl_estimate(sampled.logprobs, sampled.ref_logprobs, config.kl.estimator)
    kl = jnp.where(mask > 0, kl, 0)
    paid = coefficient if config.kl.placement == "reward" else jnp.zeros_like(coefficient)
    rewards = token_rewards(scores, mask, kl, coefficient=paid)
    totals = jnp.where(sampled.weights > 0, rewards.sum(-1), 0)
    groups = totals.reshape(-1, config.rollout.samples)
    returns = reward_to_go(rewards, mask, gamma=options.gamma)
    match options.name:
        case "gae":
            bootstrap = jnp.where(sampled.finished, 0, sampled.last_values)
            result, returns = gae(
                rewards,
                sampled.values,
                mask,
                gamma=options.gamma,
                lam=options.lam,
                bootstrap=bootstrap if options.bootstrap else None,
            )
        case "reward_to_go":
            result = returns
        case "group":
            per_sequence = group_advantages(
                groups,
                mask=sampled.weights.reshape(groups.shape),
                baseline=options.baseline,
                scale=options.scale,
                ddof=options.ddof,
                eps=options.eps,
            )
            result = per_sequence.reshape(-1, 1) * mask
        case "remax":
            result = remax(groups, sampled.greedy_scores).reshape(-1, 1) * mask
    metrics = _sampled_metrics(config, sampled, scores, coefficient)
    metrics |= _moments("advantages", result, mask)
    if options.name == "gae":
        metrics["val/explained_variance"] = _explained(sampled.values, returns, mask)
    if options.whiten:
        result = whiten(result, mask, ddof=int(options.ddof))
    made = {"advantages": result, "returns": returns}
    return made, Metrics.of(metrics, _counts(config, sampled, metrics))


def policy_objective(
    config: ConfigDict, statistics: TokenStatistics, batch: Mapping[str, jax.Array]
) -> tuple[Reduction, dict[str, Reduction]]:
    """((total, weight), metrics) of a minibatch: the policy loss, KL term and entropy bonus.

    Args:
        statistics: of the policy being trained, fields [N, T].
        batch: [N, T] mask, old_logprobs, ref_logprobs, behaviour_logprobs, advantages; [N]
            sequence_weights; [rows] kl_coefficient, one number repeated.
    """
    check_choice("kl.placement", config.kl.placement, PLACEMENTS)
    loss, mask, logprobs = config.loss, batch["mask"], statistics.logprobs
    coefficient = batch["kl_coefficient"][0]
    common: dict[str, Any] = {
        "constant": config.rollout.max_new_tokens if loss.aggregation == "constant" else None,
        "sequence_weights": batch["sequence_weights"],
    }
    importance = None
    if loss.importance != "none":
        importance = importance_weights(
            batch["old_logprobs"],
            batch["behaviour_logprobs"],
            mask,
            level=loss.importance,
            cap=loss.importance_cap,
            mode=loss.importance_mode,
        )
    (total, weight), metrics = policy_loss(
        loss.name,
        logprobs,
        batch["old_logprobs"],
        batch["advantages"],
        mask,
        importance=importance,
        aggregation=loss.aggregation,
        **common,
        **parse_options(loss.options),
    )
    metrics["loss/policy_avg"] = metrics.pop("loss")
    used = mask * batch["sequence_weights"][:, None] > 0
    ratio = jnp.exp(jnp.where(used, logprobs - batch["old_logprobs"], 0))
    some = jnp.any(used)
    metrics["policy/ratio_max"] = jnp.max(jnp.where(used, ratio, 0)), some
    metrics["policy/ratio_deviation"] = jnp.max(jnp.abs(ratio - 1)), some

    entropy = aggregate(statistics.entropy, mask, loss.aggregation, **common)
    metrics["policy/entropy"] = aggregate(
        statistics.entropy, mask, "token_mean", sequence_weights=batch["sequence_weights"]
    )
    total = total - loss.entropy_coefficient * entropy[0]
    if config.kl.placement == "loss":
        per_token = kl_loss(
            logprobs,
            batch["ref_logprobs"],
            mask,
            estimator=config.kl.estimator,
            level=config.kl.level,
            importance=jnp.exp(logprobs - jax.lax.stop_gradient(batch["old_logprobs"]))
            if config.kl.importance
            else None,
        )
        penalty = aggregate(per_token, mask, loss.aggregation, **common)
        total = total + coefficient * penalty[0]
        metrics["loss/kl"] = penalty
    return (total, weight), metrics | {"loss": (total, weight)}


def value_objective(config: ConfigDict, values: jax.Array, batch: Mapping[str, jax.Array]):
    """((total, weight), metrics) of the critic's values [N, T] against the returns."""
    (total, weight), metrics = value_loss(
        values,
        batch["old_values"],
        batch["returns"],
        batch["mask"],
        clip=config.critic.value_clip or None,
        sequence_weights=batch["sequence_weights"],
    )
    renamed = {
        "loss/value_avg": metrics["loss"],
        "val/mean": metrics["value/mean"],
        "loss": (total, weight),
    }
    if config.critic.value_clip:
        renamed["val/clipfrac"] = metrics["value/clipfrac"]
    return (total, weight), renamed


def _sampled_metrics(
    config: ConfigDict, sampled: Sampled, scores, coefficient
) -> dict[str, jax.Array]:
    """Standard names of what one looks at while a policy is trained."""
    weights = sampled.weights
    mask = sampled.mask * weights[:, None]
    everyone = jnp.ones_like(weights)
    lengths = sampled.mask.sum(-1)
    truncated = everyone * ~sampled.finished
    charged = 0 if config.kl.placement == "none" else coefficient
    k1, k2, k3 = (
        _mean((mask * kl_estimate(sampled.logprobs, sampled.ref_logprobs, k)).sum(-1), weights)
        for k in ESTIMATORS
    )
    metrics = {
        "objective/scores": _mean(sampled.scores, weights),
        "objective/shaped_scores": _mean(scores, weights),
        "objective/kl": k1,
        "objective/kl_k2": k2,
        "objective/kl_k3": k3,
        "objective/kl_coefficient": coefficient,
        "objective/non_score_reward": -charged * k1,
        "objective/rlhf_reward": _mean(scores, weights) - charged * k1,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": _mean(lengths, everyone * sampled.finished),
        "completions/mean_truncated_length": _mean(lengths, truncated),
        "completions/clipped_ratio": truncated.mean(),
        "completions/eos_rate": jnp.mean(sampled.finished),
        "completions/masked": jnp.sum(weights == 0),
    }
    if config.rollout.samples > 1:
        groups = (-1, config.rollout.samples)
        counted = weights.reshape(groups)
        some = counted.sum(-1) > 0
        spread = jnp.where(counted > 0, scores.reshape(groups), jnp.nan)
        deviation = jnp.where(some, jnp.nanstd(spread, axis=-1), 0)
        metrics["reward_std"] = _mean(deviation, some)
        # A group that is left out whole is one without spread, unless the rollout knows better.
        metrics["frac_reward_zero_std"] = zero_variance(scores.reshape(groups), counted).mean()
    return metrics


def _counts(config: ConfigDict, sampled: Sampled, metrics: Iterable[str]) -> dict[str, Any]:
    """What the metrics are means over, by name; 1 for those of all that was sampled."""
    tokens = (sampled.mask * sampled.weights[:, None]).sum()
    of_section = {"objective": sampled.weights.sum(), "advantages": tokens, "val": tokens}
    counts = {name: of_section.get(name.partition("/")[0], 1.0) for name in metrics}
    ended = sampled.finished.sum()
    return counts | {
        "objective/kl_coefficient": 1.0,
        "completions/mean_terminated_length": ended,
        "completions/mean_truncated_length": len(sampled.finished) - ended,
        "reward_std": sampled.weights.reshape(-1, config.rollout.samples).any(-1).sum(),
    }


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    weight = weights.sum()
    return jnp.where(weights > 0, values * weights, 0).sum() / jnp.where(weight > 0, weight, 1)


def _moments(name: str, values: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    mean = _mean(values, mask)
    variance = _mean((values - mean) ** 2, mask)
    largest = jnp.max(jnp.where(mask > 0, jnp.abs(values), 0))
    return {f"{name}/mean": mean, f"{name}/std": jnp.sqrt(variance), f"{name}/max": largest}


def _explained(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 − Var(returns − values) / Var(returns); 0 where returns do not vary."""
    error = returns - values
    variance = _mean((returns - _mean(returns, mask)) ** 2, mask)
    left = _mean((error - _mean(error, mask)) ** 2, mask)
    return jnp.where(variance > 0, 1 - left / jnp.where(variance > 0, variance, 1), 0)
