"""The two ways a run may end early without a bug in this package."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75


class UserError(Exception):
    """A mistake of the user's: the message is one line saying what is wrong, where, what to do."""


class Preempted(Exception):
    """The run was asked to stop; its state is saved and the same command continues it."""
