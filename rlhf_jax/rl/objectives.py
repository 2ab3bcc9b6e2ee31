"""From scores to advantages, and from advantages to a loss: the losses put together by a config.

Arrays are [N, T]: N sampled sequences, the samples of a prompt together, T response slots. What a
field of the config means stands in `rl/options.py`, its equation in `losses/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.losses.advantages import (
    gae,
    group_advantages,
    remax,
    reward_to_go,
    whiten,
    zero_variance,
)
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.policy import (
    Objective,
    Tokens,
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
from rlhf_jax.own_code import load_function
from rlhf_jax.rl.layout import Array, Rollout
from rlhf_jax.training.metrics import Metrics

PLACEMENTS = ("reward", "loss", "none")


def shape_scores(config: Config, rollout: Rollout) -> jax.Array:
    """[N] scores after what is taken off for costs, for missing ends and for too many tokens."""
    options, scores = config.rollout, jnp.asarray(rollout.scores, jnp.float32)
    if rollout.charges is not None:
        scores = scores - jnp.asarray(rollout.charges, jnp.float32)
    scores = missing_eos(
        scores,
        rollout.finished,
        mode=options.missing_eos,
        penalty=options.missing_eos_penalty,
    )
    if options.overlong_buffer:
        extents = rollout.lengths if rollout.extents is None else rollout.extents
        scores = scores + overlong_penalty(
            extents, limit=options.max_new_tokens, buffer=options.overlong_buffer
        )
    return scores


def _gae(config: Config, rollout: Rollout, rewards: jax.Array, mask: jax.Array):
    options = config.advantage
    bootstrap = jnp.where(rollout.finished, 0, rollout.last_values) if options.bootstrap else None
    values = rollout.old_values
    return gae(rewards, values, mask, gamma=options.gamma, lam=options.lam, bootstrap=bootstrap)


def _reward_to_go(config: Config, rollout: Rollout, rewards: jax.Array, mask: jax.Array):
    returns = reward_to_go(rewards, mask, gamma=config.advantage.gamma)
    return returns, returns


def _group(config: Config, rollout: Rollout, rewards: jax.Array, mask: jax.Array):
    options = config.advantage
    groups = _totals(config, rollout, rewards)
    per_sequence = group_advantages(
        groups,
        mask=rollout.weights.reshape(groups.shape),
        baseline=options.baseline,
        scale=options.scale,
    )
    return per_sequence.reshape(-1, 1) * mask, reward_to_go(rewards, mask, gamma=options.gamma)


def _remax(config: Config, rollout: Rollout, rewards: jax.Array, mask: jax.Array):
    per_sequence = remax(_totals(config, rollout, rewards), rollout.greedy_scores)
    returns = reward_to_go(rewards, mask, gamma=config.advantage.gamma)
    return per_sequence.reshape(-1, 1) * mask, returns


def _totals(config: Config, rollout: Rollout, rewards: jax.Array) -> jax.Array:
    """[P, G] reward of each answer that counts, 0 for the others."""
    totals = jnp.where(rollout.weights > 0, rewards.sum(-1), 0)
    return totals.reshape(-1, config.rollout.samples)


# (config, rollout, rewards [N, T], mask [N, T]) → (advantages, returns) [N, T], by advantage.name;
# the mask is 1 on the tokens of the answers that count, whatever these weigh, else 0.
ADVANTAGES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "gae": _gae,
    "reward_to_go": _reward_to_go,
    "group": _group,
    "remax": _remax,
}


def advantages(
    config: Config, rollout: Rollout, coefficient: jax.Array
) -> tuple[dict[str, jax.Array], Metrics]:
    """Advantages and returns [N, T] of a rollout; metrics are scalars with their weights.

    With `kl.placement = "reward"` every token pays coefficient · kl, so that what is maximised is
    E[score] − coefficient · KL(π‖π_ref), whose optimum is known: π_ref · exp(score / coefficient).
    """
    options, weights = config.advantage, rollout.mask * rollout.weights[:, None]
    # Advantages tell only what counts from what is left out: the loss applies the weights.
    mask = (weights > 0).astype(weights.dtype)
    kl = None
    if config.kl.placement == "reward":
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, config.kl.estimator)
    scores, earlier = shape_scores(config, rollout), rollout.turn_rewards
    if earlier is not None:  # a part of the score, which the last token has not earned
        scores = scores - earlier.sum(-1)
    rewards = token_rewards(scores, mask, kl, coefficient=coefficient)
    if earlier is not None:
        rewards = rewards + earlier * (mask > 0)
    own = load_function(options.file, "advantage.file") if options.file else None
    result, returns = (own or ADVANTAGES[options.name])(config, rollout, rewards, mask)
    if own and not result.shape == returns.shape == mask.shape:
        shapes = f"{result.shape} and {returns.shape}"
        raise UserError(
            f"{options.file} returned the shapes {shapes} where advantages and returns of "
            f"{mask.shape} are needed"
        )
    mean = _mean(result, weights)
    metrics = {
        "advantages/mean": mean,
        "advantages/std": jnp.sqrt(_mean((result - mean) ** 2, weights)),
        "advantages/max": jnp.max(jnp.where(mask > 0, jnp.abs(result), 0)),
    }
    if options.name == "gae":
        metrics["val/explained_variance"] = _explained(rollout.old_values, returns, weights)
    if options.whiten:
        result = whiten(result, mask)
    made = {"advantages": result, "returns": returns}
    return made, Metrics.of(metrics, dict.fromkeys(metrics, weights.sum()))


def policy_objective(
    config: Config,
    objective: Objective,
    statistics: TokenStatistics,
    batch: Mapping[str, jax.Array],
) -> tuple[Reduction, dict[str, Reduction]]:
    """((total, weight), metrics) of a minibatch: the policy loss, KL term and entropy bonus.

    Args:
      objective: `config.loss.objective`.
      statistics: of the policy being trained, fields [N, T].
      batch: [N, T] mask, old_logprobs, ref_logprobs, behaviour_logprobs, advantages; [N]
        sequence_weights; [rows] kl_coefficient, one number repeated.
    """
    loss, mask, logprobs = config.loss, batch["mask"], statistics.logprobs
    coefficient = batch["kl_coefficient"][0]
    common: dict[str, Any] = {
        "constant": config.rollout.max_new_tokens if loss.aggregation == "constant" else None,
        "sequence_weights": batch["sequence_weights"],
    }
    (total, weight), metrics = policy_loss(
        objective,
        Tokens(logprobs, batch["old_logprobs"], batch["advantages"], mask),
        importance=_weigh_tokens(config, batch),
        aggregation=loss.aggregation,
        **common,
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
            old_logprobs=batch["old_logprobs"] if config.kl.importance else None,
        )
        penalty = aggregate(per_token, mask, loss.aggregation, **common)
        total = total + coefficient * penalty[0]
        metrics["loss/kl"] = penalty
    return (total, weight), metrics | {"loss": (total, weight)}


def _weigh_tokens(config: Config, batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """[N, T] corrections for the sampler's log-probs; None where nothing is corrected."""
    loss = config.loss
    if loss.importance == "none":
        return None
    return importance_weights(
        batch["old_logprobs"],
        batch["behaviour_logprobs"],
        batch["mask"],
        level=loss.importance,
        cap=loss.importance_cap,
        mode=loss.importance_mode,
    )


