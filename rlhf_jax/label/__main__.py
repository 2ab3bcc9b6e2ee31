"""Has people compare two answers on a page in a browser, and trains a reward model from it.

    python -m rlhf_jax.label --workdir=runs/sft [--compare=runs/dpo] [--prompts=mine.jsonl]

Prints the address of the page, which is on this machine alone; whoever has it may vote, several at
once. Keys: 1 and 2 prefer an answer, 0 is a tie, s skips, u takes the last answer back. With
--compare each model gives one of the answers, else both are of one model. Each vote is a line of
votes.jsonl in the directory --out, which reward.py:own and dpo.py:own read as it is; whatever is
killed, the same command goes on there. "Retrain" on the page starts reward.py:own on the votes so
far; flags like --config.optimizer.learning_rate=5e-4 are passed on to it.
Needs requirements-label.txt. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError


class _Parser(Parser):
    """Keeps --config.… as `rest`, for the reward stage."""

    def parse_args(self, args=None, namespace=None):
        given, rest = self.parse_known_args(args, namespace)
        for flag in rest:
            if not flag.startswith("--config."):
                self.error(f"there is no {flag}; --help says what there is")
        given.rest = rest
        return given


def label(given: argparse.Namespace) -> None:
    """Serves the page of a command line until it is interrupted.

    Raises:
        UserError: a model, a file or a flag is not as it must be, or the port is taken.
    """
    try:
        import uvicorn

        from rlhf_jax.label.server import Impatient, make_app
    except ImportError as error:
        line = f"the page needs {error.name}: pip install -r requirements-label.txt"
        raise UserError(line) from None
    # Retraining takes place beside this process: on a GPU it needs the memory that this leaves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rlhf_jax.label.book import Book, Design
    from rlhf_jax.label.files import LabelFiles
    from rlhf_jax.label.pairs import keep_ahead
    from rlhf_jax.label.retrain import Retraining
    from rlhf_jax.label.source import read_checks, source_of
    from rlhf_jax.training.run_lock import acquire

    _check(given)
    names = [Path(path).resolve().name for path in (given.workdir, given.compare) if path]
    out = Path(given.out or Path("labels") / "-".join(names))
    source, settings = source_of(given)
    checks = read_checks(given.gold) if given.gold else []
    files = LabelFiles(out, settings)
    acquire(out / "lock")
    book = Book(files, Design(given.pairs, given.overlap, given.repeat_every, given.seed), checks)
    retraining = Retraining(out / "rounds", Path(given.workdir), given.rest)
    with _listening(given.port) as listener:
        port, token = listener.getsockname()[1], files.token()
        config = uvicorn.Config(
            make_app(book, retraining, port, token), http=Impatient, ws="none", lifespan="off",
            log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        with keep_ahead(source, book), contextlib.suppress(KeyboardInterrupt):
            print(f"votes are kept in {out / 'votes.jsonl'}; Ctrl-C ends", flush=True)
            print(f"http://127.0.0.1:{port}/#{token}", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
    print(f"{len(book.votes())} votes are in {out / 'votes.jsonl'}", flush=True)


def _check(given: argparse.Namespace) -> None:
    from rlhf_jax.sampling.arguments import Sampling, check_streams

    for name, least in (("pairs", 1), ("overlap", 1), ("repeat_every", 0), ("port", 0)):
        if getattr(given, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={getattr(given, name)}: at least {least}")
    if bool(given.rewards) != (given.select == "disagreement"):
        raise UserError("--select=disagreement and --rewards need each other")
    Sampling(given.max_new_tokens, given.temperature).validate()  # before a thread samples
    check_streams(given.seed, (), 0)


def _listening(port: int) -> socket.socket:
    """A socket on a port of this machine; 0: any that is free."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--port={port}: {error}; give another one") from None
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = _Parser(prog="python -m rlhf_jax.label", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option, default = parser.add_argument, "(default: %(default)s)"
    option("--workdir", required=True, help="a finished run, or a Hub directory")
    option("--compare", default="", help="another, which gives the other answer")
    option("--prompts", default="", help="a file or data set (default: what the run trained on)")
    option("--out", help="the directory of the votes (default: labels/WORKDIR[-COMPARE])")
    option("--pairs", type=int, default=200, help=f"to be compared {default}")
    option("--overlap", type=int, default=1, help=f"labelers of each pair {default}")
    option("--repeat-every", type=int, default=10, metavar="K",
           help=f"every K-th pair comes again, sides swapped; 0: none {default}")  # fmt: skip
    option("--gold", default="", help="a file of pairs whose better side is known, as checks")
    option("--select", choices=("random", "disagreement"), default="random",
           help=f"which of the sampled pairs are shown {default}")  # fmt: skip
    option("--rewards", default="", help="runs of reward models, a,b,…, for disagreement")
    option("--max-new-tokens", type=int, default=128, help=f"of an answer {default}")
    option("--temperature", type=float, default=1.0, help=f"of answers {default}")
    option("--seed", type=int, default=0, help=f"of sampling and of sides {default}")
    option("--port", type=int, default=8321, help=f"0: any that is free {default}")
    return run(parser, label, argv)


if __name__ == "__main__":
    sys.exit(main())
