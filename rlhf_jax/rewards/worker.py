"""A user's reward function in a process of its own: what it is given and what it may return."""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.child import Child, ChildFault, load_module
from rlhf_jax.stopping import stop_point

LOAD_SECONDS = 120.0
"""How long importing the user's file may take; it may well import a large library."""


class Worker(Child):
    """Runs the function `target` = "path.py:function"; see `Child`. The process starts at once.

    Raises:
        ChildFault: the file or function can't be loaded.
    """

    def __init__(self, target: str) -> None:
        path, _, name = target.rpartition(":")
        path = str(Path(path).resolve())
        arguments = {"path": path, "name": name}
        super().__init__(
            __file__, "load", arguments, LOAD_SECONDS, blame=path, while_waiting=stop_point
        )
        self.start()

    def call(
        self, arguments: Mapping[str, Any], seconds: float
    ) -> tuple[list[float], dict[int, str]]:
        """The function's values, NaN where one is no number, and what is there instead by index.

        Raises:
            ChildFault: as `Child.call`, and "no list" or "wrong length".
            Preempted: a stop was asked for meanwhile (see `stopping`); the process is killed.
        """
        values, wrong = super().call(arguments, seconds)
        return values, {int(index): instead for index, instead in wrong.items()}


def load(path: str, name: str) -> Callable[..., tuple[list[float], dict[int, str]]]:
    """In the child: `score` of the user's function."""
    if not Path(path).is_file():
        raise ChildFault("not loaded", f"there is no file {path}")
    sys.path.insert(0, str(Path(path).parent))
    function = getattr(load_module(path), name, None)
    if not callable(function):
        raise ChildFault("not loaded", f"{path} has no function {name!r}")
    return functools.partial(score, function)


def score(
    function: Callable[..., Any],
    prompts: list[list[dict[str, Any]]],
    responses: list[str],
    columns: dict[str, list[Any]],
) -> tuple[list[float], dict[int, str]]:
    """In the child: calls the user's function, which is given the columns that it names.

    Args:
      prompts: one list of messages {"role", "content"} per response.
      columns: name → one value per response.
    """
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {name: column for name, column in columns.items() if name in parameters}
    count = len(responses)
    result = _plain(function(prompts, responses, **columns))
    if not isinstance(result, list | tuple):
        got = f"{type(result).__name__} {reprlib.repr(result)}"
        raise ChildFault("no list", f"returned {got} instead of a list of {count} numbers")
    if len(result) != count:
        raise ChildFault("wrong length", f"returned {len(result)} scores for {count} responses")
    values, wrong = [], {}
    for index, value in enumerate(map(_plain, result)):
        try:
            values.append(float(value) if isinstance(value, bool | int | float) else math.nan)
        except OverflowError:
            values.append(math.inf if value > 0 else -math.inf)
        if not isinstance(value, bool | int | float):
            wrong[index] = f"{type(value).__name__} {reprlib.repr(value)}"
    return values, wrong


def _plain(value: Any) -> Any:
    """Arrays and scalars of NumPy, JAX or PyTorch as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value
