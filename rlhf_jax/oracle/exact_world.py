"""The oracle's world, enum-121, in which everything is known: four prompts, 121 responses to each.

A response is up to MAX_TOKENS actions of {0 = EOS, 1 = a, 2 = b, 3 = c}, ended by EOS or cut off
without it. A policy is a table of logits [PROMPTS, 40 prefixes, 4 actions]. Expectations are sums
over all responses, so the point that a method should reach is known to the last digit. Prompts are
uniform; a policy's probabilities are natural logarithms `logp` [PROMPTS, 121], all in float64.

J(π) = E r − β·KL(π‖REFERENCE) is greatest at `tilt(logprobs(REFERENCE), REWARDS / β)`, and falls
short elsewhere by exactly β·KL(π‖that).
"""

from __future__ import annotations

from itertools import product

import numpy as np

MAX_TOKENS, PROMPTS, ACTIONS = 4, 4, 4
PREFIXES = [s for n in range(MAX_TOKENS) for s in product((1, 2, 3), repeat=n)]
RESPONSES = [(*s, 0) for s in PREFIXES] + list(product((1, 2, 3), repeat=MAX_TOKENS))


def code(tokens: tuple[int, ...]) -> int:
    """Returns a prefix or response as a number: its digits in base 4 after a leading 1."""
    value = 1
    for token in tokens:
        value = 4 * value + token
    return value


def _index_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (prefix index, action, 1 if real) of all responses' tokens, [121, MAX_TOKENS]."""
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    nodes, actions = np.zeros((2, len(RESPONSES), MAX_TOKENS), np.int32)
    mask = np.zeros((len(RESPONSES), MAX_TOKENS))
    for i, response in enumerate(RESPONSES):
        for t, action in enumerate(response):
            nodes[i, t], actions[i, t], mask[i, t] = index[response[:t]], action, 1
    return nodes, actions, mask


def index_logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (prompt p, prefix code n, action j) of every logit, [PROMPTS, 40, ACTIONS] each."""
    p, n, j = np.meshgrid(
        range(PROMPTS), [code(s) for s in PREFIXES], range(ACTIONS), indexing="ij"
    )
    return p, n, j


def _make_reference() -> np.ndarray:
    """Returns the logits 0.8·sin(0.7n + 1.9j + 1.1p) − 0.5·[j=0]."""
    p, n, j = index_logits()
    return 0.8 * np.sin(0.7 * n + 1.9 * j + 1.1 * p) - 0.5 * (j == 0)


def exact_reward(prompt: int, response: tuple[int, ...]) -> float:
    """Returns the true reward of a response (its actions, EOS included) to a prompt 0 … 3."""
    letters = 0.5 * response.count(1) - 0.4 * response.count(2)
    letters += (0.2 if prompt % 2 == 0 else -0.2) * response.count(3)
    return letters - 0.5 * (response[-1] != 0) + 0.15 * np.sin(3.7 * code(response) + prompt)


NODES, TOKENS, MASK = _index_tokens()
LENGTHS = MASK.sum(1)
REFERENCE = _make_reference()
REWARDS = np.array([[exact_reward(p, s) for s in RESPONSES] for p in range(PROMPTS)])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Table [PROMPTS, 40, ACTIONS] → log π(response|prompt) [PROMPTS, 121]."""
    return (log_softmax(logits)[:, NODES, TOKENS] * MASK).sum(-1)


def expected_reward(logp: np.ndarray) -> float:
    return float((np.exp(logp) * REWARDS).sum(1).mean())


def kl(logp: np.ndarray, logq: np.ndarray) -> float:
    """KL(p‖q), averaged over prompts."""
    return float((np.exp(logp) * (logp - logq)).sum(1).mean())


def tilt(logp: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Returns the log of p·exp(exponent)/Z."""
    return log_softmax(logp + exponent)


def pair_law(logp: np.ndarray) -> np.ndarray:
    """Returns the probability [PROMPTS, 121, 121] that [p, y, y′] is drawn and y preferred.

    Prompts are uniform, y ≠ y′ come from π × π, and Bradley–Terry with the true reward labels them.
    """
    probs = np.exp(logp)
    drawn = probs[:, :, None] * probs[:, None, :] * (1 - np.eye(len(RESPONSES)))
    drawn /= drawn.sum((1, 2), keepdims=True) * PROMPTS
    return 2 * drawn / (1 + np.exp(REWARDS[:, None, :] - REWARDS[:, :, None]))


def optimum(beta: float) -> np.ndarray:
    """Returns log π* [PROMPTS, 121] of the policy that maximises J."""
    return tilt(logprobs(REFERENCE), REWARDS / beta)


def temperature(divergence: float, reference: np.ndarray) -> float:
    """Returns the β whose optimum is `divergence` nats from the reference [PROMPTS, 121].

    It is the frontier's slope there, and is looked for between 1e-4 and 1e6.
    """
    low, high = np.log(1e-4), np.log(1e6)
    for _ in range(100):
        middle = (low + high) / 2
        if kl(tilt(reference, REWARDS / np.exp(middle)), reference) > divergence:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def frontier(divergence: float, reference: np.ndarray | None = None) -> float:
    """Returns the most expected reward at a KL to the reference of `divergence` nats.

    No (KL, reward) of any policy lies above; the frontier ends at the greedy policy's KL, 5.98.

    Args:
        divergence: KL(π‖reference).
        reference: its log-probabilities [PROMPTS, 121]; those of REFERENCE if None.
    """
    reference = logprobs(REFERENCE) if reference is None else reference
    return expected_reward(tilt(reference, REWARDS / temperature(divergence, reference)))
