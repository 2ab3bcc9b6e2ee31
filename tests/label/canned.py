"""The page's server on pairs that were sampled before, without a model.

python -m tests.label.canned FOLDER PORT
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import uvicorn

from rlhf_jax.data.records import Message
from rlhf_jax.label.book import Book, Design
from rlhf_jax.label.files import PAIRS, VOTES, LabelFiles, make_comparison
from rlhf_jax.label.retrain import Retraining
from rlhf_jax.label.server import Impatient, make_app

ROOT = Path(__file__).resolve().parents[2]
MARKUP = '</p><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'


def canned(count: int):
    """Pairs whose answers say what they are; the first ones hold markup."""
    return [
        make_comparison(
            (Message("user", f"Question {i}{MARKUP if i < 2 else ''}"),),
            (f"good {i}{MARKUP if i < 2 else ''}", f"bad {i}"),
            {"topic": "numbers"},
            models=("runs/a", "runs/b"),
            seed=7,
            candidate=i,
            more={"select": "random"},
        )
        for i in range(count)
    ]


def open_book(folder: Path, pairs: int = 60, overlap: int = 1, repeat_every: int = 5, checks=()):
    """The book of a folder that has these pairs."""
    files = LabelFiles(folder, {"made": "by hand"})
    if not (folder / PAIRS).exists():
        files.add_comparisons(canned(pairs))
    return Book(files, Design(pairs, overlap, repeat_every, seed=0), checks)


def server_on(folder: Path, listener: socket.socket, book: Book) -> uvicorn.Server:
    """A server that is not started yet."""
    retraining = Retraining(folder / "rounds", folder / "nowhere", ())
    app = make_app(book, retraining, listener.getsockname()[1], book.files.token())
    options = {"http": Impatient, "ws": "none", "lifespan": "off", "log_level": "critical"}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **options))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A labelling server as a process, which can be killed and started again on its port."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.port = folder, free_port()
        self.command = [sys.executable, "-m", *command] if command else None
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def start(self) -> None:
        canned = [sys.executable, "-m", "tests.label.canned", str(self.folder), str(self.port)]
        command = [*self.command, f"--port={self.port}"] if self.command else canned
        self.process = subprocess.Popen(command, cwd=ROOT)
        for _ in range(1200):
            assert self.process.poll() is None
            with socket.socket() as connection:
                if not connection.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.05)
        raise AssertionError("it does not listen")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/#{(self.folder / 'token').read_text()}"

    def votes(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / VOTES).read_text().splitlines()]


def main() -> None:
    """Serves until it is killed."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server_on(folder, listener, open_book(folder)).run(sockets=[listener])


if __name__ == "__main__":
    main()
