"""Losses of reward models: from scores of responses to the likelihood of human judgements."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_rank, check_same_shape
from rlhf_jax.losses.reductions import Reduction, keep_weighted, weighted_sums

Loss = tuple[Reduction, dict[str, Reduction]]


def bradley_terry(
    chosen: jax.Array,
    rejected: jax.Array,
    weights: jax.Array,
    *,
    centering: float = 0.0,
    votes: jax.Array | None = None,
) -> Loss:
    """Pairwise loss: −log σ(r_c − r_r) + centering·(r_c + r_r)².

    Where who chose is known, the first term is −log of how likely that person was to choose so,

        (1 − lapses) · σ(scale · (r_c − r_r) + bias) + lapses / 2,

    so that the scores don't learn the person's bias: labelers/likelihood.py.

    "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325; centering keeps
    scores around 0, which the first term leaves free ("Helping or Herding?",
    https://arxiv.org/abs/2312.09244; 1e-2).

    Args:
      chosen, rejected: [N] scores. weights: [N], 0 = no pair (ignored, whatever its scores).
      votes: [N, 3] the scale, bias (nats, for the chosen one) and lapses of who chose, or None.

    Returns:
      (total, weight) in nats and pairs; metrics loss and
      rewards/{chosen,rejected,margins,accuracies} (a tie counts ½).
    """
    check_rank("chosen", chosen, 1)
    check_same_shape(chosen=chosen, rejected=rejected, weights=weights)
    chosen, rejected = keep_weighted(weights, chosen, rejected)
    gap = chosen - rejected
    loss = -jax.nn.log_sigmoid(gap) if votes is None else _vote_loss(gap, votes)
    loss += centering * (chosen + rejected) ** 2
    metrics = {
        "loss": loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": gap,
        "rewards/accuracies": pair_accuracy(gap),
    }
    return weighted_sums(metrics, weights)


def _vote_loss(gap: jax.Array, votes: jax.Array) -> jax.Array:
    """−log((1 − lapses) · σ(scale · gap + bias) + lapses / 2), of [N] and [N, 3]; finite in f32."""
    scale, bias, lapses = votes[:, 0], votes[:, 1], jnp.clip(votes[:, 2], 1e-6, 1 - 1e-6)
    looked = jnp.log1p(-lapses) + jax.nn.log_sigmoid(scale * gap + bias)
    return -jnp.logaddexp(looked, jnp.log(lapses / 2))


def pointwise_logistic(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Loss:
    """Binary cross-entropy of single judgements: −y·log σ(s) − (1−y)·log σ(−s).

    Args:
      scores: [N]. labels: [N] in [0, 1], the probability that the response is good.
      weights: [N], 0 = no response (ignored, whatever its score).

    Returns:
      (total, weight) in nats and responses; metrics loss, rewards/mean and rewards/accuracies
      (the score has the sign of y − ½).
    """
    check_rank("scores", scores, 1)
    check_same_shape(scores=scores, labels=labels, weights=weights)
    scores, labels = keep_weighted(weights, scores, labels)
    good, bad = jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)
    metrics = {
        "loss": -labels * good - (1 - labels) * bad,
        "rewards/mean": scores,
        "rewards/accuracies": pair_accuracy(scores * (2 * labels - 1)),
    }
    return weighted_sums(metrics, weights)


def pair_accuracy(gap: jax.Array) -> jax.Array:
    """1 where chosen − rejected > 0, ½ for a tie, 0 below."""
    return (1 + jnp.sign(gap)) / 2
