"""Files that are whole or absent, JSON that is read strictly, JSONL that survives damaged lines."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rlhf_jax import hosts
from rlhf_jax.errors import NoRoom, UserError, lack_of_room

Parsed = TypeVar("Parsed")

# The fields of a finished run's summary.json, for `check_fields`.
SUMMARY_FIELDS = MappingProxyType(
    {
        "stage": str,
        "status": str,
        "config_hash": str,
        "parents": {"role": str},
        "wall_seconds": int | float,
        "metrics": {"name": int | float},
    }
)


@contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raises NoRoom when what happens inside fails because a disk is full.

    Args:
      path: what is written inside.
      needed: the bytes that takes.
    """
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        reason = lack_of_room(error)
        if reason is None:
            raise
        raise NoRoom(path, needed, reason) from error


def sync_directory(path: Path) -> None:
    """Makes renames inside the directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Writes a file so that it is the old one or the new one, never half of it.

    Of several processes that call this the first one writes it, unless it is `shared`.

    Args:
      shared: whether other processes may write the same file at the same time.

    Raises:
      NoRoom: the disk is full; the old file is still there.
    """
    if shared:
        _write_whole(path, data, path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp"))
    else:
        hosts.by_first(lambda: _write_whole(path, data, path.with_name(f"{path.name}.tmp")))


def _write_whole(path: Path, data: bytes, temporary: Path) -> None:
    with room_for(path, len(data)):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with `write_whole`."""
    write_whole(path, json_text(value).encode())


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line with `write_whole`."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(path, "".join(lines).encode())


def append_whole(file: int, data: bytes, path: Path) -> None:
    """Appends to an open file, all of `data` or nothing.

    Args:
      file: a descriptor that only this process writes to, opened with O_APPEND.
      path: of the file, for the message.

    Raises:
      NoRoom: the disk is full.
    """
    end, rest = os.fstat(file).st_size, memoryview(data)
    with room_for(path, len(data)):
        try:
            while rest:
                written = os.write(file, rest)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                rest = rest[written:]
        except BaseException:
            os.ftruncate(file, end)
            raise


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
      ValueError: it is something else, or a name stands twice in an object of it, of which readers
        would take one or the other.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is not JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, not a {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: there is no such file, it cannot be read, or `parse_object` refuses it.
    """
    try:
        return parse_object(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error


def check_fields(
    path: Path, value: Mapping[str, Any], fields: Mapping[str, Any], *, required: bool = True
) -> None:
    """Compares what a file holds with what it must.

    Args:
      fields: {name: type}; {name: {…: type}} is an object of any names, its values of that type.
      required: whether every field must be there.

    Raises:
      UserError: a field is missing or of another type.
    """
    for name, kind in fields.items():
        if name not in value and not required:
            continue
        if not _fits(value.get(name), kind):
            what = f"{name} is of another type" if name in value else f"it has no {name}"
            raise UserError(f"{path} is not as this package writes it: {what}")


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, dict):
        return isinstance(value, kind)
    (inner,) = kind.values()
    return isinstance(value, dict) and all(_fits(each, inner) for each in value.values())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {twice[:80]!r} twice")
    return value


def read_lines(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> list[tuple[bytes, Parsed]]:
    """The lines of a JSONL file, as they stand there and parsed; none where there is no file.

    A line that is no JSON object, that `parse` takes for none of its own, or that does not end is
    damaged: a warning says so, and it is left out.

    Args:
      parse: raises ArithmeticError, LookupError, TypeError or ValueError.
    """
    lines: list[tuple[bytes, Parsed]] = []
    damaged = []
    texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text.decode())
            if not isinstance(value, dict) or not text.endswith(b"\n"):
                raise ValueError
            lines.append((text, parse(value)))
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            damaged.append(number)
    if damaged:
        logging.warning(
            "%s: damaged lines are left out: %d of %d, the first is line %d",
            path, len(damaged), len(texts), damaged[0],
        )  # fmt: skip
    return lines


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """A line of a metrics.jsonl as numbers, which has a "step"."""
    return {name: float(line[name]) for name in ("step", *line)}


class _Lossy(io.FileIO):
    """Takes what a full disk has no room for, or nobody reads any more, and drops it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if lack_of_room(error) is None and not isinstance(error, BrokenPipeError):
                raise
            return memoryview(data).nbytes


def tolerate_full_logs() -> None:
    """Has what this process prints be lost, not end it, where it has no room or no reader.

    That is a file on a full disk, or a pipe whose reader is gone: Ctrl-C ends a `| tee` too.
    """
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        if before is None:  # it was closed before this process began
            continue
        file = io.BufferedWriter(_Lossy(before.fileno(), "w", closefd=False))
        by_line = before.line_buffering or before.write_through
        after = io.TextIOWrapper(file, before.encoding, before.errors, line_buffering=by_line)
        setattr(sys, name, after)
