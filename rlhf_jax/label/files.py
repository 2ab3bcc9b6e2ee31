"""The files of a labelling directory: the pairs, the votes and the skips, a JSON object a line.

A line is appended and flushed to the disk before anybody hears of it, so what a labeler was told is
stored outlives any kill. What is taken back leaves its file in one step, by a rename.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.data.records import Message
from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.files import (
    append_whole,
    parse_object,
    read_object,
    sync_directory,
    write_json,
    write_jsonl,
    write_whole,
)

PAIRS, VOTES, SKIPS = "pairs.jsonl", "votes.jsonl", "skips.jsonl"
SETTINGS, TOKEN = "settings.json", "token"
Line = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A prompt and two answers to it, of which a labeler prefers one.

    Attributes:
      pair: names it by what it holds: the same wherever the same two answers are compared.
      prompt: a text, or a list of messages, as the records of a file have it.
      answers: the two texts. Of a gold check the first one is the better.
      models: which model gave each answer.
      seed: of the sampling; None for answers that were not sampled here.
      check: whether it is a gold check.
      candidate: its number among all that were sampled, those left out too.
      more: what else a vote on it states: "select", "disagreement", "tools", "meta", and "cut", the
        indices of the answers that ended at the limit.
    """

    pair: str
    prompt: str | list[Line]
    answers: tuple[str, str]
    models: tuple[str, str]
    seed: int | None
    check: bool = False
    candidate: int = 0
    more: Line = field(default_factory=dict)

    @property
    def turns(self) -> list[Line]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt

    def preferred(self, chosen: int, *, tie: bool) -> Line:
        """What a line states of the pair once its answer `chosen` (0, 1) is preferred, or a tie."""
        sides = {"chosen": chosen, "rejected": 1 - chosen}
        line: Line = {"prompt": self.prompt} | {k: self.answers[i] for k, i in sides.items()}
        line |= {"tie": True} if tie else {}
        line |= {"models": {k: self.models[i] for k, i in sides.items()}, "seed": self.seed}
        cut = [k for k, i in sides.items() if i in self.more.get("cut", ())]
        return line | self.more | ({"cut": cut} if cut else {})


def prompt_fields(messages: Sequence[Message], meta: Mapping[str, str]) -> Line:
    """What a line says of a record's prompt: "prompt", and "tools" and "meta" if it has some."""
    turns = [message.to_json() for message in messages]
    tools = turns[0].pop("tools", None)
    alone = len(turns) == 1 and turns[0].keys() == {"role", "content"}
    fields: Line = {
        "prompt": turns[0]["content"] if alone and turns[0]["role"] == "user" else turns
    }
    return fields | ({"tools": tools} if tools else {}) | ({"meta": dict(meta)} if meta else {})


def make_comparison(
    messages: Sequence[Message], answers: tuple[str, str], meta: Mapping[str, str], **fields: Any
) -> Comparison:
    """A comparison of two answers to a record's messages; `fields` are the others it has."""
    asked = prompt_fields(messages, meta)
    prompt = asked.pop("prompt")
    pair = json_digest([prompt, asked.get("tools"), *sorted(answers)])
    return Comparison(pair, prompt, answers, more=fields.pop("more", {}) | asked, **fields)


class LabelFiles:
    """The files of one labelling directory, which one process at a time writes.

    Args:
        folder: made if it is not there.
        settings: what its pairs are made from, as JSON has it.

    Raises:
        UserError: the directory was begun with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stated = folder / SETTINGS
        if stated.exists():
            before = read_object(stated)
            for name in sorted({*before, *settings}):
                if before.get(name) != settings.get(name):
                    raise UserError(
                        f"{folder} was begun with {name} = {before.get(name)!r}, and this is "
                        f"{settings.get(name)!r}; name another directory with --out"
                    )
        else:
            write_json(stated, settings)

    def token(self) -> str:
        """The secret of this directory's page, which only this user may read; made once."""
        path = self.folder / TOKEN
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            if not (token := file.read()):
                token = secrets.token_urlsafe(24)
                file.write(token)
        return token

    def append(self, name: str, lines: Sequence[Line]) -> None:
        """Appends lines to a file, all or none, and returns once the disk has them.

        Raises:
            NoRoom: the disk is full.
        """
        path = self.folder / name
        new = not path.exists()
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        end = os.fstat(descriptor).st_size
        try:
            append_whole(descriptor, data, path)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)  # it is not stored, and nobody may read that it is
            raise
        finally:
            os.close(descriptor)
        if new:
            sync_directory(self.folder)

    def remove(self, name: str, line: Line) -> None:
        """Writes a file anew without one of its lines."""
        write_jsonl(self.folder / name, [each for each in self.read(name) if each != line])

    def read(self, name: str) -> list[Line]:
        """The lines of a file, none if it is not there.

        A last line without an end was never acknowledged: it is cut off, which is said.

        Raises:
            UserError: another line is no JSON object.
        """
        path = self.folder / name
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            print(f"{path}: its last line was not written to its end, and is cut off", flush=True)
            write_whole(path, whole)
        lines = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                lines.append(parse_object(text))
            except ValueError as error:
                raise UserError(f"{path}:{number} {error}") from error
        return lines

    def comparisons(self) -> list[Comparison]:
        """The pairs that were sampled, in order."""
        texts = ("answers", "models")
        try:
            return [
                Comparison(**line | {name: tuple(line[name]) for name in texts})
                for line in self.read(PAIRS)
            ]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.folder / PAIRS} is not as this package writes it") from error

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> None:
        """Appends pairs to those that were sampled."""
        self.append(PAIRS, [asdict(each) for each in comparisons])
