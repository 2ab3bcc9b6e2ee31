"""Losses: pure functions over arrays that return (sum, weight); below the rest of the package."""

from rlhf_jax.losses.advantages import (
    gae,
    group_advantages,
    remax,
    reward_to_go,
    whiten,
    zero_variance,
)
from rlhf_jax.losses.cross_entropy import (
    TokenStatistics,
    cross_entropy,
    token_cross_entropy,
    token_statistics,
)
from rlhf_jax.losses.policy import (
    AGGREGATIONS,
    OBJECTIVES,
    Tokens,
    aggregate,
    importance_weights,
    kl_loss,
    make_objective,
    policy_loss,
    value_loss,
)
from rlhf_jax.losses.preference import (
    LOSSES,
    kto_baseline,
    preference_loss,
    unpaired_kto,
)
from rlhf_jax.losses.reductions import Reduction, add, mean, segment_logprobs, weighted_sum
from rlhf_jax.losses.reward import bradley_terry, plackett_luce, pointwise_logistic
from rlhf_jax.losses.shaping import (
    ESTIMATORS,
    adaptive_coefficient,
    exact_kl,
    kl_estimate,
    missing_eos,
    overlong_penalty,
    token_rewards,
)

__all__ = [
    "AGGREGATIONS",
    "ESTIMATORS",
    "LOSSES",
    "OBJECTIVES",
    "Reduction",
    "TokenStatistics",
    "Tokens",
    "adaptive_coefficient",
    "add",
    "aggregate",
    "bradley_terry",
    "cross_entropy",
    "exact_kl",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "kl_loss",
    "kto_baseline",
    "make_objective",
    "mean",
    "missing_eos",
    "overlong_penalty",
    "plackett_luce",
    "pointwise_logistic",
    "policy_loss",
    "preference_loss",
    "remax",
    "reward_to_go",
    "segment_logprobs",
    "token_cross_entropy",
    "token_rewards",
    "token_statistics",
    "unpaired_kto",
    "value_loss",
    "weighted_sum",
    "whiten",
    "zero_variance",
]
