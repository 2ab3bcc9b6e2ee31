"""Episodes with the town's tools: what follows the assistant's turns, and what they are worth.

An episode ends with the first turn that is no call, or with the call after the last one allowed. It
is worth 1 or 0: the product of

correct   1 if that turn answers the question by the facts, else 0
state     1 if the bookings are those before and what was asked for, else 0
calls     1 if each call was one that a tool could answer, and there were no more than it takes,
          none where none is needed
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.tasks.task import Verdict
from rlhf_jax.tasks.town.gold import gold_score, is_right
from rlhf_jax.tasks.town.tool_exercises import Goal, read_goal
from rlhf_jax.tasks.town.tools import InvalidCall, Office, open_office, use

MOST_CALLS = 4


@dataclass(frozen=True)
class Episode:
    """What became of one episode: its verdict, and how many calls it made and needed."""

    verdict: Verdict
    calls: int
    invalid: int
    needed: int


class TownEnvironment:
    """An episode of one trajectory; a pure function of the row and of what the assistant says."""

    def __init__(self, office: Office | None = None) -> None:
        self._office = office or open_office()

    def reset(self, row: Prompt, seed: int) -> tuple[Message, ...]:
        """Begins with the row's question; nothing is left to chance."""
        self._row = row
        self._goal = read_goal(row.meta["goal"])
        self._bookings = self._goal.full
        self.calls = self.invalid = 0
        return row.messages

    def step(self, text: str) -> tuple[tuple[Message, ...], float, bool]:
        """The tool's turn after a call, or the reward of an answer: (turns, reward, done)."""
        call = read_call(text)
        if call is None:
            return (), self.judge(text).total, True
        self.calls += 1
        try:
            result, self._bookings = use(self._office, self._bookings, *call)
        except InvalidCall as error:
            self.invalid += 1
            result = json.dumps({"error": str(error)})
        return (Message("tool", result),), 0.0, self.calls > MOST_CALLS

    def judge(self, answer: str) -> Verdict:
        """The verdict on an episode that ends here with that answer."""
        goal = self._goal
        components = {
            "correct": float(_answers(goal, self._row, answer)),
            "state": float(self._bookings == goal.full | goal.booked),
            "calls": float(not self.invalid and self.calls <= goal.calls),
        }
        return Verdict(min(components.values()), components)


def replay(row: Prompt, turns: Sequence[str], office: Office | None = None) -> Episode:
    """The episode of a row in which the assistant said these turns."""
    world = TownEnvironment(office)
    world.reset(row, 0)
    for text in turns:
        done = world.step(text)[2]
        if done:
            break
    return Episode(world.judge(turns[-1]), world.calls, world.invalid, world._goal.calls)


def verify(row: Prompt, reply: str) -> Verdict:
    """The verdict on a reply without a call."""
    return replay(row, [reply]).verdict


def _answers(goal: Goal, row: Prompt, answer: str) -> bool:
    if goal.calls:
        return is_right(goal.expectation, answer)
    asked = Prompt(row.id, row.messages, {"expectation": goal.expectation.dumps()})
    return gold_score(asked, answer).components["correct"] == 1


def read_call(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """The call that a turn is, or None for one that is none."""
    if not text.startswith("{"):
        return None
    try:
        call = json.loads(text)
        return call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError):
        return "", {}
