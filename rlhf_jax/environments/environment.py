"""What an environment is: the other side of a conversation, which answers turns and rewards them.

It has one instance for each trajectory, made without arguments, and nothing is shared between
instances: all that an instance does follows from its row, its seed and the texts it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Turn = Mapping[str, Any]
"""{"role", "content"}, and the further entries that `records.Message.more` knows."""


class Environment(Protocol):
    """One trajectory's environment."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Turn]:
        """Begins the trajectory: returns the turns that it opens with, row["prompt"] or others.

        The answers to one prompt have one row and one seed, and must be opened alike.

        Args:
            row: of the record, "id", "prompt" (its turns) and every entry of its meta.
            seed: a whole number of 31 bits.
        """
        ...

    def step(self, text: str) -> tuple[Sequence[Turn], float, bool]:
        """Takes the text of the assistant's turn: (turns that answer it, its reward, whether done).

        The turns are of the roles "tool" and "user", one or more unless it is done; then they are
        not read. A step that raises is a mistake of the environment. What the model did wrong
        is told to it by a turn: a tool's with `calls.render_error`, which counts as an invalid
        call.
        """
        ...
