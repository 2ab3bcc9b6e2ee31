"""Files that are whole or absent, and lines of which a damaged one costs only itself."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax.errors import NoRoom, lack_of_room

Parsed = TypeVar("Parsed")


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


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is the old one or the new one, never half of it.

    Raises:
      NoRoom: the disk is full; the old file is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
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
