"""The environments of many trajectories in a process of their own: what `child` loads and calls.

A call is of many trajectories, by name, and returns an outcome for each: what it asked for, or
{"fault": [reason, detail]} where the environment raised, took too long or returned what it may not.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.child import ChildFault, describe, load_module
from rlhf_jax.environments.environment import Environment
from rlhf_jax.environments.libraries import LIBRARIES, library_environment
from rlhf_jax.environments.tools import ToolEnvironment, method_names, schema_of

OPENING, ANSWERING = ("system", "user", "assistant", "tool"), ("user", "tool")
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """What the process has loaded, and the instances of the trajectories under way."""

    make: Callable[[], Environment]
    schemas: list[dict[str, Any]]  # of the tools there are
    seconds: float  # that one reset or step may take
    blame: str  # path of the file whose line is named where one raises
    instances: dict[str, Environment] = field(default_factory=dict)


class _TooSlow(BaseException):
    """Not an Exception: an environment that catches these is stopped all the same."""


def load(environment: str, tools: Sequence[str], seconds: float) -> Callable[..., list[Outcome]]:
    """In the child: `play` of the user's class and functions, each "path.py:name".

    The environment may be another library's instead, see `libraries`.

    Raises:
        ChildFault: one can't be loaded, or is neither an environment nor a tool.
    """
    functions = [_find(target) for target in tools]
    blame = str(Path((environment or tools[0]).rpartition(":")[0]).resolve())
    if environment.partition(":")[0] in LIBRARIES:
        if functions:
            raise ChildFault("not loaded", f"{environment} has no tools beside it")
        return functools.partial(play, Loaded(library_environment(environment), [], seconds, blame))
    kind: Any = _find(environment) if environment else None
    try:
        if kind is not None and not hasattr(kind, "__mro__"):
            raise TypeError(f"{environment} is no class")
        if kind is not None and _answers_texts(kind):
            if functions:
                raise TypeError(f"{environment} has step(text), which answers calls itself")
            return functools.partial(play, Loaded(kind, [], seconds, blame))
        methods = [getattr(kind, name) for name in method_names(kind)] if kind else []
        schemas = [schema_of(each) for each in (*functions, *methods)]
        if not schemas:
            raise TypeError(f"{environment} has neither step(text) nor public methods, its tools")
        names = [schema["function"]["name"] for schema in schemas]
        if twice := [name for name in names if names.count(name) > 1]:
            raise TypeError(f"two tools are called {twice[0]}")
    except TypeError as error:
        hint = ""
        if hasattr(kind, "step"):
            hint = "; an environment that answers texts has reset(self, row, seed) and step"
        raise ChildFault("not loaded", f"{error}{hint}") from error

    def make() -> Environment:
        return ToolEnvironment(functions, kind and kind())

    return functools.partial(play, Loaded(make, schemas, seconds, blame))


def play(
    loaded: Loaded, do: str, names: Sequence[str] = (), values: Sequence[Any] = ()
) -> list[Any]:
    """One call, `do`, of the trajectories with these names and a value for each.

    "schemas": of the tools there are. "open": values are {"row", "seed"}; all earlier trajectories
    are forgotten; outcomes {"turns"}. "step": values are texts; outcomes {"turns", "reward",
    "done"}. "end": of trajectories that were cut off; outcomes {"reward"}.
    """
    instances = loaded.instances
    if do == "schemas":
        return loaded.schemas
    if do == "open":
        instances.clear()
    outcomes = []
    for name, value in zip(names, values, strict=True):
        try:
            if do != "open" and name not in instances:
                raise ChildFault("lost", "its instance went with the process that another ended")
            with _within(loaded.seconds):
                if do == "open":
                    instances[name] = loaded.make()
                outcome = _DOING[do](instances[name], value)
        except _TooSlow:  # perhaps at the very end
            outcome = {"fault": ["timed out", f"took longer than {loaded.seconds:g} s"]}
        except ChildFault as error:
            outcome = {"fault": [error.reason, error.detail]}
        except (Exception, SystemExit) as error:
            outcome = {"fault": ["raised", describe(error, loaded.blame)]}
        outcomes.append(outcome)
    return outcomes


def _open(instance: Environment, value: Mapping[str, Any]) -> Outcome:
    return {"turns": _turns(instance.reset(value["row"], value["seed"]), OPENING)}


def _step(instance: Environment, text: str) -> Outcome:
    stepped = instance.step(text)
    if not isinstance(stepped, tuple) or len(stepped) != 3:
        shown = reprlib.repr(stepped)
        raise ChildFault("wrong answer", f"returned {shown} instead of (turns, reward, done)")
    turns, reward, done = stepped
    answers = [] if done else _turns(turns, ANSWERING)
    return {"turns": answers, "reward": _number(reward), "done": bool(done)}


def _end(instance: Environment, _: None) -> Outcome:
    last = instance.final_reward() if isinstance(instance, ToolEnvironment) else 0.0
    return {"reward": _number(last)}


_DOING: dict[str, Callable[[Any, Any], Outcome]] = {"open": _open, "step": _step, "end": _end}


def _turns(turns: Any, roles: Sequence[str]) -> list[dict[str, Any]]:
    """The turns as JSON has them; ChildFault unless they are one or more, of these roles, text."""
    if not isinstance(turns, list | tuple) or not turns:
        raise ChildFault("no turns", f"returned {reprlib.repr(turns)} instead of a list of turns")
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in roles:
            raise ChildFault("no turns", f"{reprlib.repr(turn)} is no turn of {' or '.join(roles)}")
        if not isinstance(turn.get("content"), str):
            shown = reprlib.repr(turn.get("content"))
            raise ChildFault("no text", f"the content {shown} of a turn is no text")
        try:
            json.dumps(dict(turn), ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:  # such as half a character, "\ud83d"
            raise ChildFault("no text", f"of a turn, {reprlib.repr(turn)}, {error}") from error
    if roles is ANSWERING and len(turns) > 1 and any(turn["role"] == "user" for turn in turns):
        told = ", ".join(turn["role"] for turn in turns)
        raise ChildFault("no turns", f"turns of {told}: one of the user, or of tools alone")
    return [dict(turn) for turn in turns]


def _number(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ChildFault("not a number", f"its reward {reprlib.repr(value)} is no finite number")
    return float(value)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises _TooSlow in what takes longer, unless it is in a library that hears no signals."""

    def stop(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_load_once = functools.cache(load_module)


def _find(target: str) -> Callable[..., Any]:
    """What "path.py:name" names; ChildFault if there is no such file or name."""
    path, _, name = target.rpartition(":")
    if not path:
        raise ChildFault("not loaded", f"{target!r} names no function or class; write mine.py:name")
    if not Path(path).is_file():
        raise ChildFault("not loaded", f"there is no file {path}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = getattr(_load_once(str(Path(path).resolve())), name, None)
    if not callable(found):
        raise ChildFault("not loaded", f"{path} has no function or class {name!r}")
    return found


def _answers_texts(kind: Any) -> bool:
    """Whether a class is an `Environment`, and not one of TRL's whose methods are tools."""
    reset = getattr(kind, "reset", None)
    if reset is None or not callable(getattr(kind, "step", None)):
        return False
    return [*inspect.signature(reset).parameters] == ["self", "row", "seed"]
