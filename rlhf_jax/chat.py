"""Talk to a model: `python -m rlhf_jax.chat --workdir=runs/dpo [--compare=runs/sft]`.

With `--environment=mine.py:Env` or `--tools=mine.py:search` its turns are answered by what a config
names so, anew for each message. What it opens with and answers is shown, and the answers stay in
the conversation, as they do in training.

Answers appear as they are sampled; with `--compare` two models answer each message, side by side,
each with its own history. Ctrl-C ends an answer, whose words so far stay in the conversation;
`/help` lists what else there is. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.data.conversation import Tokenizer
    from rlhf_jax.data.records import Message
    from rlhf_jax.environments.trajectories import Environments, Play
    from rlhf_jax.sampling.arguments import Turn
    from rlhf_jax.sampling.generate import Completion
    from rlhf_jax.training.saved_model import Model

HALF = "\ufffd"  # a part of a character whose other bytes are still to come
ADVICE = "mend it and start the chat again"  # where an environment fails
HELP = """\
/new            forget the conversation
/system TEXT    start over under that system message; without a text, say what it is
/help           this
/quit           end, as Ctrl-D does; Ctrl-C ends only an answer
"""


class Interrupted(Exception):
    """The user has heard enough of an answer."""


@dataclass
class Speaker:
    """A model and the conversation that it has had."""

    name: str
    model: Model
    system: str
    options: dict[str, Any]  # of `Sampling`, and the seed
    messages: list[Message] = field(default_factory=list)
    enough: Callable[[], bool] = lambda: False  # whether the answer is to end here
    environments: Environments | None = None  # what answers its turns
    cut: str = ""  # why the last answer has no end, where it has none

    def start_over(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()

    def answer(self, text: str, number: int, show: Callable[[str], object]) -> str:
        """The reply to a message; `show` gets each further piece of it as it comes.

        Once there is `enough` the reply is what has been shown of it.

        Raises:
            UserError: the conversation has no room left in the model's context.
        """
        from rlhf_jax.data.records import Message
        from rlhf_jax.sampling.arguments import Sampling
        from rlhf_jax.sampling.generate import generate

        model = self.model
        asked = [*self.messages, Message("user", text)]
        shown = Shown(model.tokenizer, show, self.enough)
        prompt = self._open(asked, number, shown)
        room = model.config.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"{self.name}: the conversation has {len(prompt)} tokens and the model's context "
                f"{model.config.max_length}; start over with /new"
            )
        options = {name: value for name, value in self.options.items() if name != "seed"}
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        respond = shown.respond if shown.play else None
        self.cut = ""
        try:
            (completion,) = generate(
                model.config,
                model.params,
                [prompt],
                Sampling(**options, stop_ids=model.tokenizer.ends, batch_size=1, respond=respond),
                seed=self.options["seed"],
                prompt_ids=[number],
                on_tokens=shown.on_tokens,
                chunk=4,
            )
        except Interrupted:
            pass
        else:
            shown.show_rest(completion.last_turn)
            self.cut = _why_cut(completion, shown.play, options["max_new_tokens"])
        self.messages = [*asked, *shown.said, Message("assistant", shown.text)]
        return shown.text

    def _open(self, asked: list[Message], number: int, shown: Shown) -> list[int]:
        """The tokens that the answer follows; an environment's own opening is shown."""
        from rlhf_jax.data.conversation import render_prompt
        from rlhf_jax.data.records import Message, Prompt
        from rlhf_jax.environments.trajectories import trajectory_seeds

        messages = [*([Message("system", self.system)] if self.system else []), *asked]
        tokenizer = self.model.tokenizer
        if self.environments is None:
            return render_prompt(messages, tokenizer)
        record = Prompt(f"message {number + 1}", tuple(messages))
        seeds = trajectory_seeds(self.options["seed"], [number])
        shown.play = play = self.environments.open(tokenizer, [record], 1, seeds)
        known = {(message.role, message.content) for message in messages}
        for message in play.records[0].messages:
            if (message.role, message.content) not in known:
                shown.show(f"{message.content}\n")
        return play.prompts[0]


