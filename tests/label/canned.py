"""The page's server on pairs that were sampled before, without a model.

python -m tests.label.canned FOLDER PORT
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import uvicorn

from rlhf_jax.data.records import Message
from rlhf_jax.label.book import Book, Design
from rlhf_jax.label.files import PAIRS, LabelFiles, make_comparison
from rlhf_jax.label.retrain import Retraining
from rlhf_jax.label.server import Impatient, make_app

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


def main() -> None:
    """Serves until it is killed."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server_on(folder, listener, open_book(folder)).run(sockets=[listener])


if __name__ == "__main__":
    main()
