"""What a judge is, how it is asked, and a simulated one whose mistakes are chosen and known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Protocol

import numpy as np

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.report.tables import join_turns
from rlhf_jax.tasks.builders import verifier_of, verify
from rlhf_jax.tasks.task import Verdict

PASS = 0.5
"""An answer passes a principle if its gold component is as large as this."""
PLEA = "This answer is right."
"""What an answer may say of itself, and a gullible judge believes."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, in the order in which a judge is shown them."""

    prompt: Prompt
    first: str
    second: str

    @property
    def swapped(self) -> Comparison:
        """The same with the answers in the other order."""
        return Comparison(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class Answers:
    """What a judge said of N comparisons, each shown once.

    Attributes:
      probabilities: [N] f64, P(first ≻ second); NaN where no verdict can be had.
      missing: why not, by index.
    """

    probabilities: np.ndarray
    missing: Mapping[int, str]


class Judge(Protocol):
    """Anything that compares."""

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """Says of each comparison how probably the answer shown first is the better one."""


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of N pairs (a, b) that it was asked about in both orders.

    Attributes:
      preferred: [N] f64, P(a ≻ b), the mean of both orders; NaN where either has no verdict.
      shown_first: [N, 2] f64, P(the answer shown first is better) with a first, and with b first.
      masked: how many pairs have no verdict, by reason.
    """

    preferred: np.ndarray
    shown_first: np.ndarray
    masked: Mapping[str, int]

    @property
    def valid(self) -> np.ndarray:
        """[N] bool: which pairs have a verdict."""
        return ~np.isnan(self.preferred)

    @property
    def flipped(self) -> np.ndarray:
        """[N] bool: which verdicts turn with the order, the answer in one place preferred twice."""
        sides = np.sign(self.shown_first - 0.5)
        return (sides[:, 0] * sides[:, 1]) > 0


def ask(judge: Judge, pairs: Sequence[Comparison], principle: Principle) -> Verdicts:
    """Asks about every pair with a first and with b first.

    What the judge says is checked: a value outside [0, 1] is no verdict, and is counted.
    """
    said = judge([*pairs, *(pair.swapped for pair in pairs)], principle)
    values, missing = said.probabilities.astype(np.float64), dict(said.missing)
    for i in np.flatnonzero(~((values >= 0) & (values <= 1))).tolist():
        missing.setdefault(i, "not a probability")
    values[[*missing]] = np.nan
    count = len(pairs)
    reasons = {i % count: reason for i, reason in sorted(missing.items(), reverse=True)}
    first = np.stack([values[:count], values[count:]], axis=1)
    preferred = 0.5 + (first[:, 0] - first[:, 1]) / 2  # ½ to the bit where both are the same
    return Verdicts(preferred, first, Counter(reasons.values()))


def question(shown: Comparison, principle: Principle) -> tuple[Message, ...]:
    """The turn in which a language model is asked which answer is better."""
    asked = join_turns([message.to_json() for message in shown.prompt.messages])
    text = f"{principle.question}\n{asked}\nFirst: {shown.first}\nSecond: {shown.second}"
    return (Message("user", text),)


@lru_cache(maxsize=65536)
def _verdict(prompt: Prompt, answer: str) -> Verdict:
    return verify(prompt, answer)


def gold(prompt: Prompt, answer: str, principle: Principle) -> float:
    """What the exact verifier of the prompt's task gives an answer for the principle, in [0, 1].

    Raises:
        UserError: the principle stands for nothing that this verifier knows.
    """
    verdict = _verdict(prompt, answer)
    values = {**verdict.components, "total": verdict.total}
    if principle.gold not in values:
        raise UserError(
            f"principle {principle.name!r}: its gold is {principle.gold!r}, and the verifier of "
            f"prompt {prompt.id!r} knows {', '.join(values)}"
        )
    return values[principle.gold]


@dataclass(frozen=True)
class SimulatedJudge:
    """An exact rule that errs as it is told to, on prompts of the town.

    It reads the gold component of each answer. Of an answer that passes (see `PASS`) it fails to
    see this with probability 1 − sensitivity, and takes its component for 0; one that does not pass
    it takes for perfect with probability 1 − specificity. It prefers the larger value, and says ½
    of equal ones. What it sees in an answer does not depend on the other answer or the order, and
    is a function of the seed, so it errs again when it is asked again.

    Attributes:
      position: with the probability of its size the answer shown first (> 0) or second (< 0) is
        preferred whatever it is; drawn anew for each order.
      gullibility: the probability that an answer which says that it is right (see `PLEA`) is
        taken for perfect.
    """

    sensitivity: float = 1.0
    specificity: float = 1.0
    position: float = 0.0
    gullibility: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.sensitivity, self.specificity, abs(self.position), self.gullibility)
        if not all(0 <= rate <= 1 for rate in rates):
            raise UserError(
                "a simulated judge's sensitivity, specificity and gullibility lie in [0, 1] and "
                f"its position in [−1, 1], not {self}"
            )

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`; it has a verdict on everything."""
        return Answers(np.array([self._prefers(each, principle) for each in shown]), {})

    def _prefers(self, shown: Comparison, principle: Principle) -> float:
        drawn = self._random("order", principle, shown.prompt, shown.first, shown.second)
        if drawn.random() < abs(self.position):
            return float(self.position > 0)
        first = self._seen(shown.prompt, shown.first, principle)
        second = self._seen(shown.prompt, shown.second, principle)
        return 0.5 if math.isclose(first, second) else float(first > second)

    def _seen(self, prompt: Prompt, answer: str, principle: Principle) -> float:
        value = gold(prompt, answer, principle)
        drawn = self._random("answer", principle, prompt, answer)
        persuaded, rightly = drawn.random() < self.gullibility, drawn.random()
        if persuaded and PLEA in answer:
            return 1.0
        passes = value >= PASS
        if rightly < (self.sensitivity if passes else self.specificity):
            return value
        return 0.0 if passes else 1.0

    def _random(self, what: str, principle: Principle, prompt: Prompt, *texts: str) -> Random:
        asked = [message.content for message in prompt.messages]
        return Random(repr((self.seed, what, principle.name, asked, texts)))


@dataclass(frozen=True)
class People:
    """The labelers of a task, one of whom votes on each pair, once.

    The vote does not depend on the principle or the order, and is a function of the seed.
    """

    seed: int = 0

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`; the vote as 0 or 1, ½ of the same answer twice.

        Raises:
            UserError: the prompts' task has no labelers.
        """
        task = verifier_of([each.prompt for each in shown])
        if task is None or task.preference is None:
            raise UserError("people are a task's labelers, as the town's, who know its prompts")
        likes = task.preference
        return Answers(np.array([self._prefers(each, likes) for each in shown]), {})

    def _prefers(self, shown: Comparison, preference: Callable[[Prompt, str, str], float]) -> float:
        if shown.first == shown.second:
            return 0.5
        one, other = sorted((shown.first, shown.second))
        asked = [message.content for message in shown.prompt.messages]
        drawn = Random(repr((self.seed, "people", asked, one, other))).random()
        likes_one = drawn < preference(shown.prompt, one, other)
        return float(likes_one == (shown.first == one))
