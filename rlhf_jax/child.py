"""A function in a Python process of its own, where it may raise, hang, crash, print or fill memory.

`Child` starts this file as a program and talks with it in JSON, one object per line. The first line
says what to load, and each later one holds the arguments of one call. Each line is answered by

    {"value": …} or {"fault": [reason, detail, name of the exception's class]}

This file imports nothing but the standard library, so that a child starts fast.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import IO, Any

_POLL_SECONDS = 0.2
_CHUNK = 1 << 16  # bytes; the size of a pipe
_LAST_READS = 16
_TAIL = 4000  # bytes of the child's output that are remembered
_SHOWN = 400  # characters of that output, and of an exception's message, in an error


class ChildFault(Exception):
    """A call has no answer: `reason` is one of a few, for counting; `detail` is for people.

    Reasons: "not loaded", "raised", "timed out", "died", and those with which the function itself
    raises this. `error` is the name of the class of any other exception that it raised.
    """

    def __init__(self, reason: str, detail: str, error: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.error = reason, detail, error


@dataclass(eq=False)
class Child:
    """Calls a function in a process and process group of its own.

    The process starts with the first call, and again with the next one after its end. It is killed
    with all its children when a call takes too long or is interrupted, when this object goes and
    when this process ends, however that happens. It sees no accelerator (JAX_PLATFORMS=cpu) unless
    its code says otherwise: this process's memory is not to be shared by accident. What it prints
    appears in errors only. Calls from several threads wait for each other.
    """

    file: str  # path of a Python file
    maker: str  # name of the function in it that returns the one to be called
    arguments: Mapping[str, Any]  # JSON, the maker's keyword arguments
    load_seconds: float  # how long the start may take
    blame: str = ""  # path of the file whose last line in an exception's traceback is named
    memory: int | None = None  # bytes of address space that the process may have
    isolated: bool = False  # Python sees no PYTHON… of the environment, no working directory
    python: str = sys.executable  # the interpreter; another one is best isolated from this one's
    while_waiting: Callable[[], None] | None = None  # called often; what it raises ends the process
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _printed: bytes = field(default=b"", init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def pid(self) -> int | None:
        """The process's id, None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process if there is none.

        Raises:
            ChildFault: the function can't be loaded.
        """
        if self._process is not None:
            return
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.isolated:  # as by -I, which would ignore the seed of hashes too
            environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
            environment["PYTHONSAFEPATH"] = "1"
        # Sets of texts have one order in every process, or a resumed run would not be exact.
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [self.python, *(["-s", __file__] if self.isolated else ["-m", __name__])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone
            env=environment,
        )
        self._kill = weakref.finalize(self, _kill, self._process)
        for pipe in _pipes(self._process):
            os.set_blocking(pipe.fileno(), False)
        names = ("file", "maker", "arguments", "blame", "memory")
        try:
            self._exchange({name: getattr(self, name) for name in names}, self.load_seconds)
        except BaseException:
            self.close()
            raise

    def call(self, arguments: Mapping[str, Any], seconds: float) -> Any:
        """Returns what the function makes of these keyword arguments, after a way through JSON.

        Raises:
            ChildFault: it could not be loaded, raised an exception, took longer than `seconds` or
                ended its process. The process is still there only if it raised.
        """
        with self._lock:
            self.start()
            return self._exchange(arguments, seconds)

    def close(self) -> None:
        """Kills the process, its children too, and waits for its end."""
        if self._process is not None:
            self._process = None
            self._printed += self._kill() or b""

    def _exchange(self, message: Mapping[str, Any], seconds: float) -> Any:
        """Sends a message and returns the value that answers it.

        The process does not outlive a failure to get an answer: one that comes later would be taken
        for that to the next message.
        """
        process = self._process
        assert process is not None
        self._printed = b""
        line = json.dumps(message).encode() + b"\n"
        try:
            answer = json.loads(self._converse(process, line, time.monotonic() + seconds))
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            reason, detail = "timed out", f"took longer than {seconds:g} s"
            if not isinstance(error, TimeoutError):
                reason, detail = "died", _describe_end(process)
            self.close()
            printed = " ".join(self._printed[-_TAIL:].decode(errors="replace").split())
            shown = f"; it last printed: {printed[-_SHOWN:]}" if printed else ""
            raise ChildFault(reason, detail + shown) from None
        except BaseException:
            self.close()
            raise
        if "fault" in answer:
            raise ChildFault(*answer["fault"])
        return answer["value"]

    def _converse(
        self, process: subprocess.Popen[bytes], line: bytes, deadline: float
    ) -> bytearray:
        """Sends a line and returns the one that is received.

        All three pipes are served at once: the child may print more than a pipe holds before it
        has read its line.

        Raises:
            TimeoutError: the deadline has passed.
            EOFError, BrokenPipeError: the process has ended, or closed its end of the pipe.
        """
        stdin, stdout, stderr = _pipes(process)
        unsent, received = memoryview(line), bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(stdin, selectors.EVENT_WRITE)
            ready.register(stdout, selectors.EVENT_READ)
            ready.register(stderr, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if self.while_waiting is not None:
                    self.while_waiting()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                events = ready.select(min(left, _POLL_SECONDS))
                if not events and process.poll() is not None:
                    raise EOFError  # a child of its own still holds the pipe open
                for key, _ in events:
                    if key.fileobj is stdin:
                        unsent = unsent[os.write(key.fd, unsent) :]
                        if not unsent:
                            ready.unregister(stdin)
                    elif data := os.read(key.fd, _CHUNK):
                        if key.fileobj is stdout:
                            received += data
                        else:
                            self._printed = self._printed[-_TAIL:] + data
                    elif key.fileobj is stdout:
                        raise EOFError
                    else:
                        ready.unregister(stderr)
        return received


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin and process.stdout and process.stderr
    return process.stdin, process.stdout, process.stderr


def _kill(process: subprocess.Popen[bytes]) -> bytes:
    """Ends a process and its group; returns the last that it printed."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stdin, stdout, stderr = _pipes(process)
    printed = b""
    with suppress(BlockingIOError):
        for _ in range(_LAST_READS):  # not to the end: a child that got away may print on
            printed += os.read(stderr.fileno(), _CHUNK)
    for pipe in (stdin, stdout, stderr):
        with suppress(BrokenPipeError):
            pipe.close()
    return printed


