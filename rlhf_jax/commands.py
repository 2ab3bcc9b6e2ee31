"""What the small commands share: a mistake ends in one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rlhf_jax.errors import EXIT_DONE, EXIT_USER, UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"in the command line: {message}")


def run(
    parser: Parser, command: Callable[[argparse.Namespace], object], argv: Sequence[str] | None
) -> int:
    """Runs `command` on a command line (None: this process's) and returns the exit code."""
    try:
        command(parser.parse_args(argv))
        return EXIT_DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