def _why_cut(completion: Completion, play: Play | None, limit: int) -> str:
    """Why an answer did not come to its end; "" if it did."""
    if completion.finished:
        return ""
    if play is not None:
        if len(play.trajectories[0].told) > len(completion.given):
            return (
                f"the answer to this turn has no room in the {limit} tokens that --max-new-tokens "
                "and the model's context leave"
            )
        if completion.tokens[-1] in play.tokenizer.ends:
            most = play.environments.options.max_calls
            return f"{most} turns were answered, and no more are"
    return f"cut off after {limit} tokens, by --max-new-tokens or the model's context"


@dataclass
class Shown:
    """What has been shown of an answer; `text` is that of its last turn."""

    tokenizer: Tokenizer
    show: Callable[[str], object]
    enough: Callable[[], bool]
    play: Play | None = None  # what answers turns
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # of the last turn
    said: list[Message] = field(default_factory=list)  # the turns before it
    told: list[Message] = field(default_factory=list)  # what answers it, if there is room for that
    given: int = 0  # tokens to come that are those of `told`

    def on_tokens(self, _prompt: int, _sample: int, new: list[int]) -> None:
        """Shows what these tokens add; Interrupted once that is enough."""
        if new and self.told:
            self._next_turn()
        self.tokens.extend(new[self.given :])
        self.given = max(0, self.given - len(new))
        sofar = self.tokenizer.decode_text(self.tokens).rstrip(HALF)
        if sofar.startswith(self.text) and len(sofar) > len(self.text):
            self.show(sofar[len(self.text) :])
            self.text = sofar
        if self.enough():
            raise Interrupted

    def show_rest(self, turn: Sequence[int]) -> None:
        """Shows what is still to be shown of a whole turn."""
        text = self.tokenizer.decode_text(turn)
        self.show(text[len(self.text) :])
        self.text = text

    def respond(self, turns: Sequence[Turn]) -> Sequence[list[int] | None]:
        """What answers a turn; it is shown once the model reads it."""
        assert self.play is not None
        self.show_rest(turns[0].tokens)
        (answer,) = answers = self.play.respond(turns)
        if answer:
            self.told, self.given = self.play.trajectories[0].told[-1], len(answer)
        return answers

    def _next_turn(self) -> None:
        """Shows each message that answers the last turn on a line of its own."""
        from rlhf_jax.data.records import Message

        self.show("".join(f"\n{message.content}" for message in self.told) + "\n")
        self.said += [Message("assistant", self.text), *self.told]
        self.text, self.tokens, self.told = "", [], []


@contextmanager
def interruptible(speakers: Sequence[Speaker]) -> Iterator[None]:
    """Lets Ctrl-C end the answers inside; a second one is what it is elsewhere.

    A handler only sets a flag, which is looked at between tokens: an exception raised in one would
    come up anywhere, in a library too.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            signal.default_int_handler(number, frame)

    for speaker in speakers:
        speaker.enough = lambda: bool(came)
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def converse(speakers: list[Speaker], read: Callable[[], str], write: Callable[[str], object]):
    """Reads messages and answers them until `read` has no more."""
    number = 0
    while True:
        try:
            text = read().strip()
        except KeyboardInterrupt:
            write("\n(/quit or Ctrl-D ends)\n")
            continue
        except EOFError:
            return
        if text == "/quit":
            return
        if text.startswith("/"):
            command(speakers, text, write)
            continue
        if not text:
            continue
        try:
            with interruptible(speakers):
                if len(speakers) == 1:
                    speakers[0].answer(text, number, write)
                    write(f"\n({speakers[0].cut})\n" if speakers[0].cut else "\n")
                else:
                    _side_by_side(speakers, text, number)
        except (UserError, KeyboardInterrupt) as error:
            write(f"{error}\n")
        number += 1


def command(speakers: list[Speaker], text: str, write: Callable[[str], object]) -> None:
    """Does what a line that begins with / asks for."""
    name, _, rest = text.partition(" ")
    if name == "/help":
        write(HELP)
    elif name == "/system" and not rest:
        write(f"the system message is {speakers[0].system!r}\n")
    elif name in ("/new", "/system"):
        for speaker in speakers:
            speaker.start_over()
            speaker.system = rest.strip() if name == "/system" else speaker.system
    else:
        write(f"there is no {name}; /help says what there is\n")


def _side_by_side(speakers: list[Speaker], text: str, number: int) -> None:
    """All answers at once, each in a column that grows as it is sampled."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    pieces: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    columns = [Text() for _ in speakers]
    table = Table(*(speaker.name for speaker in speakers), expand=True)
    table.add_row(*columns)

    def answer(i: int) -> None:
        try:
            speakers[i].answer(text, number, lambda piece: pieces.put((i, piece)))
            if speakers[i].cut:
                pieces.put((i, f"\n({speakers[i].cut})"))
        except UserError as error:
            pieces.put((i, str(error)))

    with Live(table, refresh_per_second=8), ThreadPoolExecutor(len(speakers)) as pool:
        answers = [pool.submit(answer, i) for i in range(len(speakers))]
        while not (all(each.done() for each in answers) and pieces.empty()):
            try:
                i, piece = pieces.get(timeout=0.1)
            except queue.Empty:
                continue
            columns[i].append(piece)
        for each in answers:
            each.result()


