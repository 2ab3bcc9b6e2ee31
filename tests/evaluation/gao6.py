"""The world gao-6: a reward model that cannot count to four is over-optimised; nothing is sampled.

Four prompts with the same 1093 outcomes each, up to MAX_TOKENS actions of {0 = EOS, 1 = a, 2 = b,
3 = c}. The gold reward likes up to two a's and hates more than three, which the reference hardly
ever writes. A reward model that is linear in #a learns the first and extrapolates it.
"Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np

MAX_TOKENS, PROMPTS = 6, 4
PREFIXES = [s for n in range(MAX_TOKENS) for s in product((1, 2, 3), repeat=n)]
OUTCOMES = [(*s, 0) for s in PREFIXES] + list(product((1, 2, 3), repeat=MAX_TOKENS))
A, B, C = (np.array([s.count(letter) for s in OUTCOMES]) for letter in (1, 2, 3))
AB = np.array([sum(pair == (1, 2) for pair in pairwise(s)) for s in OUTCOMES])
ENDED = np.array([s[-1] == 0 for s in OUTCOMES])

_SIMPLE = [A, B, C, ENDED]
_PAIRS = [*_SIMPLE, AB, A**2]
FEATURES = {1: [A], 2: _SIMPLE, 3: _PAIRS, 4: [*_PAIRS, *(k == A for k in range(1, 7))]}


def _code(tokens: tuple[int, ...]) -> int:
    value = 1
    for token in tokens:
        value = 4 * value + token
    return value


def _reference() -> np.ndarray:
    """π_ref of every outcome, [PROMPTS, 1093]."""
    shape = (range(PROMPTS), [_code(s) for s in PREFIXES], range(4))
    p, n, j = np.meshgrid(*shape, indexing="ij")
    logits = 0.8 * np.sin(0.7 * n + 1.9 * j + 1.1 * p) - 0.5 * (j == 0) - 0.5 * (j == 1)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    sums = [sum(logp[:, index[s[:t]], action] for t, action in enumerate(s)) for s in OUTCOMES]
    return np.exp(np.stack(sums, axis=1))


REFERENCE = _reference()
GOLD = (
    0.9 * np.minimum(A, 2) - 1.5 * np.maximum(A - 3, 0) + 0.5 * AB - 0.2 * B - 0.4 * ~ENDED
    + 0.05 * np.sin(1.37 * np.arange(len(OUTCOMES)))
)  # fmt: skip


def reward_model(size: int) -> np.ndarray:
    """Scores [1093] of the Bradley–Terry fit, L2 1e-3, of labels from 2·GOLD; endless pairs."""
    rows, kind = np.unique(np.stack(FEATURES[size], 1).astype(float), axis=0, return_inverse=True)
    wins = sum(np.outer(q, q) for q in REFERENCE) / (1 + np.exp(2 * (GOLD - GOLD[:, None])))
    indicator = np.eye(len(rows))[kind]
    weights = (indicator.T @ wins @ indicator).ravel()
    weights /= weights.sum()
    gaps = (rows[:, None] - rows).reshape(-1, rows.shape[1])
    w = np.zeros(rows.shape[1])
    for _ in range(20):  # Newton
        wrong = 1 / (1 + np.exp(gaps @ w))
        slope = 1e-3 * w - (weights * wrong) @ gaps
        curvature = (gaps.T * (weights * wrong * (1 - wrong))) @ gaps + 1e-3 * np.eye(len(w))
        w -= np.linalg.solve(curvature, slope)
    return (rows @ w)[kind]


def tilted(scores: np.ndarray, beta: float) -> tuple[float, float]:
    """(KL, gold − that of the reference) of the optimum π_ref exp(scores/β)/Z, over prompts."""
    raised = np.exp((scores - scores.max()) / beta)
    laws = REFERENCE * raised
    normalizers = laws.sum(1, keepdims=True)
    laws /= normalizers
    kl = (laws * ((scores - scores.max()) / beta - np.log(normalizers))).sum(1)
    return float(kl.mean()), float(((laws - REFERENCE) @ GOLD).mean())
