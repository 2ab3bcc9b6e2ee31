"""The two ways a run may end early without a bug in this package."""

from __future__ import annotations

import os
import re
import traceback

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75
_NO_MEMORY = re.compile(
    r"(?:(?:ran )?out of memory|cannot allocate memory"
    r"|(?:failed|unable|attempting) to allocate|bad_alloc).*",
    re.IGNORECASE,
)


class UserError(Exception):
    """A mistake of the user's: the message is one line saying what is wrong, where, what to do."""


class Preempted(Exception):
    """The run was asked to stop; its state is saved and the same command continues it."""


def lack_of_memory(error: BaseException) -> str | None:
    """What was asked for if memory, the host's or a device's, was not enough; else None.

    XLA's errors have no class of their own, and as their status RESOURCE_EXHAUSTED or INTERNAL.
    """
    if isinstance(error, UserError):
        return None
    found = _NO_MEMORY.search(str(error))
    if found is None and not isinstance(error, MemoryError):
        return None
    asked = found[0] if found else str(error) or "Python could not allocate what it needs"
    return " ".join(asked.split())[:300].rstrip(". ")


def mistake_in(path: str, error: Exception) -> UserError | None:
    """What the code of a user's config file raised, in one line; None if none of it led there."""
    frames = traceback.walk_tb(error.__traceback__)
    whole = os.path.abspath(path)
    lines = [n for frame, n in frames if os.path.abspath(frame.f_code.co_filename) == whole]
    if isinstance(error, SyntaxError) and error.filename and os.path.samefile(path, error.filename):
        lines = [error.lineno or 1]
    if not lines:
        return None
    text = " ".join(str(error).split())
    return UserError(f"{path}, line {lines[-1]}: {type(error).__name__}: {text}")
