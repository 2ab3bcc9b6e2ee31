"""Environments of other libraries: "reasoning_gym:leg_counting", "textarena:GuessTheNumber-v0".

Their packages are imported only in the environments' process, which may run in an interpreter of
its own (`environment.python`) that has no package but them: like all that `worker` imports, this
file needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rlhf_jax.child import ChildFault, describe
from rlhf_jax.environments.environment import Environment, Turn
from rlhf_jax.errors import nearest


class ReasoningGym:
    """A question of one of reasoning-gym's data sets; the one answer is worth what that scores.

    https://github.com/open-thought/reasoning-gym
    """

    registry = "reasoning_gym.factory:DATASETS"

    def __init__(self, name: str):
        self._name = name

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Turn]:
        """The row's turns, the last with the question of this seed after it."""
        gym = importlib.import_module("reasoning_gym")
        self._questions = gym.create_dataset(self._name, seed=seed, size=1)
        self._entry = self._questions[0]
        return _with_text(row["prompt"], self._entry["question"])

    def step(self, text: str) -> tuple[Sequence[Turn], float, bool]:
        """The end, and the answer's score in [0, 1]."""
        return (), self._questions.score_answer(text.strip(), self._entry), True


class TextArena:
    """A game of TextArena for one player, worth what the game says at its end.

    One that ends with an invalid move is worth 0 at most: some games pay for how far they got.
    https://github.com/LeonGuertler/TextArena
    """

    registry = "textarena.envs.registration:ENV_REGISTRY"

    def __init__(self, name: str):
        self._name = name

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Turn]:
        """The row's turns, the last with the rules of the game after it."""
        self._random = random.Random(seed).getstate()
        with self._own_randomness():
            arena = importlib.import_module("textarena")
            self._game = arena.make(self._name)
            self._game.reset(num_players=1, seed=seed)
            # Some games for several begin with one player, who then plays alone or for all.
            if not isinstance(self._bare(arena).state, arena.SinglePlayerState):
                raise ValueError("it is played by several: a game for one is needed")
            return _with_text(row["prompt"], self._read(arena))

    def step(self, text: str) -> tuple[Sequence[Turn], float, bool]:
        """What the game says to a move, or its end and reward."""
        with self._own_randomness():
            done, _ = self._game.step(action=text)
            if not done:
                said = self._read(importlib.import_module("textarena"))
                return ({"role": "user", "content": said},), 0.0, False
            rewards, told = self._game.close()
        invalid = told[0].get("invalid_move", False)
        return (), min(rewards[0], 0.0) if invalid else rewards[0], True

    def _read(self, arena: Any) -> str:
        """What is new to the player, without what it said itself and what was read before."""
        player, said = self._bare(arena).get_observation()
        return "\n".join(text for sender, text, _ in said if sender != player)

    def _bare(self, arena: Any) -> Any:
        """The game without its wrappers, most of which repeat the whole history."""
        game = self._game
        while isinstance(game, arena.Wrapper):
            game = game.env
        return game

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Games draw from the one generator of `random`; here each has a state of its own."""
        before = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(before)


LIBRARIES: dict[str, type[ReasoningGym | TextArena]] = {
    "reasoning_gym": ReasoningGym,
    "textarena": TextArena,
}


def library_environment(target: str) -> Callable[[], Environment]:
    """In the child: what makes the environments of "library:name".

    Raises:
        ChildFault: the library can't be imported, has no such name, or can't begin it.
    """
    library, _, name = target.partition(":")
    kind = LIBRARIES[library]
    try:
        module, _, registry = kind.registry.partition(":")
        known = getattr(importlib.import_module(module), registry)
    except ImportError as error:
        raise ChildFault(
            "not loaded",
            f"{sys.executable} can't import {library} ({error}): install it there, or name an "
            "interpreter that has it with --config.environment.python=/path/to/python",
        ) from error
    if name not in known:
        near = nearest(name, known)
        raise ChildFault("not loaded", f"{library} has no {name!r}; did you mean {near}?")
    try:
        kind(name).reset({"prompt": [{"role": "user", "content": ""}]}, 0)
    except Exception as error:
        raise ChildFault("not loaded", f"{target} can't begin: {describe(error, '')}") from error
    return partial(kind, name)


def _with_text(prompt: Sequence[Turn], text: str) -> Sequence[Turn]:
    """The turns, the last of which ends with a text, in a paragraph of its own if it has others."""
    before = prompt[-1]["content"]
    content = f"{before}\n\n{text}" if before else text
    return [*prompt[:-1], {**prompt[-1], "content": content}]
