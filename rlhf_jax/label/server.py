"""The page's server: on this machine alone, for who has the address with its secret.

Every request must name this server as its host, so that no other site's name leads here; one that
reads or changes anything must also come from this page and bring the secret, which stands behind
the # of the address and is never sent but as a header. The page has no text of anybody's in it: its
script gets them as JSON and shows them as text.
"""

from __future__ import annotations

import asyncio
import hmac
import unicodedata
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_jax.errors import NoRoom
from rlhf_jax.files import parse_object
from rlhf_jax.label.book import CHOICES, Book, Refused
from rlhf_jax.label.files import Line
from rlhf_jax.label.retrain import Retraining

_BODY_BYTES = 16_384
_SECONDS = 10.0  # in which a request must have come whole
_WEEK = 604_800  # seconds
_NAME = 60  # characters of a labeler's name
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets through what names this server, comes from its page and brings the secret."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        app = self._app if refusal is None else refusal
        await app(scope, receive, send_guarded)

    def _refusal(self, path: str, headers: dict[bytes, list[bytes]]) -> Response | None:
        """The answer to a request that is not let through."""
        host = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(host) != 1 or host[0] not in self._hosts:
            return _error(403, "this server has another name")
        if not path.startswith("/api/"):
            return None
        if headers.get(b"origin") != [f"http://{host[0]}".encode()]:
            return _error(403, "this request does not come from the labelling page")
        given = b" ".join(headers.get(b"authorization", []))
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return _error(403, "the address lacks its secret: open the one that was printed")
        return None


class Impatient(H11Protocol):
    """uvicorn's protocol, which hangs up where no request has come whole after some seconds."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def make_app(book: Book, retraining: Retraining, port: int, token: str) -> Starlette:
    """The application that serves a labelling directory on a port of this machine."""
    hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))
    style = _file("palette.css", of="rlhf_jax.report") + _file("label.css")
    routes = [
        Route("/", partial(_static, _file("label.html"), "text/html"), methods=["GET"]),
        Route("/label.css", partial(_static, style, "text/css"), methods=["GET"]),
        Route("/label.js", partial(_static, _file("label.js"), "text/javascript"), methods=["GET"]),
    ]
    actions: dict[str, Callable[[str, Line], Line]] = {
        "next": lambda name, asked: book.showing(name),
        "answer": partial(_answer, book),
        "undo": partial(_undo, book),
        "retrain": lambda name, asked: _retrain(book, retraining),
        "status": lambda name, asked: retraining.status(),
    }
    routes += [
        Route(f"/api/{name}", partial(_call, action), methods=["POST"])
        for name, action in actions.items()
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={HTTPException: _on_http, Refused: _on_refused, OSError: _on_disk,
                            NoRoom: _on_disk},
    )  # fmt: skip
    app.router.redirect_slashes = False
    return app


async def _static(body: str, kind: str, request: Request) -> Response:
    return Response(body, media_type=kind)


async def _call(action: Callable[[str, Line], Line], request: Request) -> Response:
    """Answers a call of the page; files are written in a thread, so that others need not wait."""
    asked = await _read(request)
    return JSONResponse(await run_in_threadpool(action, _name_in(asked), asked))


async def _read(request: Request) -> Line:
    """The JSON object of a request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "send application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > _BODY_BYTES:
                    raise Refused(413, f"at most {_BODY_BYTES} bytes")
    except TimeoutError:
        raise Refused(408, "the request did not come to its end") from None
    except ClientDisconnect:
        raise Refused(400, "the request ended early") from None
    try:
        return parse_object(bytes(data))
    except ValueError as error:
        raise Refused(400, f"the request {error}") from error


def _name_in(asked: Line) -> str:
    """The labeler's name, in the one way that Unicode spells it."""
    name = unicodedata.normalize("NFC", _text(asked, "labeler")).strip()
    if not name or len(name) > _NAME or not name.isprintable():
        raise Refused(400, f"a name has 1 to {_NAME} characters that can be printed")
    return name


def _text(asked: Line, field: str) -> str:
    if not isinstance(asked.get(field), str):
        raise Refused(400, f"{field!r} must be a text")
    return asked[field]


def _answer(book: Book, name: str, asked: Line) -> Line:
    choice, seconds = _text(asked, "choice"), asked.get("seconds")
    if choice not in CHOICES:
        raise Refused(400, f"'choice' is one of {', '.join(CHOICES)}")
    if not isinstance(seconds, int | float) or not 0 <= seconds <= _WEEK:
        raise Refused(400, "'seconds' must be a number, at least 0 and at most those of a week")
    stored = book.answer(name, _text(asked, "shown"), choice, round(float(seconds), 3))
    note = "" if stored else "This pair had your answer already, from another window: that stays."
    return book.showing(name) | {"note": note}


def _undo(book: Book, name: str, asked: Line) -> Line:
    book.undo(name, _text(asked, "shown"))
    return book.showing(name)


def _retrain(book: Book, retraining: Retraining) -> Line:
    retraining.start(book.votes())
    return retraining.status()


def _file(name: str, of: str = "rlhf_jax.label") -> str:
    return resources.files(of).joinpath(name).read_text("utf-8")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


async def _on_http(request: Request, error: Any) -> Response:
    return _error(error.status_code, str(error.detail))


async def _on_refused(request: Request, error: Any) -> Response:
    return _error(error.status, str(error))


async def _on_disk(request: Request, error: Any) -> Response:
    message = error.shortage if isinstance(error, NoRoom) else str(error)
    return _error(507, f"nothing is stored: {message}")
