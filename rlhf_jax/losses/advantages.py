"""Advantages: from rewards and scores to the factor of each token's or sample's log-prob.

Layouts: [N, T] is N sampled sequences of T response slots, mask nonzero on the real tokens (0 on
padding, and on tool tokens in the middle); [P, G] is P prompts with G samples each. Slots of mask 0
are 0 in every result and are ignored, even a NaN.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_choice, check_rank, check_same_shape
from rlhf_jax.losses.reductions import at_least_f32, keep_weighted

BASELINES = ("none", "mean", "leave_one_out")
SCALES = ("none", "group", "batch")
SCALE_EPS = 1e-4  # added to a standard deviation of scores


def reward_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0) -> jax.Array:
    """Discounted sum of a token's own and all later rewards: G_t = r_t + γ·G_{t+1}.

    t counts real tokens: a masked slot in between is stepped over and discounts nothing.

    Args:
      rewards, mask: [N, T].

    Returns:
      [N, T] in units of the rewards.
    """
    advantages, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation: δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}.

    https://arxiv.org/abs/1506.02438. V_t is the value of the state before token t. t counts real
    tokens: V_{t+1} and A_{t+1} are carried through masked slots. λ = 1 is reward-to-go minus V.

    Args:
      rewards, values, mask: [N, T]. A reward on a masked slot is ignored: see `token_rewards`.
      bootstrap: [N], the value of the state after the last token, for responses cut off before
        their end; None = 0, the end.

    Returns:
      (advantages, returns), [N, T] both; returns = advantages + values.
    """
    check_rank("rewards", rewards, 2)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = keep_weighted(mask, rewards, values)
    zero = jnp.zeros(rewards.shape[0], at_least_f32(rewards, values))
    if bootstrap is not None:
        check_same_shape(bootstrap=bootstrap, first_rewards=rewards[:, 0])

    def step(carry, slot):
        next_value, next_advantage = carry
        reward, value, real = slot
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (
            jnp.where(real, value, next_value).astype(zero.dtype),
            jnp.where(real, advantage, next_advantage).astype(zero.dtype),
        )
        return carry, jnp.where(real, advantage, 0)

    start = (zero if bootstrap is None else bootstrap.astype(zero.dtype), zero)
    slots = (rewards.T, values.T, (mask != 0).T)
    _, advantages = jax.lax.scan(step, start, slots, reverse=True)
    return advantages.T, advantages.T + values


def group_advantages(
    scores: jax.Array,
    *,
    mask: jax.Array | None = None,
    baseline: str = "mean",
    scale: str = "none",
) -> jax.Array:
    """Advantages of samples among those of the same prompt: A_i = (s_i − b_i) / (σ + 1e-4).

    baseline/scale of the methods: REINFORCE none/none, RLOO leave_one_out/none
    (https://arxiv.org/abs/2402.14740), GRPO mean/group (https://arxiv.org/abs/2402.03300), Dr. GRPO
    mean/none (https://arxiv.org/abs/2503.20783).

    The mean holds the sample itself, so E[(s_i − mean)·∇log π] is (G−1)/G of the true gradient:
    "mean" shrinks it by (G−1)/G and "leave_one_out" = G/(G−1)·"mean" does not. Any scale weighs
    prompts differently: its gradient is that of another objective.

    Args:
      scores: [P, G]. mask: [P, G], nonzero = a valid score; None if all are.
      baseline: b_i: 0, the mean of the group, or the mean of the others in it.
      scale: σ: 1 (and nothing added), the standard deviation of the group's scores, or of all
        scores; of the variance Σ(s − mean)² / (count − 1), 0 for a single score.

    Returns:
      [P, G]. A group whose scores are all equal (or a single one) gives exactly 0, except with
      baseline "none" and a scale other than "group".
    """
    check_rank("scores", scores, 2)
    check_same_shape(scores=scores, mask=mask)
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    valid = jnp.ones(scores.shape, bool) if mask is None else mask != 0
    (scores,) = keep_weighted(valid, scores)
    count = jnp.sum(valid, axis=1, keepdims=True)
    centered, std = _standardise(scores, valid, axis=1)
    if baseline == "none":
        advantages = scores
    elif baseline == "mean":
        advantages = centered
    else:
        advantages = centered * count / jnp.maximum(count - 1, 1)
    if scale == "group":
        flat = zero_variance(scores, valid)[:, None]
        advantages = jnp.where(flat, 0, advantages / (std + SCALE_EPS))
    elif scale == "batch":
        _, std = _standardise(scores, valid, axis=None)
        advantages = advantages / (std + SCALE_EPS)
    return jnp.where(valid, advantages, 0)


def zero_variance(scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """True where a prompt's valid scores do not differ, so that it teaches nothing: [P, G] → [P].

    Also for a single valid score, and none.
    """
    check_rank("scores", scores, 2)
    check_same_shape(scores=scores, mask=mask)
    valid = jnp.ones(scores.shape, bool) if mask is None else mask != 0
    high = jnp.max(scores, axis=1, initial=-jnp.inf, where=valid)
    low = jnp.min(scores, axis=1, initial=jnp.inf, where=valid)
    return high <= low


def remax(scores: jax.Array, greedy_scores: jax.Array) -> jax.Array:
    """ReMax: A_i = s_i − s(greedy response). https://arxiv.org/abs/2310.10505.

    Args:
      scores: [P, G]. greedy_scores: [P].
    """
    check_rank("scores", scores, 2)
    check_same_shape(greedy_scores=greedy_scores, first_scores=scores[:, 0])
    dtype = at_least_f32(scores, greedy_scores)
    return scores.astype(dtype) - greedy_scores.astype(dtype)[:, None]


def whiten(values: jax.Array, mask: jax.Array) -> jax.Array:
    """(x − mean)·rsqrt(var + 1e-8) over all real slots, var = Σ(x − mean)² / (count − 1).

    Args:
      values, mask: one shape, any rank.

    Returns:
      The shape of values. Equal values give exactly 0.
    """
    check_same_shape(values=values, mask=mask)
    (values,) = keep_weighted(mask, values)
    centered, std = _standardise(values, mask != 0, axis=None, eps=1e-8)
    return jnp.where(mask != 0, centered / std, 0)


def _standardise(
    values: jax.Array, valid: jax.Array, *, axis: int | None, eps: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(x − mean, sqrt(var + eps)) over the valid values along `axis`, or all of them."""
    total = partial(jnp.sum, axis=axis, keepdims=True, where=valid)
    # Relative to the least value, equal values are exact zeros: no rounding of their mean is left
    # for a small standard deviation to blow up.
    least = jnp.min(
        jax.lax.stop_gradient(values), axis=axis, keepdims=True, where=valid, initial=jnp.inf
    )
    relative = values - jnp.where(jnp.isinf(least), 0, least)
    count = total(jnp.ones_like(values))
    centered = relative - total(relative) / jnp.maximum(count, 1)
    variance = total(centered**2) / jnp.maximum(count - 1, 1) + eps
    positive = variance > 0
    return centered, jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
