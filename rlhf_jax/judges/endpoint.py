"""A judge behind an OpenAI-compatible address: a chat model that is asked for one word."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import Answers, Comparison, question

KEY = "OPENAI_API_KEY"  # the environment variable; the key is in no field, file or message
ASK = "Two answers to a prompt follow. Reply with the one word First or the one word Second."
_HOST = r"(?P<host>[\w-]{1,63}(\.[\w-]{1,63})*\.?)"  # else no name can be looked up
_ADDRESS = re.compile(rf"http(?P<tls>s?)://{_HOST}(:(?P<port>\d{{1,5}}))?(/[\w./-]*)?", re.ASCII)
_VERDICT = re.compile(r"\s*(first|second)\.?\s*", re.IGNORECASE)
_WAITS = (0.0, 1.0, 8.0)  # seconds before it is asked, and asked again where that may help
_AT_ONCE, _SECONDS = 8, 120.0  # requests; for a whole reply, however its bytes come


@dataclass(frozen=True)
class EndpointJudge:
    """A chat model that says in one word, at temperature 0, which answer is better: P is 1 or 0.

    It has no verdict where it says anything else, is cut off, or the server refuses or fails.

    Attributes:
      address: "https://host/v1", by http on this machine. model: as the server names it.
    """

    address: str
    model: str

    def __post_init__(self) -> None:
        """Refuses an address that is none, tells a secret, or would have the key sent openly."""
        found, key = _ADDRESS.fullmatch(self.address), os.environ.get(KEY, "")
        if not found or not self.model or int(found["port"] or 0) > 65535:
            raise UserError(f"a judge's address is https://host/v1,model=name; its key is ${KEY}")
        if key and not (found["tls"] or found["host"] in ("127.0.0.1", "localhost")):
            raise UserError(f"{self.address}: ${KEY} is only sent by https, or on this machine")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"${KEY} has a character that no header can hold, as a line's end")

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`; where none of the first requests is answered it raises UserError."""
        said: list[tuple[float, str]] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part in (shown[:_AT_ONCE], shown[_AT_ONCE:]):
                said += pool.map(lambda each: self._ask(each, principle), part)
                if said and all(why.startswith("the server") for _, why in said):
                    why = said[0][1]
                    raise UserError(f"{self.address} answers none of {len(said)} requests: {why}")
        missing = {i: why for i, (_, why) in enumerate(said) if why}
        return Answers(np.array([value for value, _ in said]), missing)

    def _ask(self, shown: Comparison, principle: Principle) -> tuple[float, str]:
        asked = [message.to_json() for message in question(shown, principle)]
        turns = [{"role": "system", "content": ASK}, *asked]
        body = json.dumps({"model": self.model, "messages": turns, "temperature": 0})
        why = ""
        for wait in _WAITS:
            time.sleep(wait)
            try:
                status, reply = self._send(body)
            except (OSError, HTTPException) as error:
                why = f"the server gives no reply: {type(error).__name__}"
                continue
            if status == 200:
                return read_verdict(reply)
            why = f"the server says {status}"
            if status != 429 and status < 500:
                break
        return np.nan, why

    def _send(self, body: str) -> tuple[int, bytes]:
        parts, key = urlsplit(self.address), os.environ.get(KEY)
        make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = make(parts.hostname or "", parts.port, timeout=_SECONDS)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers["Content-Type"] = "application/json"
        late, deadline = threading.Event(), time.monotonic() + _SECONDS
        connection.connect()
        # The connection's own limit is one for each wait, and begins anew with every byte.
        timer = threading.Timer(deadline - time.monotonic(), _hang_up, (connection.sock, late))
        timer.daemon = True
        timer.start()
        try:  # it follows no redirection, nor does the key
            connection.request("POST", f"{parts.path}/chat/completions", body, headers)
            response = connection.getresponse()
            answer = response.status, response.read(1 << 20)
        except (OSError, HTTPException):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():  # what was read may end anywhere
            raise TimeoutError
        return answer


def _hang_up(connected: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it has ended meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def read_verdict(reply: bytes) -> tuple[float, str]:
    """1 for "First", 0 for "Second", and ""; of any other reply NaN and why it is no verdict."""
    try:
        choice = json.loads(reply)["choices"][0]
        said, ended = _VERDICT.fullmatch(choice["message"]["content"]), choice["finish_reason"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return np.nan, "a reply of another form"
    if said is None or ended != "stop":
        return np.nan, "says neither First nor Second" if ended == "stop" else "is cut off"
    return float(said[1].lower() == "first"), ""
