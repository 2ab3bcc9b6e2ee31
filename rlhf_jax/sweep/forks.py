"""Runs as forks of processes that have loaded the libraries, which takes a run seconds otherwise.

There is such a process for every run that goes on at a time, pinned from its start to the run's
cores, as a process of the run's own would be; the next run on these cores has it in its turn. It
computes nothing: JAX has no backend in it and no library has started a thread that a fork would
miss, so that what is forked begins as an ordinary process does, and comes to the same bits. A run
does not need it any more, and outlives it. Where a file of the package has changed since it was
loaded, another one is started.

This file is also the program of such a process: `python -m rlhf_jax.sweep.forks` reads a JSON
object a line, {"words": what stands after python -m, "log": file}, and answers with two lines, the
id of the process of the run and, once that has ended, its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_jax.digests import ROOT, code_of
from rlhf_jax.malloc import tune_malloc
from rlhf_jax.sweep.engines import Engine, pinned

_LATE = ("jinja2", "matplotlib.figure", "rlhf_jax.stages.preflight")  # which runs import last


@contextmanager
def forks() -> Iterator[Engine]:
    """An engine whose runs are forks; within it the processes that they are forked from live."""
    loaded: list[_Loaded] = []

    def start(words: Sequence[str], log: Path, cores: set[int]) -> Fork:
        for each in [each for each in loaded if each.is_free() and not each.is_usable()]:
            loaded.remove(each)
            each.close()
        free = next((each for each in loaded if each.is_free() and each.cores == cores), None)
        if free is None:
            loaded.append(free := _Loaded.on(cores, log))
        return free.fork(words, log)

    try:
        yield start
    finally:
        for each in loaded:
            each.close()


@dataclass
class _Loaded:
    """A process that has loaded the libraries, or is about to, and forks a run at a time.

    Its answers are of the run that it has forked last, so that it must be free for the next.
    """

    process: subprocess.Popen[bytes]
    cores: set[int]
    files: dict[str, int]
    last: Fork | None = None

    @staticmethod
    def on(cores: set[int], log: Path) -> _Loaded:
        """Starts one; what it says if it cannot load is in the log of the run that it was for."""
        files = _package_files()  # before it loads them
        with pinned(cores), open(log, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in a terminal is for the sweep
            )
        return _Loaded(process, cores, files)

    def is_free(self) -> bool:
        """Whether the run that it has forked last is known to have ended."""
        return self.last is None or self.last.has_ended()

    def is_usable(self) -> bool:
        """Whether it is there, and what it has loaded is what the package's files say now."""
        return self.process.poll() is None and self.files == _package_files()

    def fork(self, words: Sequence[str], log: Path) -> Fork:
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"words": [*words], "log": str(log.resolve())}
        with suppress(BrokenPipeError):  # then it has no answer, which the fork says
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.last = Fork(self.process.stdout)
        return self.last

    def close(self) -> None:
        """Ends it after the run that it has forked, if that has not ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Fork:
    """A run as a `Process`, by what the process that has forked it says of it.

    Where that one ends first, the run counts as killed, though it may live: its directory's lock
    tells.
    """

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers = answers
        self.pid = 0  # before it is known
        self._code: int | None = None

    def poll(self) -> int | None:
        while self._code is None and select.select([self._answers], [], [], 0)[0]:
            self._read()
        return self._code

    def has_ended(self) -> bool:
        return self._code is not None

    def send_signal(self, number: int, /) -> None:
        while not self.pid and self._code is None:
            self._read()
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        while (code := self._code) is None:
            self._read()
        return code

    def _read(self) -> None:
        line = self._answers.readline()
        if not line:
            self._code = -signal.SIGKILL
        elif not self.pid:
            self.pid = int(line)
        else:
            self._code = int(line)


def _package_files() -> dict[str, int]:
    """When each file of this package was last changed, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in ROOT.rglob("*.py")}


def load() -> None:
    """Imports what runs of all stages do, but for the oracle's, and reads the package's code."""
    from rlhf_jax.stages.defaults import STAGES, module_of

    importlib.import_module("rlhf_jax.stages.chain")
    for stage in STAGES:
        if stage != "oracle":
            importlib.import_module(module_of(stage))
            code_of(module_of(stage))
    for name in _LATE:
        importlib.import_module(name)


def _serve() -> dict[str, Any] | None:
    """Forks a run for every request; in a fork its request is returned, at their end None."""
    with suppress(BrokenPipeError):  # who asked is gone
        while line := sys.stdin.buffer.readline():
            request: dict[str, Any] = json.loads(line)
            pid = os.fork()
            if pid == 0:
                return request
            os.write(1, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(1, f"{code}\n".encode())
    return None


def _become(words: Sequence[str], log: str) -> None:
    """Does in this process, in a session of its own, what `python -m` does of the words."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number, file in enumerate((nothing, printed, printed)):
        os.dup2(file, number)
    os.close(nothing)
    os.close(printed)
    sys.argv = [*words]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Loads, and then forks what the lines say."""
    load()
    request = _serve()
    if request is not None:
        _become(**request)


if __name__ == "__main__":
    tune_malloc()
    main()
