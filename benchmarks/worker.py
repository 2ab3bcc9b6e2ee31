"""One side of a benchmark as a process that works when it is told to, so that sides can alternate.

The process says {"ready": true, …} once it is warm; then it does one round of work for every line
it reads, and answers {"seconds", "units", …}. A side whose library owns the loop calls `Turns.wait`
and `Turns.done` from inside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """The conversation with `benchmarks.run`."""

    def __init__(self) -> None:
        self._out, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def _say(self, **values: Any) -> None:
        print(json.dumps(values), file=self._out, flush=True)

    def ready(self, **facts: Any) -> None:
        """Warm: `facts` are versions and whatever else is worth keeping."""
        self._say(ready=True, **facts)

    def wait(self) -> None:
        """Blocks until the next round is wanted; ends the process when none is."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._begun = time.perf_counter()

    def done(self, units: float, **more: Any) -> None:
        """A round is over, in which so many units were worked off."""
        self._say(seconds=time.perf_counter() - self._begun, units=units, **more)


def serve(
    turns: Turns,
    round_: Callable[[], float],
    compiled: Callable[[], object] | None = None,
    **facts: Any,
) -> None:
    """Does `round_` → units again and again, after two to warm up with `compiled` between them."""
    round_()
    if compiled is not None:
        compiled()
    round_()
    turns.ready(**facts)
    while True:
        turns.wait()
        turns.done(round_())