def value_objective(config: Config, values: jax.Array, batch: Mapping[str, jax.Array]):
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


def sample_metrics(config: Config, rollout: Rollout, coefficient: jax.Array) -> Metrics:
    """Standard names of what one looks at while a policy is trained, with what they are means of.

    Those of the completions are of everything that was sampled, the others of what counts.
    """
    weights, finished, lengths = rollout.weights, rollout.finished, rollout.lengths
    scores, everyone = shape_scores(config, rollout), jnp.ones_like(weights)
    mask = rollout.mask * weights[:, None]
    paid = coefficient * _mean(_charged_kl(config, rollout, mask), weights)
    k1, k2, k3 = (
        _mean(
            (mask * kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, kind)).sum(-1), weights
        )
        for kind in ESTIMATORS
    )
    counted, ended, all_of_them = weights.sum(), finished.sum(), 1.0
    truncated = everyone * ~finished
    shaped = _mean(scores, weights)
    pairs = {
        "objective/scores": (_mean(rollout.scores, weights), counted),
        "objective/shaped_scores": (shaped, counted),
        "objective/kl": (k1, counted),
        "objective/kl_k2": (k2, counted),
        "objective/kl_k3": (k3, counted),
        "objective/kl_coefficient": (coefficient, all_of_them),
        "objective/non_score_reward": (-paid, counted),
        "objective/rlhf_reward": (shaped - paid, counted),
        "completions/mean_length": (lengths.mean(), all_of_them),
        "completions/min_length": (lengths.min(), all_of_them),
        "completions/max_length": (lengths.max(), all_of_them),
        "completions/mean_terminated_length": (_mean(lengths, everyone * finished), ended),
        "completions/mean_truncated_length": (_mean(lengths, truncated), truncated.sum()),
        "completions/clipped_ratio": (truncated.mean(), all_of_them),
        "completions/eos_rate": (jnp.mean(finished), all_of_them),
        "completions/masked": (jnp.sum(weights == 0), all_of_them),
    }
    if config.rollout.samples > 1:
        groups = (-1, config.rollout.samples)
        valid = weights.reshape(groups)
        some = valid.sum(-1) > 0
        spread = jnp.nanstd(jnp.where(valid > 0, scores.reshape(groups), jnp.nan), axis=-1)
        pairs["reward_std"] = _mean(jnp.where(some, spread, 0), some), some.sum()
        # A group that is left out whole is one without spread, unless the rollout knows better.
        same = zero_variance(scores.reshape(groups), valid)
        pairs["frac_reward_zero_std"] = same.mean(), all_of_them
    values = {name: value for name, (value, _) in pairs.items()}
    return Metrics.of(values, {name: weight for name, (_, weight) in pairs.items()})


def _charged_kl(config: Config, rollout: Rollout, mask: Array) -> jax.Array:
    """[N] nats that each answer pays for in the reward or the loss; zeros where nothing is paid."""
    kl = config.kl
    if kl.placement == "none":
        return jnp.zeros(len(mask))
    level = kl.level if kl.placement == "loss" else "token"
    logprobs = rollout.old_logprobs, rollout.ref_logprobs
    return kl_loss(*logprobs, mask, estimator=kl.estimator, level=level).sum(-1)


def _mean(values: Array, weights: Array) -> jax.Array:
    weight = weights.sum()
    return jnp.where(weights > 0, values * weights, 0).sum() / jnp.where(weight > 0, weight, 1)


def _explained(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 − Var(returns − values) / Var(returns); 0 where returns do not vary."""
    error = returns - values
    variance = _mean((returns - _mean(returns, mask)) ** 2, mask)
    left = _mean((error - _mean(error, mask)) ** 2, mask)
    return jnp.where(variance > 0, 1 - left / jnp.where(variance > 0, variance, 1), 0)
