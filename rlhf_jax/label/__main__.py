"""Has people compare two answers on a page in a browser, and trains a reward model from their votes.

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
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.label.files import Comparison
    from rlhf_jax.label.pairs import Source
    from rlhf_jax.training.saved_model import Model


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
        raise UserError(
            f"the page needs {error.name}: pip install -r requirements-label.txt"
        ) from None
    # Retraining takes place beside this process: on a GPU it needs the memory that this leaves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rlhf_jax.label.book import Book, Design
    from rlhf_jax.label.files import LabelFiles
    from rlhf_jax.label.pairs import keep_ahead
    from rlhf_jax.label.retrain import Retraining
    from rlhf_jax.training.run_lock import acquire

    _check(given)
    out = Path(given.out or _default_out(given))
    source, settings = read_source(given)
    files = LabelFiles(out, settings)
    acquire(out / "lock")
    design = Design(given.pairs, given.overlap, given.repeat_every, given.seed)
    book = Book(files, design, read_checks(given.gold) if given.gold else [])
    retraining = Retraining(out / "rounds", Path(given.workdir), given.rest)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", given.port))
        except OSError as error:
            raise UserError(f"port {given.port}: {error.strerror}; give another --port") from None
        port, token = listener.getsockname()[1], files.token()
        keep_ahead(source, book)
        print(f"votes are kept in {out / 'votes.jsonl'}; Ctrl-C ends", flush=True)
        print(f"http://127.0.0.1:{port}/#{token}", flush=True)
        config = uvicorn.Config(
            make_app(book, retraining, port, token), http=Impatient, ws="none", lifespan="off",
            log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
    print(f"{len(book.votes())} votes are in {out / 'votes.jsonl'}", flush=True)


def _check(given: argparse.Namespace) -> None:
    for name, least in (("pairs", 1), ("overlap", 1), ("repeat_every", 0), ("port", 0)):
        if getattr(given, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={getattr(given, name)}: at least {least}")
    if bool(given.rewards) != (given.select == "disagreement"):
        raise UserError("--select=disagreement and --rewards need each other")


def _default_out(given: argparse.Namespace) -> Path:
    names = [Path(path).resolve().name for path in (given.workdir, given.compare) if path]
    return Path("labels") / "-".join(names)


def read_source(given: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """(what pairs are sampled from, the settings that decide what they are)."""
    from rlhf_jax.label.pairs import Source, load_ensemble
    from rlhf_jax.training.saved_model import fingerprint, load_model

    names = [path for path in (given.workdir, given.compare) if path]
    models = [load_model(path) for path in names]
    for path, model in zip(names, models, strict=True):
        if model.config.head != "lm":
            raise UserError(f"{path} is a reward model; it does not speak")
    rewards = [path for path in given.rewards.split(",") if path]
    if rewards and len({model.tokenizer.hash for model in models}) > 1:
        raise UserError("--select=disagreement needs models with one tokenizer")
    ensemble = load_ensemble(rewards, models[0].tokenizer.hash) if rewards else None
    prompts = given.prompts or _prompts_of(Path(given.workdir))
    sets = read_prompts(prompts, models, given.max_new_tokens)
    source = Source(
        tuple(names), tuple(models), sets, given.temperature, given.max_new_tokens, given.seed,
        ensemble,
    )  # fmt: skip
    settings = {
        "models": {path: fingerprint(Path(path)) for path in names},
        "prompts": [prompts, _digest([record.messages for record in sets[0].records])],
        "temperature": given.temperature,
        "max_new_tokens": given.max_new_tokens,
        "seed": given.seed,
        "select": given.select,
        "rewards": {path: fingerprint(Path(path)) for path in rewards},
    }
    return source, settings


def _digest(conversations: Sequence[Any]) -> str:
    from rlhf_jax.digests import json_digest

    return json_digest([[message.to_json() for message in each] for each in conversations])


def _prompts_of(workdir: Path) -> str:
    """The prompts that a run was trained on."""
    from rlhf_jax.files import read_object
    from rlhf_jax.tasks.sources import parse_sources
    from rlhf_jax.training.rundir import CONFIG

    train = ""
    if (workdir / CONFIG).exists():
        train = read_object(workdir / CONFIG).get("data", {}).get("train", "")
    if not train:
        raise UserError(f"{workdir} does not say what it was trained on; name --prompts=file.jsonl")
    return ",".join(parse_sources(train))


def read_prompts(source: str, models: Sequence[Model], max_new_tokens: int) -> tuple[Any, ...]:
    """For each model the prompts that leave all of them room for an answer."""
    from rlhf_jax.data.conversation import render_prompt
    from rlhf_jax.tasks.prompts import PromptSet, prompts_within

    records = _records(source, "prompt")
    for model in models:
        limit = model.config.max_length - max_new_tokens
        why = f"left out: --max-new-tokens={max_new_tokens} leaves {limit} of the context"
        records = prompts_within(limit, f"{source} prompts", records, model.tokenizer, why).records
    if not records:
        raise UserError(f"no prompt of {source} leaves room for {max_new_tokens} tokens")
    return tuple(
        PromptSet(records, [render_prompt(r.messages, model.tokenizer) for r in records])
        for model in models
    )


def read_checks(path: str) -> list[Comparison]:
    """The pairs of a file as gold checks; the chosen side is what a careful labeler prefers."""
    from rlhf_jax.label.files import make_comparison

    return [
        make_comparison(
            pair.prompt, (pair.chosen, pair.rejected), {}, models=(path, path), seed=None,
            check=True,
        )
        for pair in _records(path, "pair")
        if pair.chosen != pair.rejected
    ]  # fmt: skip


def _records(source: str, kind: str) -> list[Any]:
    from ml_collections import ConfigDict

    from rlhf_jax.tasks.sources import read_records

    config = ConfigDict({"data": {"max_bad_fraction": 0.0, "columns": ""}})
    return read_records(config, source, kind, "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = _Parser(prog="python -m rlhf_jax.label", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--workdir", required=True, help="a finished run, or a Hub directory")
    option("--compare", default="", help="another, which gives the other answer")
    option("--prompts", default="", help="a file or data set (default: what the run trained on)")
    option("--out", help="the directory of the votes (default: labels/WORKDIR[-COMPARE])")
    option("--pairs", type=int, default=200, help="to be compared (default: %(default)s)")
    option("--overlap", type=int, default=1, help="labelers of each pair (default: %(default)s)")
    option("--repeat-every", type=int, default=10, metavar="K",
           help="every K-th pair comes again, sides swapped; 0: none (default: %(default)s)")  # fmt: skip
    option("--gold", default="", help="a file of pairs whose better side is known, as checks")
    option("--select", choices=("random", "disagreement"), default="random",
           help="which of the sampled pairs are shown (default: %(default)s)")  # fmt: skip
    option("--rewards", default="", help="runs of reward models, a,b,…, for disagreement")
    option("--max-new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    option("--temperature", type=float, default=1.0, help="of answers (default: %(default)s)")
    option("--seed", type=int, default=0, help="of sampling and of sides (default: %(default)s)")
    option("--port", type=int, default=8321, help="0: any that is free (default: %(default)s)")
    return run(parser, label, argv)


if __name__ == "__main__":
    sys.exit(main())
