"""Files of JSON objects to records, strictly: a bad line is named, or counted if that is allowed.

Files hold JSON lines; `.json` files hold lines or one array of objects; `.parquet` files rows that
are such objects, whose nulls are absent keys. All may be compressed by gzip or xz but the last.
What an object may look like is in `shapes`.
"""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_jax.data import shapes
from rlhf_jax.data.records import Record
from rlhf_jax.data.shapes import EXCERPT, BadLine, Fields
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

MAX_LINE_BYTES = 16 * 2**20
SUFFIXES = (".jsonl", ".json", ".parquet", ".gz", ".xz")
_BOM = b"\xef\xbb\xbf"
_SLICE = re.compile(r"\[(?!:\])(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\]")
_SPACE = re.compile(r"[ \t\r\n]*")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_jsonl(
    path: str | os.PathLike,
    kind: str,
    *,
    max_bad_fraction: float = 0.0,
    skipped: Counter[str] | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    told: Callable[[int, str], object] | None = None,
) -> list[Record]:
    """The records of a file, all of one shape.

    Args:
      kind: "text", "conversation", "prompt", "pair", "preference" or "hh"; see `shapes`.
      max_bad_fraction: the share of lines, in [0, 1), that may be bad. They are skipped, counted by
        reason, and the counts logged as a warning. At 0 the first bad line ends the reading.
      skipped: if given, receives those counts.
      rows: objects to read in place of the file's; `path` then only names them.
      columns: field of the shape → column of the file, where names differ.
      told: called with each line's number and why it makes no record, "" if it does.

    Raises UserError naming file, line, field and an excerpt.
    """
    if kind not in shapes.SHAPES:
        known = ", ".join(shapes.SHAPES)
        raise UserError(f"unknown kind {kind!r} of JSONL file; known: {known}")
    same = _SameShape(kind, columns)
    records = read_lines(
        path, same.convert, max_bad_fraction=max_bad_fraction, skipped=skipped, rows=rows, told=told
    )
    how = same.shown + "".join(f", {k} from {v!r}" for k, v in columns.items())
    how += f", read as {kind}" + (f"; ties left out: {same.ties:,}" if same.ties else "")
    print(f"{path}: {len(records):,} records of {how}", flush=True)
    return records


@dataclass
class _SameShape:
    """Makes records of objects that have the shape of the first one."""

    kind: str
    columns: Mapping[str, str]
    first: tuple[str, str] = ("", "")
    ties: int = 0

    @property
    def shown(self) -> str:
        return self.first[0] or self.first[1]

    def convert(self, fields: Fields, default_id: str) -> Record | None:
        if self.columns:
            fields = shapes.rename(fields, self.columns)
        if shapes.is_tie(fields) and self.kind != "prompt":  # no reply of which is read
            self.ties += 1
            return None
        record, (name, keys) = shapes.make_record(fields, self.kind, default_id)
        if not self.shown:
            self.first = (name, keys)
        # A set may have Dolly's rows with a context and without: Alpaca's and Dolly's are the same.
        if keys != self.first[1] or bool(name) != bool(self.first[0]):
            raise BadLine("mixed format", f"{name or keys} after lines with {self.shown}")
        return record


def read_lines(
    path: str | os.PathLike,
    convert: Callable[[Fields, str], Record | None],
    *,
    max_bad_fraction: float = 0.0,
    skipped: Counter[str] | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    told: Callable[[int, str], object] | None = None,
) -> list[Record]:
    """`read_jsonl` for a shape of one's own.

    `convert(fields, default_id)` makes a record of one line's object, None of one that is left out,
    or raises BadLine.
    """
    if not 0 <= max_bad_fraction < 1:
        raise UserError(f"max_bad_fraction must be in [0, 1), got {max_bad_fraction}")
    numbered: Iterable[tuple[int, Any]]
    if rows is None:
        numbered = _read_numbered(path)
    else:
        numbered = ((i, _drop_nulls(dict(row))) for i, row in enumerate(rows, 1))
    reasons: Counter[str] = Counter()
    records, first_error, lines = [], "", 0
    for number, raw in numbered:
        stop_point()
        lines += 1
        try:
            fields = raw if isinstance(raw, dict) else _parse_object(raw)
            record, why = convert(fields, f"{Path(path).name}:{number}"), ""
            if record is None:
                why = "a tie, which is left out"
            else:
                records.append(record)
        except BadLine as error:
            why = str(error)
            reasons[error.reason] += 1
            excerpt = shapes.excerpt(raw)
            first_error = first_error or f"{path}:{number}: {error}; the line: {excerpt}"
            if max_bad_fraction == 0:
                knob = "data.max_bad_fraction (or --max-bad-fraction) lets a share of lines be bad"
                raise UserError(f"{first_error}; {knob}") from error
        if told is not None:
            told(number, why)
    bad = reasons.total()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if bad > max_bad_fraction * lines:
        raise UserError(
            f"{path}: {bad} of {lines} lines are bad ({counts}), more than "
            f"max_bad_fraction={max_bad_fraction} allows; first: {first_error}"
        )
    if not records:
        raise UserError(f"{path}: no records in the file, or ties alone")
    if bad:
        logging.warning("%s: skipped %d bad lines (%s)", path, bad, counts)
    if skipped is not None:
        skipped.update(reasons)
    return records


