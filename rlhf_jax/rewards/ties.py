"""A warning where the rewards tell nothing apart."""

from __future__ import annotations

import logging

from rlhf_jax.console import FEW


class Ties:
    """Warns, once, that a reward has judged nothing but ties so far.

    It does so once FEW answers have been judged, or at `close` if there were fewer.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._apart: set[str] = set()
        self._said = False

    def add(self, what: str, count: int, apart: bool) -> None:
        """Counts answers that were judged, which `what` calls ties, unless some are `apart`."""
        self._counts[what] = self._counts.get(what, 0) + count
        if apart:
            self._apart.add(what)
        self._say(FEW)

    def close(self) -> None:
        """Warns of the ties so far, since there will be no more answers."""
        self._say(2)

    def _say(self, least: int) -> None:
        for what, count in self._counts.items():
            if count >= least and what not in self._apart and not self._said:
                self._said = True
                logging.warning(
                    "reward: all %s %s so far: ties teach nothing; see reward.scorers",
                    f"{count:,}", what,
                )  # fmt: skip
