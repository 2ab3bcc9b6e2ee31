"""Advantages of scored answers: what a weight between 0 and 1 does, and what it does not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.objectives import advantages, policy_objective
from rlhf_jax.stages import defaults

WEIGHTS = (0.5, 0.5, 1, 0)
EXPECTED = {
    "reinforce": [1, 2, 3, 0],
    "dr_grpo": [-0.5, 0.5, 0, 0],  # the last one is left out, so the third is alone
    "remax": [0.5, 1.5, 1, 0],  # less the greedy answers' 0.5 and 2
}


def rollout(weights):
    """Two answers of three tokens to each of two prompts, with the scores 1, 2, 3 and 6."""
    ones, scores = np.ones((4, 3), np.float32), np.array([1, 2, 3, 6], np.float32)
    return Rollout(
        ones, 0 * ones, np.ones(4, bool), scores=scores, weights=np.asarray(weights, np.float32),
        greedy_scores=np.array([0.5, 2], np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", EXPECTED)
def test_an_answer_counts_by_its_weight_and_once(algorithm):
    config = defaults.resolve(
        defaults.on_policy(
            algorithm,
            rollout={"samples": 2, "prompts": 2, "max_new_tokens": 3},
            kl={"placement": "none"},
        )
    )

    def loss(weights):
        scored = rollout(weights)
        made, metrics = advantages(config, scored, jnp.float32(0))
        each = expected * (scored.weights > 0)
        np.testing.assert_allclose(made["advantages"], np.tile(each[:, None], 3))
        batch = {"mask": scored.mask, "sequence_weights": scored.weights, **made}
        batch |= dict.fromkeys(("old_logprobs", "ref_logprobs", "behaviour_logprobs"), zeros)
        batch["kl_coefficient"] = jnp.zeros(1)
        statistics = TokenStatistics(zeros, zeros, zeros, zeros, zeros)
        (total, _), _ = policy_objective(config, config.loss.objective, statistics, batch)
        return total, metrics["advantages/mean"]

    zeros, expected = np.zeros((4, 3)), np.array(EXPECTED[algorithm])
    halved, mean = loss(WEIGHTS)
    np.testing.assert_allclose(mean, (expected * WEIGHTS).sum() / sum(WEIGHTS), atol=1e-6)
    np.testing.assert_allclose(halved + loss((0.5, 0.5, 0, 0))[0], loss((1, 1, 1, 0))[0], rtol=1e-6)
