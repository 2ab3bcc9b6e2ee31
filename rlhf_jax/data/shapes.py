"""Objects of users' files to records, strictly; an object that is no record is a `BadLine`.

Shapes by kind of record. Any other key becomes a `meta` entry unless it is null, as where it is
not there, and `id` is optional:

    text          {"text": str}, or a conversation, its turns as in `records.convert`
    conversation  {"messages": [{"role", "content"}, …]}, or {"prompt": str | messages} with
                  "response": str or "completion": str | messages
    prompt        {"prompt": str | messages}, {"messages": […]} or a pair; the reply that ends
                  messages is left away
    pair          {"prompt", "chosen", "rejected"}: replies as text or as messages,
                  or {"chosen": messages, "rejected": messages} that share all but the last, or as
                  "\\n\\nHuman: …\\n\\nAssistant: …" dialogues, or as texts whose prompt is what
                  both begin with, up to its last white space; "tie": true prefers neither
    preference    a pair, or a conversation with a "label": true where its last reply is good
    hh            {"chosen", "rejected"} as such dialogues → pairs

An assistant's message may have "tool_calls", [{"type": "function", "function": {"name",
"arguments": object or JSON of one}}], beside an empty or absent content; a tool's a "name" and a
"tool_call_id"; and a record "tools", a list of JSON schemas or JSON of one, and "system", the text
of a first turn.

Shapes of other tools, where an object has neither "messages" nor "prompt":

    ShareGPT  {"conversations": [{"from", "value"}, …]}, "system", "tools"; with "chosen" and
              "rejected", which are such turns or texts, they are the prompt of a pair
    Alpaca    {"instruction"}, "input", "output", "system", "history"; with "chosen" and "rejected"
              a pair
    Dolly     the same with "context" and "response"
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from rlhf_jax.data.conversation import check_messages
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text, convert
from rlhf_jax.errors import UserError

Fields = dict[str, Any]
Messages = tuple[Message, ...]
EXCERPT = 80  # characters
_OPTIONAL = {"tool_calls": "assistant", "name": "tool", "tool_call_id": "tool"}  # key → its role
_OF_PAIRS = {"margin", "tie"}
_JUDGED_BY = {"answer", "reference"}  # of meta, by rewards
_TIMES = (date, time)  # a datetime is a date
_TEXTUAL = (*_TIMES, timedelta, Decimal)  # of tables; JSON has none of them
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SHARE_GPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("function_response", "function", "observation"), "tool"),
}


class BadLine(Exception):
    """One line that is no record: `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def make_record(fields: Fields, kind: str, default_id: str) -> tuple[Record, tuple[str, str]]:
    """The record that an object holds, and its shape: (foreign name or "", its keys as ours).

    Raises:
        BadLine: it has no shape of that kind, or a part of it is not as it must be.
    """
    name, ours = "", fields
    if not fields.keys() & {"messages", "prompt"} and not (kind == "text" and "text" in fields):
        for foreign, known_by, translate in FOREIGN:
            if all(k in fields and isinstance(fields[k], of) for k, of in known_by.items()):
                name, ours = foreign, translate(dict(fields))
                break
    for keys in map(str.split, SHAPES[kind]):
        if ours.keys() >= set(keys):
            try:
                record = _make(ours, kind, default_id, frozenset(keys))
            except UserError as error:  # of `check_messages`
                raise BadLine("bad roles", str(error)) from error
            return convert(record, "text") if kind == "text" else record, (name, show_names(keys))
    expected = " or ".join(show_names(keys.split()) for keys in SHAPES[kind])
    raise BadLine(
        "missing key",
        f"kind {kind!r} needs {expected}; found {show_names(fields)}; "
        "ShareGPT {'conversations': [{'from', 'value'}, …]}, Alpaca {'instruction', 'output'}, "
        "Dolly {'instruction', 'response'} are read too, and "
        "data.columns=prompt:question,… names columns",
    )


def is_tie(fields: Fields) -> bool:
    """Whether an object is a pair of which neither side is preferred: there is no record of it."""
    tie = {"chosen", "rejected"} <= fields.keys() and fields.get("tie", False)
    if tie not in (True, False):
        raise BadLine("bad tie", f"field 'tie' must be true or false, not {excerpt(tie)}")
    return bool(tie)


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


def rename(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The object with the named columns under the fields' names, which replace others of that name.

    Raises:
        BadLine: it lacks a column.
    """
    for column in columns.values():
        if column not in fields:
            there = ", ".join(sorted(map(repr, fields)))
            raise BadLine("bad format", f"data.columns names {column!r}; there are {there}")
    rest = {k: v for k, v in fields.items() if k not in columns.values()}
    return rest | {field: fields[column] for field, column in columns.items()}


def parse_json(text: str) -> Any:
    """JSON whose objects have each key once, and no NaN; else BadLine."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadLine("invalid JSON", f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid JSON", str(error)[:EXCERPT]) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        key = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise BadLine("duplicate key", excerpt(key))
    return fields


def _no_constant(name: str) -> None:
    raise BadLine("invalid JSON", f"{name} is not JSON")


def _make(fields: Fields, kind: str, default_id: str, keys: frozenset[str]) -> Record:
    """The record of an object that has these keys, one of the kind's shapes."""
    stated, used = fields.get("id", default_id), keys - {"label"} | {"tools", "system"}
    name = str(stated) if type(stated) is int else string({"id": stated}, "id")
    if "text" in keys:
        text = string(fields, "text")
        if not text:
            raise BadLine("empty text", "field 'text'")
        return Text(name, text, _read_meta(fields, keys))
    if "label" in keys and fields["label"] not in (True, False):
        raise BadLine("bad label", f"field 'label' must be true or false, not {fields['label']!r}")
    if kind == "hh":
        sides = [_read_dialogue(fields, side) for side in ("chosen", "rejected")]
    else:
        sides = _read_sides(fields, keys)
    sides = [_add_system(side, fields) for side in sides]
    messages = sides[0]
    if "chosen" in keys:
        _check_pair(*sides)
        messages, margin = messages[:-1], _read_margin(fields)
        if kind != "prompt":
            chosen, rejected = (side[-1].content for side in sides)
            prompt, meta = _add_tools(messages, fields), _read_meta(fields, used | _OF_PAIRS)
            return Pair(name, prompt, chosen, rejected, margin, meta)
    if kind == "prompt":
        if messages and messages[-1].role == "assistant":
            check_messages(messages, reply_last=True)
            messages = messages[:-1]
        check_messages(messages, reply_last=False)
        return Prompt(name, _add_tools(messages, fields), _read_meta(fields, used))
    check_messages(messages, reply_last=True)
    return Conversation(name, _add_tools(messages, fields), _read_meta(fields, used))


def _add_system(messages: Messages, fields: Fields) -> Messages:
    """The messages after the system's, if a field of the record has one."""
    if not fields.get("system"):
        return messages
    if messages[:1] and messages[0].role == "system":
        raise BadLine("bad roles", "a field 'system' beside a message of the system")
    return (Message("system", string(fields, "system")), *messages)


def _check_pair(chosen: Messages, rejected: Messages) -> None:
    for side in (chosen, rejected):
        check_messages(side, reply_last=True)
    if chosen[:-1] != rejected[:-1]:
        raise BadLine("prompts differ", "'chosen' and 'rejected' must share all but the last turn")
    if chosen[-1].more or rejected[-1].more:
        raise BadLine("tool call", "a pair's replies are text; one that calls a tool is for sft")


def _read_sides(fields: Fields, keys: frozenset[str]) -> list[Messages]:
    """The whole conversations that the keys' fields hold: a pair's two, else one."""
    if "messages" in keys:
        return [_read_messages(fields, "messages")]
    replies = [key for key in ("response", "completion", "chosen", "rejected") if key in keys]
    if "prompt" in keys:
        prompt: Messages
        if isinstance(fields["prompt"], list):
            prompt = _read_messages(fields, "prompt")
        else:
            prompt = (Message("user", string(fields, "prompt")),)
        return [_read_side(fields, name, prompt) for name in replies] or [prompt]
    if not all(isinstance(fields[name], str) for name in replies):
        return [_read_side(fields, name, None) for name in replies]
    if string(fields, "chosen").startswith("\n\nHuman:"):
        return [_read_dialogue(fields, name) for name in replies]
    for name in ("question", "query", "input"):
        if name in fields:
            raise BadLine("no prompt", f"if {name!r} is it, say data.columns=prompt:{name}")
    return _split_texts(*(string(fields, name) for name in replies))


def _read_side(fields: Fields, name: str, prompt: Messages | None) -> Messages:
    """The whole conversation that ends with the reply or the messages of a field."""
    if isinstance(fields[name], list):
        messages = _read_messages(fields, name)
        if prompt is None or messages[: len(prompt)] == prompt:
            return messages
        return (*prompt, *messages)
    if prompt is None:
        raise BadLine(
            "wrong type",
            f"field {name!r}: without a 'prompt', both sides are lists of messages or texts",
        )
    return (*prompt, Message("assistant", string(fields, name)))


def _split_texts(*texts: str) -> list[Messages]:
    """The prompt is what the texts begin with, up to its last white space: no word is cut."""
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(*texts, strict=False))
    before = re.match(r"(?s).*(?=\s)", texts[0][: sum(1 for _ in same)])
    shared = before.end() if before else 0
    if not shared:
        raise BadLine(
            "no prompt", "'chosen' and 'rejected' share no beginning that leaves a reply to each"
        )
    prompt = Message("user", texts[0][:shared])
    return [(prompt, Message("assistant", text[shared:])) for text in texts]


def _read_dialogue(fields: Fields, name: str) -> Messages:
    """Turns of a Human/Assistant dialogue, without the white space around each."""
    before, *parts = _TURN.split(string(fields, name))
    if before.strip() or not parts:
        raise BadLine("not a dialogue", f"field {name!r} must start with '\\n\\nHuman:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_SPEAKERS[speaker], content.strip()) for speaker, content in turns)


def _read_messages(fields: Fields, name: str) -> Messages:
    if not isinstance(fields[name], list):
        raise BadLine("wrong type", f"field {name!r} must be a list, not {type_name(fields[name])}")
    messages = []
    for i, turn in enumerate(fields[name]):
        where = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise BadLine("bad message", f"{where} must have exactly 'role' and 'content'")
        turn = {k: v for k, v in turn.items() if v or k not in _OPTIONAL}
        allowed = [k for k, role in _OPTIONAL.items() if k in turn and turn.get("role") == role]
        if "tool_calls" in allowed and turn.get("content") is None:
            turn["content"] = ""
        if turn.keys() - set(allowed) != {"role", "content"}:
            raise BadLine(
                "bad message",
                f"{where} must have exactly 'role' and 'content', and what belongs to tool calls; "
                f"found {show_names(turn)}",
            )
        more: Fields = {k: string(turn, k) for k in allowed if k != "tool_calls"}
        if "tool_calls" in allowed:
            calls, where = turn["tool_calls"], f"{where}.tool_calls"
            if not isinstance(calls, list):
                raise BadLine("bad tool call", f"{where} must be a list")
            more["tool_calls"] = [_read_call(call, f"{where}[{k}]") for k, call in enumerate(calls)]
        messages.append(Message(string(turn, "role"), string(turn, "content"), _to_json(more)))
    return tuple(messages)


def _read_call(call: Any, where: str) -> Fields:
    """A call as templates expect it, its arguments an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or call.keys() - {"type", "id", "function"}
        or function.keys() - {"name", "arguments"}
        or call.get("type", "function") != "function"
    ):
        raise BadLine(
            "bad tool call",
            f'{where} must be {{"type": "function", "function": {{"name", "arguments"}}}}',
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    if not isinstance(arguments, dict):
        raise BadLine("bad tool call", f"{where}: 'arguments' must be an object or JSON of one")
    called = {"name": string(function, "name"), "arguments": arguments}
    begin = {"id": string(call, "id")} if "id" in call else {}
    return begin | {"type": "function", "function": called}


def _add_tools(messages: Messages, fields: Fields) -> Messages:
    """The messages, the first one with the record's tools."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools)
    if not tools or not messages:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadLine("bad tools", "field 'tools' must be a list of JSON schemas")
    first = messages[0]
    more = json.loads(first.more or "{}") | {"tools": tools}
    return (dataclasses.replace(first, more=_to_json(more)), *messages[1:])


def _to_json(value: Fields) -> str:
    """JSON, "" of nothing; BadLine for what UTF-8 cannot hold."""
    text = json.dumps(value, ensure_ascii=False) if value else ""
    return string({"tool_calls": text}, "tool_calls")


def string(fields: Fields, name: str) -> str:
    """The text of a field; BadLine unless it is a string that UTF-8 can hold, without NUL."""
    if name not in fields:
        raise BadLine("missing key", f"{name!r}")
    value = fields[name]
    if not isinstance(value, str):
        why = f"field {name!r} must be text, not {type_name(value)}"
        if isinstance(value, _TIMES):
            why += "; `datasets` takes JSON text for one where all of a column look like dates: "
            why += "name the JSON file in place of hf:…"
        raise BadLine("wrong type", why)
    if "\0" in value:
        raise BadLine("NUL character", f"field {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadLine("lone surrogate", f"field {name!r}") from error
    return value


def _read_margin(fields: Fields) -> float | None:
    value = fields.get("margin")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise BadLine("bad margin", f"field 'margin' must be a number ≥ 0, not {excerpt(value)}")
    return float(value)


def _read_meta(fields: Fields, used: frozenset[str]) -> dict[str, str]:
    """The keys no shape uses, as text: strings as they are, anything else as JSON, but no null.

    Dates, times and decimals of a table, which JSON lacks, are as Python writes them. What a reply
    is judged by must not be one: how it was written is lost.
    """
    stated = fields.get("meta", {})
    if not isinstance(stated, dict):
        raise BadLine("wrong type", "field 'meta' must be an object")
    meta = stated | {k: v for k, v in fields.items() if k not in used | {"id", "meta"}}
    meta = {k: v for k, v in meta.items() if v is not None}
    for key in _JUDGED_BY & meta.keys():
        if isinstance(meta[key], _TIMES):
            string(meta, key)
    meta = {k: v if isinstance(v, str) else _write(k, v) for k, v in meta.items()}
    for key, value in meta.items():
        string({key: key}, key)
        string({key: value}, key)
    return meta


def _write(key: str, value: Any) -> str:
    """A value of a field as text; BadLine for one that has none, such as an image."""

    def as_text(part: Any) -> str:
        if isinstance(part, _TEXTUAL):
            return str(part)
        raise BadLine(
            "wrong type", f"field {key!r} holds {type_name(part)}; leave the column out of the file"
        )

    return str(value) if isinstance(value, _TEXTUAL) else json.dumps(value, default=as_text)


def _translate_share_gpt(fields: Fields) -> Fields:
    messages = _take_system(fields)
    for i, turn in enumerate(fields.pop("conversations")):
        messages.append(_translate_turn(turn, f"conversations[{i}]"))
    if not {"chosen", "rejected"} <= fields.keys():
        return fields | {"messages": messages}
    for name in ("chosen", "rejected"):
        if isinstance(fields[name], dict):
            fields[name] = [_translate_turn(fields[name], name)]
    return fields | {"prompt": messages}


def _translate_turn(turn: Any, where: str) -> Fields:
    """A turn as ours; its call or calls, which are JSON of {"name", "arguments"}, as `tool_calls`.

    One with a role and a content is ours already: many sets have such under the same name.
    """
    if not isinstance(turn, dict) or not (
        {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()
    ):
        raise BadLine("bad format", f"{where} must have 'from' and 'value'")
    if not {"role", "content"} <= turn.keys():
        speaker, value = turn["from"], turn["value"]
        role = _SHARE_GPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else None
        for name in ("weight", "loss", "train"):  # by which some trainers leave replies untrained
            if role == "assistant" and turn.get(name) not in (None, 1):
                raise BadLine(
                    "bad format",
                    f"{where} is a reply with {name!r}: {turn[name]!r}, which is not followed "
                    "here: replies are trained alike; leave such conversations out",
                )
        turn = _turn(role, value)
        if speaker == "function_call":
            turn = _turn(role, "") | {"tool_calls": value}
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = parse_json(calls)
        calls = calls if isinstance(calls, list) else [calls]
        turn = turn | {"tool_calls": [{"type": "function", "function": call} for call in calls]}
    return turn


def _translate_alpaca(fields: Fields) -> Fields:
    turns = _take_system(fields)
    history = fields.pop("history", None) or []
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise BadLine("bad format", "'history' must be a list of [instruction, output]")
    for instruction, output in history:
        turns += [_turn("user", instruction), _turn("assistant", output)]
    asked = fields.pop("instruction")
    for name in ("input", "context"):
        more = fields.pop(name, None)
        if more is not None and not (isinstance(more, str) and isinstance(asked, str)):
            raise BadLine("bad format", f"'instruction' and {name!r} must be texts")
        if more:
            asked = f"{asked}\n\n{more}"
    fields["prompt"] = [*turns, _turn("user", asked)]
    for name in ("output", "response"):
        if name in fields and "chosen" not in fields:
            fields["completion"] = fields.pop(name)
    return fields


def _take_system(fields: Fields) -> list[Fields]:
    """The system's turn, if there is one, which is taken out of the fields."""
    system = fields.pop("system", None)
    return [_turn("system", system)] if system else []


def _turn(role: str | None, content: Any) -> Fields:
    return {"role": role, "content": content}


def show_names(keys: Any) -> str:
    return "{" + ", ".join(excerpt(key) for key in sorted(keys)[:10]) + "}"


def type_name(value: Any) -> str:
    """A value's type as JSON calls it."""
    return {"NoneType": "null", "dict": "object"}.get(type(value).__name__, type(value).__name__)


def excerpt(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return ascii(text if len(text) <= EXCERPT else text[:EXCERPT] + "…")


# Another tool's shape: name, the keys and types that it is known by, what makes it ours.
FOREIGN: tuple[tuple[str, dict[str, type], Callable[[Fields], Fields]], ...] = (
    ("ShareGPT", {"conversations": list}, _translate_share_gpt),
    ("Dolly", {"instruction": object, "context": object}, _translate_alpaca),
    ("Dolly", {"instruction": object, "response": object}, _translate_alpaca),
    ("Alpaca", {"instruction": object}, _translate_alpaca),
)
_CONVERSATIONS = ("messages", "prompt response", "prompt completion")
_PAIRS = ("prompt chosen rejected", "chosen rejected")
# Kind → the keys of its shapes; an object has the first one whose keys it has.
SHAPES = {
    "text": ("text", *_CONVERSATIONS),
    "conversation": _CONVERSATIONS,
    "prompt": ("messages", "prompt", "chosen rejected"),
    "pair": _PAIRS,
    "preference": (*_PAIRS, *(f"{keys} label" for keys in _CONVERSATIONS)),
    "hh": ("chosen rejected",),
}
