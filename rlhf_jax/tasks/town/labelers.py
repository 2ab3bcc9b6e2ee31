"""Simulated people who compare two replies: Bradley–Terry on gold scores, with biases and lapses.

    u(a)     = sharpness · gold(a) + length · words(a) + courtesy · polite(a)
    P(a ≻ b) = (1 − lapses) · σ(u(a) − u(b) + position) + lapses / 2        (a is shown first)

Bradley & Terry, "Rank Analysis of Incomplete Block Designs", https://www.jstor.org/stable/2334029
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from random import Random

from rlhf_jax.data.records import Pair, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.task import Verdict
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.language import words_of


@dataclass(frozen=True)
class Labeler:
    """How a labeler decides, in logits of the preference.

    `sharpness` is per unit of gold score; `length` per word of the reply, `courtesy` per unit of
    the polite component (both beyond what the gold score already holds); `position` is in favour of
    the reply shown first. With probability `lapses` the labeler tosses a coin.
    """

    sharpness: float = 30.0
    length: float = 0.0
    courtesy: float = 0.0
    position: float = 0.0
    lapses: float = 0.02

    def __post_init__(self) -> None:
        if self.sharpness < 0 or not 0 <= self.lapses <= 1:
            raise UserError(f"labeler: sharpness is ≥ 0 and lapses in [0, 1], not {self}")

    def utility(self, score: Verdict, reply: str) -> float:
        """How much the labeler likes a reply, in logits."""
        words = len(words_of(reply))
        polite = score.components["polite"]
        return self.sharpness * score.total + self.length * words + self.courtesy * polite


def preference(labeler: Labeler, prompt: Prompt, first: str, second: str) -> float:
    """The probability that `labeler`, shown `first` and then `second`, prefers `first`."""
    utilities = (labeler.utility(gold_score(prompt, reply), reply) for reply in (first, second))
    return _probability(labeler, next(utilities) - next(utilities))


def _probability(labeler: Labeler, difference: float) -> float:
    logit = max(-700.0, min(700.0, difference + labeler.position))
    return (1 - labeler.lapses) / (1 + exp(-logit)) + labeler.lapses / 2


def compare(labeler: Labeler, rng: Random, prompt: Prompt, first: str, second: str) -> Pair:
    """The labeler's choice between two replies, shown in this order.

    The pair's `meta` is that of the prompt and: `probability`, of this choice before it was made;
    `gold_chosen` and `gold_rejected`, the total gold scores. `margin` is None: people don't say.
    """
    scores = gold_score(prompt, first), gold_score(prompt, second)
    one, two = (labeler.utility(s, r) for s, r in zip(scores, (first, second), strict=True))
    probability = _probability(labeler, one - two)
    chosen, rejected, golds = first, second, scores
    if rng.random() >= probability:
        chosen, rejected, golds, probability = second, first, scores[::-1], 1 - probability
    meta = {
        **prompt.meta,
        "probability": f"{probability:.6f}",
        "gold_chosen": f"{golds[0].total:.4f}",
        "gold_rejected": f"{golds[1].total:.4f}",
    }
    return Pair(prompt.id, prompt.messages, chosen, rejected, meta=meta)
