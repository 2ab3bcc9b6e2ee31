"""Shaping: from scores of whole responses, and the KL to a reference, to rewards of tokens.

Layout: [N, T] is N sampled sequences of T response slots, mask nonzero on the real tokens; [N] is
one number per sequence. Masked slots are ignored, even a NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_choice, check_rank, check_same_shape
from rlhf_jax.losses.reductions import at_least_f32, keep_weighted

ESTIMATORS = ("k1", "k2", "k3")
EOS_MODES = ("none", "subtract", "replace")


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: str) -> jax.Array:
    """Estimates KL(π‖ref) from samples of π, elementwise on l = log π and r = log ref:

    "k1" = l − r, "k2" = ½(l − r)², "k3" = exp(r − l) − 1 − (r − l).

    http://joschu.net/blog/kl-approx.html. The values of k1 and k3 are unbiased. Their gradients are
    another matter: see `kl_loss`.

    Args:
      logprobs, ref_logprobs: nats, one shape: of tokens, or summed over responses.
      kind: one of ESTIMATORS.

    Returns:
      The same shape, nats.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_choice("kind", kind, ESTIMATORS)
    dtype = at_least_f32(logprobs, ref_logprobs)
    difference = logprobs.astype(dtype) - ref_logprobs.astype(dtype)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    return jnp.expm1(-difference) + difference


def exact_kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """KL(p‖q) = Σ_v p_v·(log p_v − log q_v) of two softmaxes over the last axis, in nats.

    Args:
      logits, ref_logits: [..., V]; −inf = a token that cannot be.

    Returns:
      [...]; inf where p gives a token that q cannot.
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    dtype = at_least_f32(logits, ref_logits)
    logp = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    logq = jax.nn.log_softmax(ref_logits.astype(dtype), axis=-1)
    possible = logp > -jnp.inf
    logp, logq = jnp.where(possible, logp, 0), jnp.where(possible, logq, 0)
    return jnp.sum(jnp.where(possible, jnp.exp(logp), 0) * (logp - logq), axis=-1)


def token_rewards(
    scores: jax.Array,
    mask: jax.Array,
    kl: jax.Array | None = None,
    *,
    coefficient: float | jax.Array = 0.0,
) -> jax.Array:
    """Rewards of tokens: −β·kl_t on every real token, plus the score on the last one.

    Args:
      scores: [N]; that of a row without a token is dropped. mask: [N, T].
      kl: [N, T] nats (see `kl_estimate`), or None for no penalty.
      coefficient: β, scalar.

    Returns:
      [N, T] in units of the scores. No gradient flows through it.
    """
    check_rank("mask", mask, 2)
    check_same_shape(scores=scores, first_slots=mask[:, 0])
    check_same_shape(mask=mask, kl=kl)
    real, count = mask != 0, mask.shape[1]
    (scores,) = keep_weighted(jnp.any(real, axis=1), scores)
    last = count - 1 - jnp.argmax(real[:, ::-1], axis=1)
    rewards = jnp.where(jnp.arange(count) == last[:, None], scores[:, None], 0)
    if kl is not None:
        (kl,) = keep_weighted(mask, kl)
        rewards = rewards - coefficient * kl
    return jax.lax.stop_gradient(rewards)


def missing_eos(scores: jax.Array, finished: jax.Array, *, mode: str, penalty: float) -> jax.Array:
    """Scores of responses that were cut off before their EOS: s − penalty, or −penalty.

    Args:
      scores: [N]. finished: [N] bool, the response ended by itself.
      mode: "subtract", "replace", or "none", which leaves them.
      penalty: in units of the scores, positive to punish.

    Returns:
      [N].
    """
    check_rank("scores", scores, 1)
    check_same_shape(scores=scores, finished=finished)
    check_choice("mode", mode, EOS_MODES)
    if mode == "none":
        return scores
    punished = scores - penalty if mode == "subtract" else jnp.full_like(scores, -penalty)
    return jnp.where(finished, scores, punished)


def overlong_penalty(lengths: jax.Array, *, limit: int, buffer: int) -> jax.Array:
    """DAPO's soft punishment of length: clip((limit − buffer − |y|) / buffer, −1, 0).

    https://arxiv.org/abs/2503.14476. To be added to scores.

    Args:
      lengths: [N] tokens. limit: the length from which on it is −1. buffer: the tokens over which
        it gets there.

    Returns:
      [N] in [−1, 0].
    """
    check_rank("lengths", lengths, 1)
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer must be in (0, limit], got {buffer}")
    return jnp.clip((limit - buffer - lengths) / buffer, -1, 0)


def adaptive_coefficient(
    coefficient: float | jax.Array,
    kl: float | jax.Array,
    *,
    target: float,
    horizon: float,
    count: int,
) -> jax.Array:
    """The next KL coefficient: β·(1 + e·count/horizon), e = clip(kl/target − 1, −0.2, 0.2).

    "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593.

    Args:
      coefficient: β. kl: measured, the mean over sequences of the sum over tokens, nats.
      target: the KL to hold, nats. count: sequences since the last call. horizon: sequences.
    """
    if target <= 0:
        raise ValueError(f"target must be in (0, inf), got {target}")
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * count / horizon)


def lagrange_multiplier(
    multiplier: float | jax.Array, cost: float | jax.Array, *, limit: float, rate: float
) -> jax.Array:
    """The next price of a cost that is to stay below a limit: max(0, λ + η·(cost − limit)).

    The step of projected gradient ascent on the dual of max E[score] with E[cost] ≤ limit:
    "Safe RLHF", https://arxiv.org/abs/2310.12773, which ascends log λ.

    Args:
      multiplier: λ, in units of the score per unit of cost.
      cost: the mean over episodes, each one's whole cost. limit: of that mean.
      rate: η.
    """
    return jnp.maximum(0, multiplier + rate * (cost - limit))
