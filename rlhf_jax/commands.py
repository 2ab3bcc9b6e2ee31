"""The commands' common ways: a mistake is one line and exit code 2, a warning is one line."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rlhf_jax.errors import (
    EXIT_DONE,
    EXIT_RESUMABLE,
    EXIT_USER,
    NoRoom,
    Preempted,
    UserError,
    lack_of_memory,
    lack_of_room,
)

_OF_PATHS = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"in the command line: {message}")


def show_warnings() -> None:
    """Makes this process's warnings, of `logging` and of `warnings`, lines of the console's own."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        logging.warning("%s", " ".join(str(message).split()))

    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, force=True)
    warnings.showwarning = show


def run(
    parser: Parser, command: Callable[[argparse.Namespace], object], argv: Sequence[str] | None
) -> int:
    """Runs `command` on a command line (None: this process's) and returns the exit code."""
    if argv is None:
        show_warnings()
    try:
        command(parser.parse_args(argv))
        return EXIT_DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except Exception as error:
        full, asked = lack_of_room(error), lack_of_memory(error)
        if full is not None:
            shortage = error.shortage if isinstance(error, NoRoom) else f"no room: {full}"
            print(f"stopped: {shortage}; make room and run it again", file=sys.stderr)
            return EXIT_RESUMABLE
        if isinstance(error, Preempted):
            print(f"stopped: {error}", file=sys.stderr)
            return EXIT_RESUMABLE
        if isinstance(error, _OF_PATHS) and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return EXIT_USER
        if asked is None:
            raise
        print(f"error: memory ran out: {asked}", file=sys.stderr)
        return EXIT_USER
