"""A user's reward function in a process of its own, where it may raise, hang, crash or print.

    python -m rlhf_jax.rewards.worker FILE.py:FUNCTION

reads requests and writes replies as JSON, one a line: first a reply to loading the file, then one
to each request.

    request   {"prompts": [[{"role", "content"}, …], …], "responses": […], "columns": {name: […]}}
    reply     {"values": [number, …], "wrong": {index: "what that value is instead"}}
              {"fault": [reason, detail]}

`Worker` is the other end. Both need little but the standard library, so a worker starts fast.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import math
import os
import reprlib
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NoReturn

from rlhf_jax.stopping import stop_point

LOAD_SECONDS = 120.0
"""How long importing the user's file may take; it may well import a large library."""

_POLL_SECONDS = 0.2
_CHUNK = 1 << 16  # bytes; what a pipe holds
_LAST_READS = 16
_TAIL = 4000  # bytes kept of what the worker prints
_SHOWN = 400  # characters of it, and of an exception's message, in an error


class WorkerFault(Exception):
    """A whole batch has no score: `reason` is one of a few, for counting; `detail` is for people.

    Reasons: "not loaded", "raised", "no list", "wrong length", "timed out", "died".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Worker:
    """Runs the function `target` = "path.py:function" in its own process and process group.

    The process starts at once, is killed with all its children when it takes too long, and is
    started again by the next call. It sees no accelerator (JAX_PLATFORMS=cpu) unless the user's
    file says otherwise: the trainer's memory is not to be shared by accident.

    Raises:
        WorkerFault: the file or function can't be loaded.
    """

    def __init__(self, target: str) -> None:
        path, _, function = target.rpartition(":")
        self._target = f"{Path(path).resolve()}:{function}"
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = b""
        self._running()

    @property
    def pid(self) -> int | None:
        """The process, None where there is none at the moment."""
        return None if self._process is None else self._process.pid

    def call(
        self, request: Mapping[str, Any], seconds: float
    ) -> tuple[list[float], dict[int, str]]:
        """The function's values, which may be NaN or inf, and what those are that are no numbers.

        Raises:
            WorkerFault: it raised, returned no list of the right length, took longer than `seconds`
                or ended its process.
            Preempted: a stop was asked for meanwhile (see `stopping`); the process is killed.
        """
        process = self._running()
        line = json.dumps(request).encode() + b"\n"
        reply = self._exchange(process, line, seconds)
        return reply["values"], {int(index): what for index, what in reply["wrong"].items()}

    def close(self) -> None:
        """Kills the process, its children too, and waits for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stdin, stdout, stderr = _pipes(process)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_LAST_READS):  # not to the end: a child that got away may print on
                self._printed(os.read(stderr.fileno(), _CHUNK))
        for pipe in (stdin, stdout, stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _printed(self, data: bytes) -> None:
        self._errors = (self._errors + data)[-_TAIL:]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            root = str(Path(__file__).resolve().parents[2])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_jax.rewards.worker", self._target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
            )
            for pipe in _pipes(self._process):
                os.set_blocking(pipe.fileno(), False)
            try:
                self._exchange(self._process, b"", LOAD_SECONDS)
            except BaseException:
                self.close()
                raise
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], line: bytes, seconds: float
    ) -> dict[str, Any]:
        """Sends a line, if any, and receives one; any failure but the function's ends the process.

        All three pipes are served at once: the worker may print more than a pipe holds before it
        has read its request.
        """
        stdin, stdout, stderr = _pipes(process)
        deadline = time.monotonic() + seconds
        unsent, reply = memoryview(line), bytearray()
        self._errors = b""
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(stdout, selectors.EVENT_READ)
                ready.register(stderr, selectors.EVENT_READ)
                if unsent:
                    ready.register(stdin, selectors.EVENT_WRITE)
                while not reply.endswith(b"\n"):
                    stop_point()
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self._abort("timed out", f"took longer than {seconds:g} s")
                    events = ready.select(min(left, _POLL_SECONDS))
                    if not events and process.poll() is not None:
                        self._abort("died")  # a child of its own still holds the pipe open
                    for key, _ in events:
                        if key.fileobj is stdin:
                            try:
                                unsent = unsent[os.write(key.fd, unsent) :]
                            except BrokenPipeError:
                                unsent = unsent[:0]
                            if not unsent:
                                ready.unregister(stdin)
                        elif data := os.read(key.fd, _CHUNK):
                            if key.fileobj is stderr:
                                self._printed(data)
                            else:
                                reply += data
                        elif key.fileobj is stderr:
                            ready.unregister(stderr)
                        else:
                            self._abort("died")
            decoded = json.loads(reply)
        except WorkerFault:
            raise
        except BaseException:  # interrupted: the reply would be taken for that to the next request
            self.close()
            raise
        if "fault" in decoded:
            raise WorkerFault(*decoded["fault"])
        return decoded

    def _abort(self, reason: str, detail: str = "") -> NoReturn:
        """Ends the process and raises, with the last that it printed."""
        process = self._process
        assert process is not None
        if reason == "died":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)  # its pipes close a moment before it is gone
            code = process.poll()
            detail = "closed its pipes" if code is None else _ending(code)
        self.close()
        printed = " ".join(self._errors.decode(errors="replace").split())
        shown = f"; it last printed: {printed[-_SHOWN:]}" if printed else ""
        raise WorkerFault(reason, detail + shown)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin and process.stdout and process.stderr
    return process.stdin, process.stdout, process.stderr


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit status {code}"
    return f"ended its process with signal {-code} ({signal.strsignal(-code)})"


