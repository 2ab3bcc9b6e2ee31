"""The ways a run may end early without a bug in this package."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE = 0
EXIT_USER = 2
EXIT_RESUMABLE = 75
EXIT_AT_ONCE = 130  # by a second signal
# No space, no quota, a file larger than is allowed; what the system says of each.
_NO_ROOM = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_NO_MEMORY = re.compile(
    r"(?:(?:ran )?out of memory|cannot allocate memory"
    r"|(?:failed|unable|attempting) to allocate|bad_alloc).*",
    re.IGNORECASE,
)


class UserError(Exception):
    """A mistake of the user's: the message is one line saying what is wrong, where, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, or whose words have these initials, for a hint."""
    known = [*known]
    initials = {"".join(word[0] for word in re.split("_+", each) if word): each for each in known}
    if len(name) > 1 and name in initials:
        return initials[name]
    return difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]


class Preempted(Exception):
    """The run was asked to stop; its state is saved and the same command continues it."""


class NoRoom(Preempted):
    """A disk is full: what it holds is whole, and the same command goes on once there is room.

    Args:
      path: of the file or directory that was to be written.
      needed: the bytes that takes, None where that is not known.
      reason: what `lack_of_room` says of the error.

    Attributes:
      shortage: the message without what to do.
    """

    def __init__(self, path: str | os.PathLike, needed: int | None, reason: str):
        path = Path(path).absolute()
        directory = next(p for p in path.parents if p.is_dir())
        room = f"{shutil.disk_usage(directory).free} free in {directory}"
        if needed is not None:
            room = f"{needed} bytes needed, {room}"
        system = os.statvfs(directory)
        if system.f_files and not system.f_favail:
            room += ", which can hold no more files"
        self.shortage = f"no room for {path} ({reason}): {room}"
        super().__init__(f"{self.shortage}; make room and run the same command to continue")


def lack_of_room(error: BaseException) -> str | None:
    """Returns the system's words if an error, its own or a library's, says that a disk is full."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return _NO_ROOM[error.errno]
    return next((text for text in _NO_ROOM.values() if text in str(error)), None)


def lack_of_memory(error: BaseException) -> str | None:
    """Says what was asked for if memory, the host's or a device's, was not enough; else None.

    XLA's errors have no class of their own, and as their status RESOURCE_EXHAUSTED or INTERNAL.
    """
    if isinstance(error, UserError):
        return None
    match = _NO_MEMORY.search(str(error))
    if match is None and not isinstance(error, MemoryError):
        return None
    asked = match[0] if match else str(error) or "Python could not allocate what it needs"
    return " ".join(asked.split())[:300].rstrip(". ")


def mistake_in(path: str, error: Exception) -> UserError | None:
    """Says in one line what the code of a user's config raised; None if none of it led there."""
    frames = traceback.walk_tb(error.__traceback__)
    whole, real = os.path.abspath(path), os.path.realpath(path)
    lines = [n for frame, n in frames if os.path.abspath(frame.f_code.co_filename) == whole]
    if isinstance(error, SyntaxError) and os.path.realpath(error.filename or "") == real:
        lines = [error.lineno or 1]
    if not lines:
        return None
    text = " ".join(str(error).split())
    return UserError(f"{path}, line {lines[-1]}: {type(error).__name__}: {text}")
