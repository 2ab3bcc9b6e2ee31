"""SIGTERM and SIGINT: the handler sets a flag, and what runs looks at it where it can give up.

An exception raised by a handler would come up anywhere, in a library that swallows it too. So the
first signal only asks for a stop, which `stop_point` raises as Preempted: between stages, batches
of an evaluation, dispatches of the sampler, records, figures. A second one ends the process at
once, with 130. Several processes stop together, wherever the signal came.

`timeout` and batch systems send one to a process and then to its group, which is one stop: what
comes within `TOGETHER` seconds of the first counts with it.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlhf_jax import hosts
from rlhf_jax.errors import EXIT_AT_ONCE, Preempted

TOGETHER = 0.1  # less than anybody takes to press Ctrl-C again

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE = b"stopped at once: the state on disk is valid; run the same command to continue\n"
_asked = ""  # the first signal by its name
_listens = False


def stop_asked() -> bool:
    """Whether a signal has come."""
    return bool(_asked)


def stop_point(*, together: bool = False) -> None:
    """A place where giving up loses nothing that isn't done again.

    Args:
      together: every process comes here, as often as the others. Only there do several stop.

    Raises:
      Preempted: a signal has come.
    """
    global _asked
    if hosts.count() > 1:
        if not (together and hosts.anyone("stop", bool(_asked))):
            return
        _asked = _asked or "another process's signal"
    if _asked:
        raise Preempted(f"{_asked} received; run the same command to continue")


def listen() -> None:
    """Lets the main thread of this process listen until its end."""
    _begin()
    # Python, when all is done, restores the default: a signal would then undo the exit code.
    atexit.register(_ignore)


@contextmanager
def listening() -> Iterator[None]:
    """Listens inside, if this is the main thread and it doesn't yet. Its end is a `stop_point`."""
    global _asked, _listens
    if _listens or threading.current_thread() is not threading.main_thread():
        yield  # signals are someone else's business
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    pipe, former = _begin()
    try:
        yield
        stop_point()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former)
        os.close(pipe)
        _asked, _listens = "", False


def _begin() -> tuple[int, int]:
    """Returns the end of a pipe that signals are written into, and what they were before.

    Python calls handlers between two of its own instructions: not while XLA compiles for a minute,
    and once for two signals that came meanwhile. The pipe tells a thread of the second at any time.
    """
    global _listens
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_count, args=(read,), name="signals", daemon=True).start()
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _ask)
    _listens = True
    return write, former


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _ask(number: int, frame: object) -> None:
    global _asked
    _asked = _asked or signal.Signals(number).name


def _count(read: int) -> None:
    first = None
    while numbers := os.read(read, 16):
        if not any(number in _SIGNALS for number in numbers):
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > TOGETHER:
            with suppress(OSError):  # nobody reads it, or its disk is full
                os.write(2, _AT_ONCE)
            os._exit(EXIT_AT_ONCE)
    os.close(read)