def main(target: str) -> None:
    """Serves requests until there are no more, then ends itself and whatever it started."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The user's code gets neither end of the protocol: it reads nothing, and prints to stderr.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    sys.dont_write_bytecode = True
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, lines), daemon=True).start()

    path, _, name = target.rpartition(":")
    reply: dict[str, Any]
    try:
        function, reply = _load(path, name), {"values": [], "wrong": {}}
    except WorkerFault as fault:
        function, reply = None, {"fault": ["not loaded", fault.detail]}
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        request = json.loads(lines.get())
        assert function is not None
        try:
            reply = _call(function, path, request)
        except WorkerFault as fault:
            reply = {"fault": [fault.reason, fault.detail]}


def _receive(requests: IO[bytes], lines: SimpleQueue[bytes]) -> None:
    """Queues requests; their end is the parent's, and this process must not outlive it.

    This is a thread so that a function that hangs doesn't keep the process alive either.
    """
    for line in requests:
        lines.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)  # started by hand, its group is the shell's


def _load(path: str, name: str) -> Callable[..., Any]:
    if not Path(path).is_file():
        raise WorkerFault("not loaded", f"there is no file {path}")
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("rlhf_jax_user_reward", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise WorkerFault("not loaded", _describe(error, path)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise WorkerFault("not loaded", f"{path} has no function {name!r}")
    return function


def _call(function: Callable[..., Any], path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    responses, columns = request["responses"], request["columns"]
    try:
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            columns = {name: column for name, column in columns.items() if name in parameters}
        count = len(responses)
        result = function(request["prompts"], responses, **columns)
        result = _plain(result)
        if not isinstance(result, list | tuple):
            got = f"{type(result).__name__} {reprlib.repr(result)}"
            raise WorkerFault("no list", f"returned {got} instead of a list of {count} numbers")
        if len(result) != count:
            raise WorkerFault(
                "wrong length", f"returned {len(result)} scores for {count} responses"
            )
        values, wrong = [], {}
        for index, value in enumerate(map(_plain, result)):
            if isinstance(value, bool | int | float):
                values.append(_to_float(value))
            else:
                values.append(math.nan)
                wrong[index] = f"{type(value).__name__} {reprlib.repr(value)}"
    except WorkerFault:
        raise
    except BaseException as error:  # SystemExit too
        raise WorkerFault("raised", _describe(error, path)) from error
    return {"values": values, "wrong": wrong}


def _plain(value: Any) -> Any:
    """Arrays and scalars of NumPy, JAX or PyTorch as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _describe(error: BaseException, path: str) -> str:
    """In one line, what was raised and the last line of the user's file that led there."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message can't be shown)"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == path]
    where = f" ({path}, line {lines[-1]})" if lines else ""
    shown = message if len(message) <= _SHOWN else message[:_SHOWN] + "…"
    return f"raised {type(error).__name__}: {shown}{where}"


if __name__ == "__main__":
    main(sys.argv[1])
