"""Tools as an environment: typed functions, or the methods of TRL's environment class.

A function is a tool through its signature and its docstring in Google's style; a class through its
public methods, in an instance of its own for each trajectory. A class may have `reset(**row)`,
whose text is added to the last turn of the prompt, and `get_reward()`, asked for once, at the end.
https://huggingface.co/docs/trl/grpo_trainer#agent-training
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.calls import CallError, parse_call, render_error, render_result
from rlhf_jax.environments.environment import Turn

_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("string", (str,)),
    int: ("integer", (int,)),
    float: ("number", (int, float)),
    bool: ("boolean", (bool,)),
    list: ("array", (list,)),
    dict: ("object", (dict,)),
}
_JSON = dict(_KINDS.values())


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a tool as chat templates take it, from its signature and docstring.

    Raises:
        TypeError: it is no function, or async; the docstring or an argument's type or description
            is missing, or of no kind that JSON has.
    """
    if isinstance(function, type) or not hasattr(function, "__name__"):
        raise TypeError(f"{function!r} is no function, as a tool must be")
    name, text = function.__name__, inspect.getdoc(function) or ""
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"the tool {name} is async: write it with def, and wait inside it")
    described = _describe_arguments(text)
    paragraphs = re.split(r"\n\s*\n", re.split(r"(?m)^(?:Args|Returns|Raises):", text)[0].strip())
    if not paragraphs[0]:
        raise TypeError(f"the tool {name} has no docstring that says what it does")
    try:
        hints, properties = typing.get_type_hints(function), dict[str, Any]()
    except NameError as error:
        raise TypeError(f"the tool {name}: of its types, {error}") from error
    required = []
    for argument in inspect.signature(function).parameters.values():
        if argument.name == "self":
            continue
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise TypeError(f"the tool {name} takes *{argument.name}: name its arguments")
        if argument.name not in hints or argument.name not in described:
            raise TypeError(
                f"the tool {name}: its argument {argument.name} needs a type, and a line "
                f'"{argument.name}: …" under Args: in the docstring'
            )
        kind = _schema_of_type(hints[argument.name], f"{name}, {argument.name}")
        properties[argument.name] = {**kind, "description": described[argument.name]}
        if argument.default is argument.empty:
            required.append(argument.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    description = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    told = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": told}


def _describe_arguments(text: str) -> dict[str, str]:
    """The descriptions under "Args:" of a docstring in Google's style, by argument."""
    part = re.search(r"^Args:\s*\n((?:[ \t]+.*\n?|\s*\n)+)", text, re.M)
    if not part:
        return {}
    lines = inspect.cleandoc(f"\n{part[1]}").split("\n")
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := re.match(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line):
            name, found[match[1]] = match[1], match[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _schema_of_type(hint: Any, where: str) -> dict[str, Any]:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in inside if each is not type(None)]
        if len(rest) == 1:
            return {**_schema_of_type(rest[0], where), "nullable": True}
    if origin is typing.Literal and all(isinstance(each, str) for each in inside):
        return {"type": "string", "enum": list(inside)}
    if origin is list and inside:
        return {"type": "array", "items": _schema_of_type(inside[0], where)}
    if (origin or hint) in _KINDS:
        return {"type": _KINDS[origin or hint][0]}
    raise TypeError(f"the tool {where}: its type {hint} is none that JSON has")


def check_arguments(schema: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Why a call's arguments do not fit a tool's schema, None if they do."""
    parameters = schema["function"]["parameters"]
    known = parameters["properties"]
    if missing := [name for name in parameters["required"] if name not in given]:
        return f"missing argument {missing[0]}"
    for name, value in given.items():
        if name not in known:
            return f"unknown argument {name}"
        if not _fits(known[name], value):
            return f"argument {name} must be {_told(known[name])}"
    return None


def _told(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    return f"array of {_told(schema['items'])}" if "items" in schema else schema["type"]


def _fits(schema: Mapping[str, Any], value: Any) -> bool:
    if value is None:
        return schema.get("nullable", False)
    kind = schema["type"]
    if not isinstance(value, _JSON[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(_fits(schema["items"], each) for each in value)
    return "enum" not in schema or value in schema["enum"]


class ToolEnvironment:
    """The environment of a trajectory that may call tools; a turn that calls none ends it."""

    def __init__(self, functions: Sequence[Callable[..., Any]], owner: Any = None):
        """`owner` is an instance of TRL's class, whose public methods are tools too."""
        self._owner = owner
        methods = [getattr(owner, name) for name in method_names(type(owner))]
        every: list[Callable[..., Any]] = [*functions, *methods]
        self._tools = {each.__name__: (each, schema_of(each)) for each in every}

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Turn]:
        """The turns of the prompt, the last with what the class's `reset` adds to it."""
        turns = [*row["prompt"]]
        reset = getattr(self._owner, "reset", None)
        added = None if reset is None else reset(**_named_by(reset, {**row, "seed": seed}))
        if not isinstance(added, str | None):
            raise TypeError(f"reset returned {type(added).__name__}, neither a text nor None")
        if added:
            turns[-1] = {**turns[-1], "content": turns[-1]["content"] + added}
        return turns

    def step(self, text: str) -> tuple[Sequence[Turn], float, bool]:
        """The tool's turn that answers a call, or the end and its reward."""
        try:
            call = parse_call(text)
        except CallError as error:
            return _answer(render_error(str(error)))
        if call is None:
            return [], self.final_reward(), True
        if call.name not in self._tools:
            return _answer(render_error(f"unknown tool {call.name}"))
        function, schema = self._tools[call.name]
        if wrong := check_arguments(schema, call.arguments):
            return _answer(render_error(wrong))
        try:
            result = function(**call.arguments)
        except Exception as error:  # which TRL gives to the model too
            return _answer(render_error(str(error) or type(error).__name__))
        try:
            return _answer(render_result(result))
        except ValueError:  # of numbers that the model has chosen too large
            return _answer(render_error("the result is no finite number"))

    def final_reward(self) -> float:
        """What the class says that the trajectory was worth, also of one that was cut off."""
        return self._owner.get_reward() if hasattr(self._owner, "get_reward") else 0.0


def method_names(kind: type) -> list[str]:
    """The public methods of TRL's class that are tools, in the order of their names."""
    named = (name for name, _ in inspect.getmembers(kind, inspect.isfunction))
    return [n for n in named if not n.startswith("_") and n not in ("reset", "get_reward")]


def _named_by(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return {name: value for name, value in values.items() if name != "self"}
    return {name: value for name, value in values.items() if name in parameters}


def _answer(content: str) -> tuple[Sequence[Turn], float, bool]:
    return [{"role": "tool", "content": content}], 0.0, False