def _describe_end(process: subprocess.Popen[bytes]) -> str:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)  # its pipes close a moment before it is gone
    code = process.poll()
    if code is None:
        return "closed its pipes"
    if code >= 0:
        return f"ended its process with exit status {code}"
    return f"ended its process with signal {-code} ({signal.strsignal(-code)})"


def load_module(path: str) -> ModuleType:
    """Runs a Python file as a module, which `sys.modules` has too."""
    spec = importlib.util.spec_from_file_location(f"rlhf_jax_child_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answers lines until there are no more, then ends itself and whatever it started."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The function gets neither end of the protocol: it reads nothing, and prints to stderr.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    sys.dont_write_bytecode = True
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, lines), daemon=True).start()

    function, blame = None, ""
    while True:
        message = json.loads(lines.get())
        try:
            value = None
            if function is not None:
                value = function(**message)
            else:
                if sys.version_info < (3, 11):  # noqa: UP036, another interpreter runs this too
                    raise ChildFault("not loaded", f"{sys.executable} is older than Python 3.11")
                blame, memory = message["blame"], message["memory"]
                if memory is not None:
                    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
                make = getattr(load_module(message["file"]), message["maker"])
                function = make(**message["arguments"])
            answer = json.dumps({"value": value})
        except ChildFault as fault:
            answer = json.dumps({"fault": [fault.reason, fault.detail]})
        except BaseException as error:  # SystemExit too
            reason = "not loaded" if function is None else "raised"
            name = type(error).__name__
            answer = json.dumps({"fault": [reason, describe(error, blame), name]})
        replies.write(answer.encode() + b"\n")
        replies.flush()


def _receive(requests: IO[bytes], lines: SimpleQueue[bytes]) -> None:
    """Queues lines; their end is the parent's, and this process must not outlive it.

    This is a thread so that a function that hangs doesn't keep the process alive either.
    """
    try:
        for line in requests:
            lines.put(line)
    finally:
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(0)  # started by hand, its group is the shell's


def describe(error: BaseException, blame: str) -> str:
    """In one line, what was raised and the last line of the file `blame` that led there."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message can't be shown)"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == blame]
    where = f" ({blame}, line {lines[-1]})" if lines else ""
    shown = message if len(message) <= _SHOWN else message[:_SHOWN] + "…"
    return f"raised {type(error).__name__}: {shown}{where}"


if __name__ == "__main__":
    if "rlhf_jax" not in sys.modules:  # it is run as a file, maybe by another interpreter, which
        package = sys.modules["rlhf_jax"] = ModuleType("rlhf_jax")  # is to see nothing beside it
        package.__path__ = [str(Path(__file__).resolve().parent)]
        os.environ.pop("PYTHONSAFEPATH", None)  # it is not for what this starts
    sys.modules["rlhf_jax.child"] = sys.modules[__name__]  # for the file that is loaded
    main()
