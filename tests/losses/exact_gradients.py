"""The exact objective and its gradient on enum-121, at a policy that is no optimum."""

from __future__ import annotations

import numpy as np

from rlhf_jax.oracle.exact_world import (
    MASK,
    NODES,
    PROMPTS,
    REFERENCE,
    REWARDS,
    TOKENS,
    expected_reward,
    index_logits,
    kl,
    log_softmax,
    logprobs,
)


def _generic() -> np.ndarray:
    """REFERENCE + 0.5·cos(1.7n + 0.9j + 0.4p)."""
    p, n, j = index_logits()
    return REFERENCE + 0.5 * np.cos(1.7 * n + 0.9 * j + 0.4 * p)


# Neither the reference nor an optimum: at an optimum many wrong gradients are zero as well.
GENERIC = _generic()


def objective(logits: np.ndarray, beta: float) -> float:
    """J of a policy table, averaged over prompts."""
    logp = logprobs(logits)
    return expected_reward(logp) - beta * kl(logp, logprobs(REFERENCE))


def gradient(logits: np.ndarray, beta: float) -> np.ndarray:
    """The exact gradient of the sum over prompts of J, in the shape of the table."""
    logp, probs = logprobs(logits), np.exp(log_softmax(logits))
    pull = np.exp(logp) * (REWARDS - beta * (logp - logprobs(REFERENCE)))
    result = np.zeros_like(logits)
    prompts = np.arange(PROMPTS)[:, None, None]
    pulls = pull[:, :, None] * MASK
    np.add.at(result, (prompts, NODES, TOKENS), pulls)
    np.add.at(result, (prompts, NODES), -pulls[..., None] * probs[:, NODES])
    return result
