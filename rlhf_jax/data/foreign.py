"""Objects as other tools' files have them, as those that `jsonl` reads; see `translated`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]

ACCEPTED = (
    "ShareGPT {'conversations': [{'from', 'value'}, …]}, Alpaca {'instruction', 'output'}, "
    "Dolly {'instruction', 'response'}"
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "function": "tool",
    "observation": "tool",
}


class Untranslatable(Exception):
    """An object that is of a foreign format but for one part, which the message names."""


def parse_columns(spec: str) -> dict[str, str]:
    """ "prompt:question,completion:answer" → {"prompt": "question", "completion": "answer"}.

    Raises:
        ValueError: it is no such list, or names a field twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, spec.split(",")):
        field, colon, column = (piece.strip() for piece in part.partition(":"))
        if not (field and colon and column) or field in columns:
            raise ValueError(
                f"data.columns = {spec!r}: write field:column,…, each field once, as in "
                "prompt:question,completion:answer"
            )
        columns[field] = column
    return columns


def renamed(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The object with the named columns under the fields' names, which replace others of that name.

    Raises:
        Untranslatable: it lacks a column.
    """
    for column in columns.values():
        if column not in fields:
            there = ", ".join(sorted(map(repr, fields)))
            raise Untranslatable(f"data.columns names {column!r}; there are {there}")
    rest = {k: v for k, v in fields.items() if k not in columns.values()}
    return rest | {field: fields[column] for field, column in columns.items()}


def translated(fields: Fields, kind: str) -> tuple[str, Fields]:
    """(format's name, the object as ours); ("", it as it is) where its format is none of these.

    ShareGPT: `conversations` of {"from", "value"}, `system`, `tools`; with `chosen` and `rejected`,
    which are such turns or texts, they are the prompt of a pair. Alpaca: `instruction`, `input`,
    `output`, `system`, `history`; with `chosen` and `rejected` a pair. Dolly: the same with
    `context` and `response`. An object that has `messages` or `prompt` is ours; so is one with
    `text` where that is wanted.

    Raises:
        Untranslatable: a turn or a part has no such form.
    """
    if fields.keys() & {"messages", "prompt"} or (kind == "text" and "text" in fields):
        return "", fields
    if isinstance(fields.get("conversations"), list):
        return "ShareGPT", _share_gpt(fields)
    ends = {"output", "response", "chosen"} & fields.keys()
    if "instruction" in fields and (ends or kind == "prompt"):
        name = "Dolly" if "context" in fields or "response" in fields else "Alpaca"
        return name, _alpaca(fields)
    return "", fields


def _share_gpt(fields: Fields) -> Fields:
    fields = dict(fields)
    turns = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(fields["conversations"])]
    del fields["conversations"]
    turns = [*_system(fields), *turns]
    if not {"chosen", "rejected"} <= fields.keys():
        return fields | {"messages": turns}
    for name in ("chosen", "rejected"):
        if isinstance(fields[name], dict):
            fields[name] = [_turn(fields[name], name)]
    return fields | {"prompt": turns}


def _turn(turn: Any, where: str) -> Fields:
    """A turn; a call, which ShareGPT writes as JSON of {"name", "arguments"}, as `tool_calls`.

    One with a role and a content is ours already: many sets have such under the same name.
    """
    if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
        return turn
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise Untranslatable(f"{where} must have 'from' and 'value'")
    role = _ROLES.get(turn["from"], turn["from"]) if isinstance(turn["from"], str) else None
    for name in ("weight", "loss", "train"):  # by which some trainers leave replies untrained
        if role == "assistant" and turn.get(name) not in (None, 1):
            raise Untranslatable(
                f"{where} is a reply with {name!r}: {turn[name]!r}, which is not followed here: "
                "replies are trained alike; leave such conversations out"
            )
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"]}
    return {"role": role, "content": "", "tool_calls": turn["value"]}


def _alpaca(fields: Fields) -> Fields:
    fields = dict(fields)
    turns = _system(fields)
    for pair in fields.pop("history", None) or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise Untranslatable("'history' must be a list of [instruction, output]")
        turns += [_said("user", pair[0]), _said("assistant", pair[1])]
    asked = fields.pop("instruction")
    for name in ("input", "context"):
        more = fields.pop(name, None)
        if more is not None and not (isinstance(more, str) and isinstance(asked, str)):
            raise Untranslatable(f"'instruction' and {name!r} must be texts")
        if more:
            asked = f"{asked}\n\n{more}"
    fields["prompt"] = [*turns, _said("user", asked)]
    for name in ("output", "response"):
        if name in fields and "chosen" not in fields:
            fields["completion"] = fields.pop(name)
    return fields


def _system(fields: Fields) -> list[Fields]:
    system = fields.pop("system", None)
    return [_said("system", system)] if system else []


def _said(role: str, content: Any) -> Fields:
    return {"role": role, "content": content}
