"""The four kinds of record that every source yields and every stage reads.

`Text` is for pre-training, `Conversation` for supervised fine-tuning, `Pair` for reward models and
preference losses, `Prompt` for sampling, reinforcement learning and evaluation. `id` names a record
in errors and reports and is unique within a data set. `meta` holds what a scorer or a report wants
beside the text (a reference answer, a topic, a source), always as strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`.

    `more` is JSON of the turn's other entries for a chat template: an assistant's `tool_calls`, a
    tool's `name` and `tool_call_id`, and on a conversation's first message its `tools`, the schemas
    of what may be called. It is "" if there are none.
    """

    role: str
    content: str
    more: str = ""

    def to_json(self) -> dict[str, Any]:
        """{"role", "content"} and the entries of `more`."""
        return {"role": self.role, "content": self.content} | json.loads(self.more or "{}")


@dataclass(frozen=True)
class Text:
    """A plain document."""

    id: str
    text: str
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an assistant's turn."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Pair:
    """Two assistant replies to one prompt, the first preferred.

    `margin` says by how much it is preferred (≥ 0, in the labeler's own units), None if nobody did.
    No loss uses it.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Prompt:
    """A conversation that awaits the assistant's next turn."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


Record = Text | Conversation | Pair | Prompt
KINDS: dict[str, type] = {
    "text": Text,
    "conversation": Conversation,
    "pair": Pair,
    "prompt": Prompt,
}
_NEEDED = {
    "text": "a text, or a conversation that ends with a reply",
    "conversation": "a reply: messages that end with the assistant's, or a prompt and a completion",
    "pair": "two replies, one chosen and one rejected",
    "prompt": "turns of a user",
}
"""What a record needs to be one of a kind."""


def meta_of_seed(meta: Mapping[str, str]) -> dict[str, str]:
    """What a record's `meta` says where its prompt is answered anew.

    "label" and "labeler" say how good its own last reply is and who thinks so, not the new one: of
    that they are "seed_label" and "seed_labeler".
    """
    return {f"seed_{k}" if k in ("label", "labeler") else k: v for k, v in meta.items()}


def convert(record: Record, kind: str) -> Record:
    """Makes a record of another kind, if that loses only what the kind has no place for.

    A pair's chosen side makes a conversation; a conversation without its last turn a prompt; and
    either a text in which each turn starts with its role, for pre-training.

    Raises:
        UserError: there is no such conversion, e.g. from a text to a conversation.
    """
    if isinstance(record, KINDS[kind]):
        return record
    match kind, record:
        case "conversation", Pair():
            turns = (*record.prompt, Message("assistant", record.chosen))
            return Conversation(record.id, turns, record.meta)
        case "prompt", Pair():
            return Prompt(record.id, record.prompt, record.meta)
        case "prompt", Conversation():
            return Prompt(record.id, record.messages[:-1], record.meta)
        case "text", Conversation():
            if any(m.more for m in record.messages):
                raise UserError(f"record {record.id!r} has tool calls, which make no plain text")
            lines = [f"{m.role.capitalize()}: {m.content}" for m in record.messages]
            return Text(record.id, "\n\n".join(lines), record.meta)
        case "text", Pair():
            return convert(convert(record, "conversation"), "text")
    raise UserError(
        f"record {record.id!r} is a {type(record).__name__.lower()}, which makes no {kind}: that "
        f"takes {_NEEDED[kind]}"
    )


def convert_all(records: Iterable[Record], kind: str, source: str) -> list[Any]:
    """Makes records of a data set records of another kind; errors name the data set."""
    try:
        return [convert(record, kind) for record in records]
    except UserError as error:
        raise UserError(f"data: {source!r}: {error}") from error
