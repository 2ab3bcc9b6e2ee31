"""Calls of tools as text: how a model writes one, and how it is answered.

In our own format a call is the whole turn of the assistant, one line of JSON:

    {"name": "calculate", "arguments": {"expression": "17 + 25"}}

or, as our chats write the `tool_calls` of a record, the same object in {"tool_calls":
[{"function": …}]}, on a line of its own after any words. Models from the Hub write it between
<tool_call> and </tool_call>, after any words (Hermes, Qwen), or with "parameters" for "arguments"
(Llama 3.1). What a tool returns is the content of a turn of the role "tool"; what it could not do
is one of JSON, {"error": why}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_LLAMA = "<|python_tag|>"  # which Llama may write before a call
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments by name, of JSON."""

    name: str
    arguments: Mapping[str, Any]


class CallError(ValueError):
    """A turn begins like a call and is none; the message says why, for the model to read."""


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a turn that calls a tool, in our own format."""
    return json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)


def parse_call(text: str) -> Call | None:
    """The call that the text of an assistant's turn is, None if it does not begin like one.

    Raises:
        CallError: it begins like a call, but is not exactly one.
    """
    text = text.strip().removeprefix(_LLAMA)
    _, marked, after = text.partition(OPEN)
    if marked:
        text, closed, rest = after.partition(CLOSE)
        if not closed or rest.strip():
            raise CallError(f"a turn ends with one call, between {OPEN} and {CLOSE}")
    elif (last := text.rpartition("\n")[2]).startswith('{"tool_calls": '):
        text = last
    elif not text.startswith("{"):
        return None
    try:
        call = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
        json.dumps(call, ensure_ascii=False).encode()  # "\ud83d" is half a character
    except (ValueError, RecursionError) as error:
        raise CallError("the call is no JSON") from error
    match call:
        case {"tool_calls": [{"function": function}]} if len(call) == 1:
            call = function
    keys = [key for key in _ARGUMENTS if isinstance(call, dict) and key in call]
    if not keys or call.keys() != {"name", keys[0]} or not isinstance(call["name"], str):
        raise CallError('a call is {"name": a text, "arguments": {…}} and nothing else')
    if not isinstance(call[keys[0]], dict):
        raise CallError(f'"{keys[0]}" must be an object of values by name')
    return Call(call["name"], call[keys[0]])


def render_result(value: Any) -> str:
    """The content of the tool's turn: a text as it is, everything else as JSON.

    Raises:
        TypeError, ValueError: JSON has no such value; None is no result.
    """
    if value is None:
        raise TypeError("it returned nothing, None")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def render_error(why: str) -> str:
    """The content of a tool's turn that says why there is no result."""
    return json.dumps({"error": why}, ensure_ascii=False)


def is_error(content: str) -> bool:
    """Whether the content of a tool's turn is one of `render_error`."""
    if not content.startswith('{"error":'):
        return False
    try:
        return json.loads(content).keys() == {"error"}
    except (ValueError, RecursionError):
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice")
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is too large")
    return number
