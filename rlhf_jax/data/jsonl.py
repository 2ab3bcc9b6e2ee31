"""JSON lines to records, strictly: a bad line is named, or counted under an explicit allowance.

Formats by kind (any other key becomes a `meta` entry; `id` is optional; files may be .gz or .xz, or
.parquet, whose rows are such objects and whose nulls are absent keys, or .json, JSON lines or one
array of objects). ShareGPT, Alpaca and Dolly are read too, see `foreign`.

    text          {"text": str}, or a conversation, its turns as in `records.convert`
    conversation  {"messages": [{"role", "content"}, …]}, or {"prompt": str | messages} with
                  "response": str or "completion": str | messages
    prompt        {"prompt": str | messages}, {"messages": […]} or a pair; the reply that ends
                  messages is left away
    pair          {"prompt", "chosen", "rejected"}: replies as text or as messages,
                  or {"chosen": messages, "rejected": messages} that share all but the last, or as
                  "\\n\\nHuman: …\\n\\nAssistant: …" dialogues, or as texts whose prompt is what
                  both begin with, up to its last white space
    preference    a pair, or a conversation with a "label": true where its last reply is good
    hh            {"chosen", "rejected"} as such dialogues → pairs

An assistant's message may have "tool_calls", [{"type": "function", "function": {"name",
"arguments": object or JSON of one}}], beside an empty or absent content; a tool's a "name" and a
"tool_call_id"; and a record "tools", a list of JSON schemas or JSON of one.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import logging
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_jax.data.conversation import check_messages
from rlhf_jax.data.foreign import ACCEPTED, Untranslatable, renamed, translated
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text
from rlhf_jax.data.records import convert as convert_record
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

MAX_LINE_BYTES = 16 * 2**20
SUFFIXES = (".jsonl", ".json", ".parquet", ".gz", ".xz")
_BOM = b"\xef\xbb\xbf"
_EXCERPT = 80
_SLICE = re.compile(r"\[(?!:\])(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\]")
_OPTIONAL = {"tool_calls": "assistant", "name": "tool", "tool_call_id": "tool"}  # key → its role
_TURN = re.compile(r"\n\n(Human|Assistant):")


class BadLine(Exception):
    """One line that is no record: `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_jsonl(
    path: str | os.PathLike,
    kind: str,
    *,
    max_bad_fraction: float = 0.0,
    skipped: Counter[str] | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Record]:
    """The records of a JSON-lines file, all of one format.

    Args:
      kind: "text", "conversation", "prompt", "pair", "preference" or "hh"; see the module's
        docstring.
      max_bad_fraction: the share of lines, in [0, 1), that may be bad. They are skipped, counted by
        reason, and the counts logged as a warning. At 0 the first bad line ends the reading.
      skipped: if given, receives those counts.
      rows: objects to read in place of the file's; `path` then only names them.
      columns: field of the format → column of the file, where names differ.

    Raises UserError naming file, line, field and an excerpt.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown kind {kind!r} of JSONL file; known: {', '.join(FORMATS)}")
    formats: list[tuple[str, frozenset[str]]] = []

    def convert(fields: dict[str, Any], default_id: str) -> Record:
        try:
            name, fields = translated(renamed(fields, columns) if columns else fields, kind)
        except Untranslatable as error:
            raise BadLine("bad format", str(error)) from error
        keys, build = _detect_format(fields, kind)
        record = build(_with_calls(fields) if name else fields, default_id, keys)
        found = (name, keys)
        if not formats:
            formats.append(found)
        # A set may have Dolly's rows with a context and without: Alpaca's and Dolly's are the same.
        if keys != formats[0][1] or (name == "") != (formats[0][0] == ""):
            raise BadLine(
                "mixed format", f"{_shown(*found)} after lines with {_shown(*formats[0])}"
            )
        return record

    records = read_lines(
        path, convert, max_bad_fraction=max_bad_fraction, skipped=skipped, rows=rows
    )
    how = _shown(*formats[0]) + "".join(f", {k} from {v!r}" for k, v in columns.items())
    print(f"{path}: {len(records):,} records of {how}, read as {kind}", flush=True)
    return records


def read_lines(
    path: str | os.PathLike,
    convert: Callable[[dict[str, Any], str], Record],
    *,
    max_bad_fraction: float = 0.0,
    skipped: Counter[str] | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
) -> list[Record]:
    """`read_jsonl` for a format of one's own.

    `convert(fields, default_id)` makes a record of one line's object, or raises BadLine.
    """
    if not 0 <= max_bad_fraction < 1:
        raise UserError(f"max_bad_fraction must be in [0, 1), got {max_bad_fraction}")
    reasons: Counter[str] = Counter()
    records, first_error = [], ""
    numbered: Iterable[tuple[int, Any]]
    if rows is not None:
        numbered = ((i, _without_nulls(dict(row))) for i, row in enumerate(rows, 1))
    else:
        numbered = _numbered(path)
    for number, raw in numbered:
        stop_point()
        try:
            if isinstance(raw, BadLine):
                raise raw
            fields = raw if isinstance(raw, dict) else _parse(raw)
            records.append(convert(fields, f"{Path(path).name}:{number}"))
        except BadLine as error:
            reasons[error.reason] += 1
            first_error = first_error or f"{path}:{number}: {error}; the line: {_excerpt(raw)}"
            if max_bad_fraction == 0:
                knob = "data.max_bad_fraction lets a share of bad lines be skipped"
                raise UserError(f"{first_error}; {knob}") from error
    bad = reasons.total()
    if bad > max_bad_fraction * (bad + len(records)):
        raise UserError(
            f"{path}: {bad} of {bad + len(records)} lines are bad ({_counts(reasons)}), more than "
            f"max_bad_fraction={max_bad_fraction} allows; first: {first_error}"
        )
    if not records:
        raise UserError(f"{path}: no records in the file")
    if bad:
        logging.warning("%s: skipped %d bad lines (%s)", path, bad, _counts(reasons))
    if skipped is not None:
        skipped.update(reasons)
    return records


def count_rows(path: str | os.PathLike) -> int:
    """The lines of a file that are not blank, a table's rows or an array's objects."""
    return sum(1 for _ in _numbered(path))


def take_slice(records: Sequence[Record], part: str, name: str) -> list[Record]:
    """The records that a slice names, as TFDS reads slices: "[:95%]", "[100:200]", "[-10:]".

    A per cent is that of all records, to the nearest record.

    Raises UserError for another grammar, a bound beyond the records, or a slice without any.
    """
    found, count = _SLICE.fullmatch(part), len(records)
    if found is None:
        raise UserError(f"data: {name}{part}: a slice looks like [:95%], [95%:] or [100:200]")
    bounds: list[int | None] = []
    for number, percent in (found.group(1, 2), found.group(3, 4)):
        bound = None if number is None else int(number)
        if bound is not None and percent:
            bound = round(bound * count / 100)
        if bound is not None and abs(bound) > count:
            raise UserError(f"data: {name}{part}: there are only {count} records")
        bounds.append(bound)
    taken = list(records[slice(*bounds)])
    if not taken:
        raise UserError(f"data: {name}{part} is empty: there are {count} records in all")
    return taken


def open_bytes(path: str | os.PathLike) -> BufferedIOBase:
    """Opens a file for reading, through gzip or xz if its first bytes say so."""
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if magic == b"\xfd7zXZ\x00":
        return lzma.open(path, "rb")
    return open(path, "rb")


def _numbered(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """(1-based number, bytes, object or BadLine) of each line, row or object of an array."""
    if Path(path).suffix == ".parquet":
        return _rows(path)
    if ".jsonl" in Path(path).suffixes or not _is_array(path):
        return _raw_lines(path)
    return _array(path)


def _is_array(path: str | os.PathLike) -> bool:
    first = next(iter(_raw_lines(path)), (0, b""))[1]
    return first.removeprefix(_BOM).lstrip().startswith(b"[")


def _array(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON array, which is read whole; a broken one ends the reading."""
    try:
        with open_bytes(path) as file:
            text = file.read().removeprefix(_BOM).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    strict = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    position, number = _after(text, text.index("[") + 1), 0
    try:
        while text[position : position + 1] != "]" or number:
            number += 1
            try:
                value, end = strict.raw_decode(text, position)
                if not isinstance(value, dict):
                    value = BadLine("wrong type", f"expected an object, got {_type(value)}")
            except BadLine as error:
                value, (_, end) = error, json.JSONDecoder().raw_decode(text, position)
            yield number, value
            position = _after(text, end)
            if text[position : position + 1] != ",":
                break
            position = _after(text, position + 1)
        if text[position : position + 1] != "]" or text[position + 1 :].strip():
            raise json.JSONDecodeError("expected , or the array's end", text, position)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: invalid JSON array: {where}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON array: {str(error)[:_EXCERPT]}") from error


def _after(text: str, position: int) -> int:
    """The place of the first character from `position` on that is no white space."""
    found = re.compile(r"[ \t\r\n]*").match(text, position)
    assert found is not None
    return found.end()


def _raw_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(1-based number, content) of each line that is not blank, in bounded memory.

    Of a line above the limit only the first bytes come back, one more than the limit.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = raw
                while not rest.endswith(b"\n") and len(rest) > MAX_LINE_BYTES:
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if raw.strip():
                    yield number, raw.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        where = f"{path}:{number + 1}" if number else str(path)
        raise UserError(f"{where}: cannot read: {error}") from error


def _rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based number, object) of each row of a Parquet file, a few at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(fields)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read row {number + 1}: {str(error)[:200]}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise BadLine("line too long", f"over {MAX_LINE_BYTES >> 20} MiB")
    if raw.startswith(_BOM):
        raise BadLine("byte order mark", "save the file as UTF-8 without a BOM")
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine("bad UTF-8", f"column {error.start + 1}") from error
    try:
        fields = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadLine("invalid JSON", f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid JSON", str(error)[:_EXCERPT]) from error
    if not isinstance(fields, dict):
        raise BadLine("wrong type", f"expected an object, got {_type(fields)}")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        key = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise BadLine("duplicate key", _excerpt(key))
    return fields


def _no_constant(name: str) -> None:
    raise BadLine("invalid JSON", f"{name} is not JSON")


def _detect_format(fields: dict[str, Any], kind: str) -> tuple[frozenset[str], Callable]:
    """The widest format of the kind whose keys are all there."""
    for keys, build in FORMATS[kind]:
        if keys <= fields.keys():
            return keys, build
    expected = " or ".join(_names(keys) for keys, _ in FORMATS[kind])
    raise BadLine(
        "missing key",
        f"kind {kind!r} needs {expected}; found {_names(fields.keys())}; {ACCEPTED} are read too, "
        "and data.columns=prompt:question,… names columns",
    )


def _shown(name: str, keys: frozenset[str]) -> str:
    return name or _names(keys)


def _with_calls(fields: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT conversation, with the calls that are JSON texts as lists of calls."""
    for turn in fields.get("messages", fields.get("prompt")) or ():
        if isinstance(turn, dict) and isinstance(turn.get("tool_calls"), str):
            calls = _parse(b'{"calls":' + turn["tool_calls"].encode(errors="replace") + b"}")[
                "calls"
            ]
            calls = calls if isinstance(calls, list) else [calls]
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return fields


def _text_record(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Text:
    text = string(fields, "text")
    if not text:
        raise BadLine("empty text", "field 'text'")
    return Text(_id(fields, default_id), text, _meta(fields, keys))


def _conversation_text(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Record:
    return convert_record(_conversation(fields, default_id, keys), "text")


def _conversation(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Conversation:
    if "messages" in keys:
        messages = _messages(fields, "messages")
    else:
        name = "response" if "response" in keys else "completion"
        messages = _side(fields, name, _prompt(fields))
    _check(messages, reply_last=True)
    return Conversation(
        _id(fields, default_id), _with_tools(messages, fields), _meta(fields, keys | {"tools"})
    )


def _unpaired(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Conversation:
    if fields["label"] not in (True, False):
        raise BadLine("bad label", f"field 'label' must be true or false, not {fields['label']!r}")
    return _conversation(fields, default_id, keys - {"label"})


def _prompt_record(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Prompt:
    if "chosen" in keys:
        messages = _pair(fields, default_id, keys).prompt
    else:
        messages = _messages(fields, "messages") if "messages" in keys else _prompt(fields)
    if messages and messages[-1].role == "assistant":
        _check(messages, reply_last=True)
        messages = messages[:-1]
    _check(messages, reply_last=False)
    return Prompt(
        _id(fields, default_id), _with_tools(messages, fields), _meta(fields, keys | {"tools"})
    )


def _pair(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Pair:
    prompt = _prompt(fields) if "prompt" in keys else None
    if prompt is None and all(isinstance(fields[name], str) for name in ("chosen", "rejected")):
        if string(fields, "chosen").startswith("\n\nHuman:"):
            return _hh_pair(fields, default_id, keys)
        return _shared_prefix_pair(fields, default_id, keys)
    sides = [_side(fields, name, prompt) for name in ("chosen", "rejected")]
    return _make_pair(sides, fields, default_id, keys)


def _hh_pair(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Pair:
    sides = [_dialogue(fields, name) for name in ("chosen", "rejected")]
    return _make_pair(sides, fields, default_id, keys)


def _shared_prefix_pair(fields: dict[str, Any], default_id: str, keys: frozenset[str]) -> Pair:
    """The prompt is what both texts begin with, up to its last white space: no word is cut."""
    texts = [string(fields, name) for name in ("chosen", "rejected")]
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(*texts, strict=False))
    before = re.match(r"(?s).*(?=\s)", texts[0][: sum(1 for _ in same)])
    shared = before.end() if before else 0
    if not shared:
        raise BadLine(
            "no prompt", "'chosen' and 'rejected' share no beginning that leaves a reply to each"
        )
    prompt = Message("user", texts[0][:shared])
    sides = [(prompt, Message("assistant", text[shared:])) for text in texts]
    return _make_pair(sides, fields, default_id, keys)


def _make_pair(
    sides: Sequence[tuple[Message, ...]],
    fields: dict[str, Any],
    default_id: str,
    keys: frozenset[str],
) -> Pair:
    for side in sides:
        _check(side, reply_last=True)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise BadLine("prompts differ", "'chosen' and 'rejected' must share all but the last turn")
    if chosen[-1].more or rejected[-1].more:
        raise BadLine("tool call", "a pair's replies are text; one that calls a tool is for sft")
    return Pair(
        _id(fields, default_id),
        _with_tools(chosen[:-1], fields),
        chosen[-1].content,
        rejected[-1].content,
        _margin(fields),
        _meta(fields, keys | {"margin", "tools"}),
    )


def _side(
    fields: dict[str, Any], name: str, prompt: tuple[Message, ...] | None
) -> tuple[Message, ...]:
    """The whole conversation of one side of a pair."""
    if isinstance(fields[name], list):
        messages = _messages(fields, name)
        if prompt is None or messages[: len(prompt)] == prompt:
            return messages
        return (*prompt, *messages)
    if prompt is None:
        raise BadLine(
            "wrong type",
            f"field {name!r}: without a 'prompt', both sides are lists of messages or texts",
        )
    return (*prompt, Message("assistant", string(fields, name)))


def _dialogue(fields: dict[str, Any], name: str) -> tuple[Message, ...]:
    """Turns of a Human/Assistant dialogue, without the white space around each."""
    before, *parts = _TURN.split(string(fields, name))
    if before.strip() or not parts:
        raise BadLine("not a dialogue", f"field {name!r} must start with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(roles[speaker], content.strip()) for speaker, content in turns)


def _prompt(fields: dict[str, Any]) -> tuple[Message, ...]:
    if isinstance(fields["prompt"], list):
        return _messages(fields, "prompt")
    return (Message("user", string(fields, "prompt")),)


def _messages(fields: dict[str, Any], name: str) -> tuple[Message, ...]:
    if not isinstance(fields[name], list):
        raise BadLine("wrong type", f"field {name!r} must be a list, not {_type(fields[name])}")
    return tuple(_message(turn, f"{name}[{i}]") for i, turn in enumerate(fields[name]))


def _message(turn: Any, where: str) -> Message:
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
            f"found {_names(turn.keys())}",
        )
    more: dict[str, Any] = {k: string(turn, k) for k in allowed if k != "tool_calls"}
    if "tool_calls" in allowed:
        calls, where = turn["tool_calls"], f"{where}.tool_calls"
        if not isinstance(calls, list):
            raise BadLine("bad tool call", f"{where} must be a list")
        more["tool_calls"] = [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]
    return Message(string(turn, "role"), string(turn, "content"), _as_json(more))


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as templates expect it, its arguments an object."""
    function = call.get("function") if isinstance(call, dict) else None
    known = isinstance(function, dict) and not (
        call.keys() - {"type", "id", "function"} or function.keys() - {"name", "arguments"}
    )
    if not known or call.get("type", "function") != "function":
        raise BadLine(
            "bad tool call",
            f'{where} must be {{"type": "function", "function": {{"name", "arguments"}}}}',
        )
    assert isinstance(function, dict)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse(arguments.encode("utf-8", "surrogatepass"))
    if not isinstance(arguments, dict):
        raise BadLine("bad tool call", f"{where}: 'arguments' must be an object or JSON of one")
    called = {"name": string(function, "name"), "arguments": arguments}
    begin = {"id": string(call, "id")} if "id" in call else {}
    return begin | {"type": "function", "function": called}


def _with_tools(messages: tuple[Message, ...], fields: dict[str, Any]) -> tuple[Message, ...]:
    """The messages, the first one with the record's tools."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = _parse(b'{"tools":' + tools.encode("utf-8", "surrogatepass") + b"}")["tools"]
    if not tools or not messages:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadLine("bad tools", "field 'tools' must be a list of JSON schemas")
    first = messages[0]
    more = json.loads(first.more or "{}") | {"tools": tools}
    return (dataclasses.replace(first, more=_as_json(more)), *messages[1:])


def _as_json(value: dict[str, Any]) -> str:
    """JSON, "" of nothing; BadLine for what UTF-8 cannot hold."""
    text = json.dumps(value, ensure_ascii=False) if value else ""
    return string({"tool_calls": text}, "tool_calls")


def _check(messages: tuple[Message, ...], *, reply_last: bool) -> None:
    try:
        check_messages(messages, reply_last=reply_last)
    except UserError as error:
        raise BadLine("bad roles", str(error)) from error


def string(fields: dict[str, Any], name: str) -> str:
    """The text of a field; BadLine unless it is a string that UTF-8 can hold, without NUL."""
    if name not in fields:
        raise BadLine("missing key", f"{name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise BadLine("wrong type", f"field {name!r} must be text, not {_type(value)}")
    if "\0" in value:
        raise BadLine("NUL character", f"field {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadLine("lone surrogate", f"field {name!r}") from error
    return value


def _id(fields: dict[str, Any], default: str) -> str:
    value = fields.get("id", default)
    return str(value) if type(value) is int else string({"id": value}, "id")


def _margin(fields: dict[str, Any]) -> float | None:
    value = fields.get("margin")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise BadLine("bad margin", f"field 'margin' must be a number ≥ 0, not {_excerpt(value)}")
    return float(value)


def _meta(fields: dict[str, Any], used: frozenset[str]) -> dict[str, str]:
    """The keys no format uses, as text: strings as they are, anything else as JSON."""
    stated = fields.get("meta", {})
    if not isinstance(stated, dict):
        raise BadLine("wrong type", "field 'meta' must be an object")
    meta = stated | {k: v for k, v in fields.items() if k not in used | {"id", "meta"}}
    meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    for key, value in meta.items():
        string({key: key}, key)
        string({key: value}, key)
    return meta


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _names(keys: Any) -> str:
    return "{" + ", ".join(_excerpt(key) for key in sorted(keys)[:10]) + "}"


def _type(value: Any) -> str:
    return {"NoneType": "null", "dict": "object"}.get(type(value).__name__, type(value).__name__)


def _excerpt(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return ascii(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…")


_PAIRS = (
    (frozenset({"prompt", "chosen", "rejected"}), _pair),
    (frozenset({"chosen", "rejected"}), _pair),
)
FORMATS: dict[str, tuple[tuple[frozenset[str], Callable], ...]] = {
    "text": (
        (frozenset({"text"}), _text_record),
        (frozenset({"messages"}), _conversation_text),
        (frozenset({"prompt", "response"}), _conversation_text),
        (frozenset({"prompt", "completion"}), _conversation_text),
    ),
    "conversation": (
        (frozenset({"messages"}), _conversation),
        (frozenset({"prompt", "response"}), _conversation),
        (frozenset({"prompt", "completion"}), _conversation),
    ),
    "prompt": tuple(
        (frozenset(keys), _prompt_record)
        for keys in ({"messages"}, {"prompt"}, {"chosen", "rejected"})
    ),
    "pair": _PAIRS,
    "preference": (
        *_PAIRS,
        (frozenset({"messages", "label"}), _unpaired),
        (frozenset({"prompt", "response", "label"}), _unpaired),
        (frozenset({"prompt", "completion", "label"}), _unpaired),
    ),
    "hh": ((frozenset({"chosen", "rejected"}), _hh_pair),),
}