def talk(given: argparse.Namespace) -> None:
    """Loads the models of a command line and converses at the terminal."""
    import jax

    from rlhf_jax.data.conversation import render_prompt
    from rlhf_jax.data.records import Message
    from rlhf_jax.environments.trajectories import EnvironmentOptions, environments_of
    from rlhf_jax.sampling.arguments import Sampling, check_streams
    from rlhf_jax.stages.start import with_chat_template
    from rlhf_jax.training.saved_model import load_speaker

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(given, name) for name in names}
    described, python = not given.undescribed, given.python
    offered = EnvironmentOptions(given.environment, given.tools, described, python)
    if (given.undescribed or python) and not offered.named:
        which = "--undescribed" if given.undescribed else "--config.environment.python"
        raise UserError(f"{which} is of --environment or --tools, and there are none")
    # What no model can follow is said before one is loaded, not at each message.
    answered = (lambda turns: [None] * len(turns)) if offered.named else None
    Sampling(**options, respond=answered).validate()
    check_streams(given.seed, [], 0)
    options["seed"] = given.seed
    speakers = []
    for path in filter(None, (given.workdir, given.compare)):
        model = load_speaker(path)
        tokenizer = with_chat_template(model.tokenizer, given.chat_template)
        # A turn that an environment opens, or that tells of tools, may have a template of its own.
        opened = given.environment or (given.tools and described)
        if not (opened and tokenizer.has_template):
            render_prompt([Message("user", "a")], tokenizer)  # UserError if it has no chat format
        model = dataclasses.replace(model, tokenizer=tokenizer)
        speakers.append(Speaker(Path(path).name, model, given.system, options))
        count = sum(x.size for x in jax.tree.leaves(model.params))
        print(f"{Path(path).name}: {count:,} parameters, a context of {model.config.max_length:,} "
              f"tokens, on {jax.devices()[0].device_kind}", flush=True)  # fmt: skip
    print("/help says what there is beside talking", flush=True)
    prompt = "> " if sys.stdin.isatty() else ""
    with ExitStack() as held:
        for speaker in speakers:
            speaker.environments = held.enter_context(environments_of(offered, ADVICE))
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
    parser.add_argument("--environment", default="", help="what answers calls: mine.py:Env")
    parser.add_argument("--tools", default="", help="functions: mine.py:search,mine.py:add")
    parser.add_argument("--undescribed", action="store_true", help="don't tell it of the tools")
    # As a config names them, and as messages do.
    parser.add_argument("--config.environment.python", dest="python", default="",
                        help="the interpreter that runs it")  # fmt: skip
    parser.add_argument("--config.data.chat_template", dest="chat_template", default="",
                        help="a chat template, in place of the model's own")  # fmt: skip
    return run(parser, talk, argv)


if __name__ == "__main__":
    sys.exit(main())