def count_rows(path: str | os.PathLike) -> int:
    """The lines of a file that are not blank, a table's rows or an array's objects."""
    return sum(1 for _ in _read_numbered(path))


def take_slice(records: Sequence[Any], part: str, name: str) -> list[Any]:
    """The records that a slice names, as TFDS reads slices: "[:95%]", "[100:200]", "[-10:]".

    A per cent is that of all records, to the nearest record. One from the end that comes to no
    record names the end, where TFDS takes it for the start: "[-1%:]" of 40 records is empty.

    Raises UserError for another grammar, a bound beyond the records, or a slice without any.
    """
    match, count = _SLICE.fullmatch(part), len(records)
    if match is None:
        raise UserError(f"data: {name}{part}: a slice looks like [:95%], [95%:] or [100:200]")
    bounds: list[int | None] = []
    for number, percent in (match.group(1, 2), match.group(3, 4)):
        bound = None if number is None else int(number)
        if bound is not None and percent:
            nearest = round(bound * count / 100)
            bound = count if bound < 0 and nearest == 0 else nearest
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


def _read_numbered(path: str | os.PathLike) -> Iterator[tuple[int, bytes | str | Fields]]:
    """(1-based number, content) of each line, object of an array or row of a table."""
    if Path(path).suffix == ".parquet":
        return _read_rows(path)
    if ".jsonl" not in Path(path).suffixes:
        first = next(iter(_read_raw_lines(path)), (0, b""))[1]
        if first.removeprefix(_BOM).lstrip().startswith(b"["):
            return _read_array(path)
    return _read_raw_lines(path)


def _read_array(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """The members of a JSON array, which is read whole; a broken one ends the reading."""
    try:
        with open_bytes(path) as file:
            text = file.read().removeprefix(_BOM).decode("utf-8")
    except (*_BROKEN, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    number, position = 0, _skip_space(text, text.index("[") + 1)
    try:
        while text[position : position + 1] != "]" or number:
            number += 1
            _, end = json.JSONDecoder().raw_decode(text, position)
            yield number, text[position:end]
            position = _skip_space(text, end)
            if text[position : position + 1] != ",":
                break
            position = _skip_space(text, position + 1)
        if text[position : position + 1] != "]" or text[position + 1 :].strip():
            raise json.JSONDecodeError("expected , or the array's end", text, position)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: invalid JSON array: {where}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON array: {str(error)[:EXCERPT]}") from error


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_raw_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(1-based number, content) of each line that is not blank, in bounded memory.

    A line above the limit is cut after as many bytes as the limit and one more.
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
    except _BROKEN as error:
        where = f"{path}:{number + 1}" if number else str(path)
        raise UserError(f"{where}: cannot read: {error}") from error


def _read_rows(path: str | os.PathLike) -> Iterator[tuple[int, Fields]]:
    """(1-based number, object) of each row of a Parquet file, a few at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, _drop_nulls(fields)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read row {number + 1}: {str(error)[:200]}") from error


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None}
    return [_drop_nulls(v) for v in value] if isinstance(value, list) else value


def _parse_object(raw: bytes | str) -> Fields:
    """The object that a line or an array's member holds; BadLine if it holds none."""
    if isinstance(raw, bytes):
        if len(raw) > MAX_LINE_BYTES:
            raise BadLine("line too long", f"over {MAX_LINE_BYTES >> 20} MiB")
        if raw.startswith(_BOM):
            raise BadLine("byte order mark", "save the file as UTF-8 without a BOM")
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadLine("bad UTF-8", f"column {error.start + 1}") from error
    fields = shapes.parse_json(raw)
    if not isinstance(fields, dict):
        raise BadLine("wrong type", f"expected an object, got {shapes.type_name(fields)}")
    return fields
