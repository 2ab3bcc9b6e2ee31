"""Losses: pure functions over arrays that return (sum, weight); below the rest of the package."""

from rlhf_jax.losses.cross_entropy import (
    TokenStatistics,
    token_cross_entropy,
    token_statistics,
)
from rlhf_jax.losses.preference import (
    BATCHWISE,
    LOSSES,
    REFERENCE_FREE,
    kto_baseline,
    loss_options,
    preference_loss,
)
from rlhf_jax.losses.reductions import Reduction, add, mean, segment_logprobs, weighted_sum
from rlhf_jax.losses.reward import bradley_terry, plackett_luce, pointwise_logistic

__all__ = [
    "BATCHWISE",
    "LOSSES",
    "REFERENCE_FREE",
    "Reduction",
    "TokenStatistics",
    "add",
    "bradley_terry",
    "kto_baseline",
    "loss_options",
    "mean",
    "plackett_luce",
    "pointwise_logistic",
    "preference_loss",
    "segment_logprobs",
    "token_cross_entropy",
    "token_statistics",
    "weighted_sum",
]
