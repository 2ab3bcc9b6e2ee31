"""Episodes with the town's tools: what follows the assistant's turns, and what they are worth.

An episode ends with the first turn that is no call, or with the call after the last one allowed. It
is worth 1 or 0: the product of

correct   1 if that turn answers the question by the facts, else 0
state     1 if the bookings are those before and what was asked for, else 0
calls     1 if each call was one that a tool could answer, and there were no more than it takes,
          none where none is needed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.data.calls import CallError, parse_call, render_error, render_result
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.tasks.task import Outcome, Verdict
from rlhf_jax.tasks.town.gold import gold_score, is_right
from rlhf_jax.tasks.town.tool_exercises import read_goal
from rlhf_jax.tasks.town.tools import InvalidCall, open_office, use

MOST_CALLS = 4


@dataclass(frozen=True)
class Episode:
    """What became of an episode with tools: its verdict, the calls made, invalid, and needed."""

    verdict: Verdict
    calls: int
    invalid: int
    needed: int


class TownEnvironment:
    """One trajectory's environment, see `environments.environment.Environment`."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Mapping[str, Any]]:
        """Begins with the row's question; nothing is left to chance."""
        messages = tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])
        self._goal = read_goal(row["goal"])
        expectation = {"expectation": self._goal.expectation.dumps()}
        self._asked = Prompt(row["id"], messages, expectation)
        self._office = open_office()
        self._bookings = self._goal.full
        self._calls = self._invalid = 0
        return row["prompt"]

    def step(self, text: str) -> tuple[Sequence[Mapping[str, Any]], float, bool]:
        """The tool's turn after a call, or the reward of what is none: (turns, reward, done)."""
        try:
            call = parse_call(text)
            if call is None:
                return (), self.judge(text).verdict.total, True
            result, self._bookings = use(self._office, self._bookings, call.name, call.arguments)
            content = render_result(result)
        except (CallError, InvalidCall) as error:
            self._invalid += 1
            content = render_error(str(error))
        self._calls += 1
        return ({"role": "tool", "content": content},), 0.0, self._calls > MOST_CALLS

    def judge(self, answer: str) -> Episode:
        """The episode, if it ends here with this answer."""
        goal = self._goal
        if goal.calls:
            right = is_right(goal.expectation, answer)
        else:
            right = gold_score(self._asked, answer).right
        components = {
            "correct": float(right),
            "state": float(self._bookings == goal.full | goal.booked),
            "calls": float(not self._invalid and self._calls <= goal.calls),
        }
        verdict = Verdict(min(components.values()), components)
        return Episode(verdict, self._calls, self._invalid, goal.calls)


def replay(row: Prompt | Pair | Conversation, turns: Sequence[str]) -> Episode:
    """The episode of a row in which the assistant said these turns, the last of them its answer.

    One that ends with a call, since it was cut off or made too many, has no answer.
    """
    world = TownEnvironment()
    asked = row.prompt if isinstance(row, Pair) else row.messages
    prompt = [message.to_json() for message in asked]
    world.reset({**row.meta, "id": row.id, "prompt": prompt}, 0)
    answers = [text for text in turns if not world.step(text)[0]]
    return world.judge(answers[-1] if answers else "")


def verify(row: Prompt | Pair | Conversation, reply: str) -> Verdict:
    """The verdict on a reply in one turn, that is without a tool."""
    return replay(row, [reply]).verdict


def outcomes(row: Prompt, turns: Sequence[str]) -> dict[str, Outcome]:
    """(how many, of how many) of an episode, by name; see `Task.outcomes`.

    Shares of calls count as one of an episode, so that intervals are over episodes, whose calls are
    no independent draws.

    success/<family>: whether it is worth 1. needless_calls: of episodes that need no call, whether
    there is one. invalid_calls: of episodes with calls, the share that no tool could answer.
    """
    episode = replay(row, turns)
    found: dict[str, Outcome] = {
        f"success/{row.meta['family']}": (float(episode.verdict.total == 1), 1)
    }
    if not episode.needed:
        found["needless_calls"] = float(episode.calls > 0), 1
    if episode.calls:
        found["invalid_calls"] = episode.invalid / episode.calls, 1
    return found
