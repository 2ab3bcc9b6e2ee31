"""A model's own chat template: messages → the text between which its tokens are found.

Rendering happens in a process of its own (`template_worker`), so that no template can hang, fill
the memory or reach anything.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rlhf_jax.errors import UserError

SECONDS = 10.0  # for the renderings of one request, with the process's start
MEMORY = 1 << 29  # bytes of the process
CHARACTERS = 4_000_000  # of one rendering
_WORKER = Path(__file__).with_name("template_worker.py")


class Template:
    """A Jinja chat template and the special tokens it may name; read when it first renders."""

    def __init__(self, source: str, variables: Mapping[str, str]):
        self.source, self.variables = source, dict(variables)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of the conversation; raises as `render_all`."""
        wanted = [(range(len(messages)), add_generation_prompt)]
        return self.render_all(messages, wanted, tools=tools)[0]

    def render_all(
        self,
        messages: Sequence[Mapping[str, Any]],
        wanted: Sequence[tuple[Sequence[int], bool]],
        *,
        tools: Sequence[Any] | None = None,
    ) -> list[str]:
        """Texts of several conversations, each (places of its messages, add_generation_prompt).

        Raises:
            UserError: it is no Jinja template, refuses the messages, fails, takes longer than
                `SECONDS` or writes more than `CHARACTERS`.
        """
        renderings = [(list(places), opened) for places, opened in wanted]
        given = {"messages": list(messages), "tools": tools}
        # An answer is about as long as one rendering may be.
        at_once = max(1, CHARACTERS // len(json.dumps(given)))
        texts: list[str] = []
        with self._lock:
            for i in range(0, len(renderings), at_once):
                request = given | {"renderings": renderings[i : i + at_once]}
                texts += self._exchange(self._running(), request)["texts"]
        return texts

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), str(MEMORY), str(CHARACTERS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for this process alone
            )
            self._process = process
            weakref.finalize(self, _end, process)
            self._exchange(process, {"template": self.source, "variables": self.variables})
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> Any:
        reply = _ask(process, json.dumps(request).encode() + b"\n")
        if isinstance(reply, str):
            self._process = None
            _end(process)
            raise UserError(f"the chat template {reply}")
        if "error" in reply:
            if "template" in request:
                self._process = None
                _end(process)
            raise UserError(f"the chat template fails: {reply['error']}")
        return reply


def _ask(process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | str:
    """The worker's reply, or what is wrong with it."""
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    sent = threading.Thread(target=_send, args=(stdin, line), daemon=True)
    sent.start()
    deadline, parts = time.monotonic() + SECONDS, [b""]
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return f"takes longer than {SECONDS:g} s"
            part = stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not part:
                return "ended its process: it needs too much memory"
            parts.append(part)
    return json.loads(b"".join(parts))


def _send(stdin: IO[bytes], line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        stdin.write(line)
        stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
