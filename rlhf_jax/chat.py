"""Talk to a model: `python -m rlhf_jax.chat --workdir=runs/dpo [--compare=runs/sft]`.

Answers appear as they are sampled; with `--compare` two models answer each message, side by side,
each with its own history. `/new` starts over, `/quit` or the end of input ends. Exit codes: 0 done,
2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.data.records import Message
    from rlhf_jax.training.saved_model import Model

HALF = "\ufffd"  # a part of a character whose other bytes are still to come


@dataclass
class Speaker:
    """A model and the conversation that it has had."""

    name: str
    model: Model
    system: str
    options: dict[str, Any]  # of `Sampling`, and the seed
    messages: list[Message] = field(default_factory=list)

    def start_over(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()

    def answer(self, text: str, number: int, show: Callable[[str], object]) -> str:
        """The reply to a message; `show` gets each further piece of it as it comes.

        Raises:
            UserError: the conversation has no room left in the model's context.
        """
        from rlhf_jax.data.conversation import render_prompt
        from rlhf_jax.data.records import Message
        from rlhf_jax.sampling.arguments import Sampling
        from rlhf_jax.sampling.generate import generate

        model = self.model
        asked = [*self.messages, Message("user", text)]
        opening = [Message("system", self.system)] if self.system else []
        prompt = render_prompt([*opening, *asked], model.tokenizer)
        room = model.config.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"{self.name}: the conversation has {len(prompt)} tokens and the model's context "
                f"{model.config.max_length}; start over with /new"
            )
        tokens: list[int] = []
        shown = ""

        def on_tokens(_prompt: int, _sample: int, new: list[int]) -> None:
            nonlocal shown
            tokens.extend(new)
            sofar = model.tokenizer.decode_text(tokens).rstrip(HALF)
            if sofar.startswith(shown) and len(sofar) > len(shown):
                show(sofar[len(shown) :])
                shown = sofar

        options = {name: value for name, value in self.options.items() if name != "seed"}
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        (completion,) = generate(
            model.config,
            model.params,
            [prompt],
            Sampling(**options, stop_ids=model.tokenizer.ends, batch_size=1),
            seed=self.options["seed"],
            prompt_ids=[number],
            on_tokens=on_tokens,
            chunk=4,
        )
        reply = model.tokenizer.decode_text(completion.tokens)
        show(reply[len(shown) :])
        self.messages = [*asked, Message("assistant", reply)]
        return reply


def converse(speakers: list[Speaker], read: Callable[[], str], write: Callable[[str], object]):
    """Reads messages and answers them until `read` has no more."""
    number = 0
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        if text == "/new":
            for speaker in speakers:
                speaker.start_over()
            continue
        if not text:
            continue
        try:
            if len(speakers) == 1:
                speakers[0].answer(text, number, write)
                write("\n")
            else:
                _side_by_side(speakers, text, number)
        except UserError as error:
            write(f"{error}\n")
        number += 1


def _side_by_side(speakers: list[Speaker], text: str, number: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    answers = [speaker.answer(text, number, lambda piece: None) for speaker in speakers]
    table = Table(*(speaker.name for speaker in speakers), expand=True)
    table.add_row(*(Text(answer) for answer in answers))
    Console().print(table)


def talk(given: argparse.Namespace) -> None:
    """Loads the models of a command line and converses at the terminal."""
    from rlhf_jax.training.saved_model import load_model

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    options = {name: getattr(given, name) for name in (*names, "repetition_penalty", "seed")}
    speakers = []
    for path in filter(None, (given.workdir, given.compare)):
        model = load_model(path)
        if model.config.head != "lm":
            raise UserError(f"{path} is a reward model; it does not speak")
        speakers.append(Speaker(Path(path).name, model, given.system, options))
    prompt = "> " if sys.stdin.isatty() else ""
    converse(speakers, lambda: input(prompt), partial(print, end="", flush=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = Parser(prog="python -m rlhf_jax.chat", description="Talks to a model.")
    parser.add_argument("--workdir", required=True, help="a finished run, or a Hub directory")
    parser.add_argument("--compare", help="another, to answer beside it")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, talk, argv)


if __name__ == "__main__":
    sys.exit(main())
