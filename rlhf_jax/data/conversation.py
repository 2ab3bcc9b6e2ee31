"""Messages to tokens, with the training mask made by construction.

Training and generation render through the same function, so the tokens of a prompt followed by
those of a reply and what ends it are exactly the tokens of the conversation. A reply has no tokens
of its own: templates trim it, or write a block of thoughts before it, as its prompt asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_jax.data.records import ROLES, Message
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Tokenizer(Protocol):
    """Text and conversations to token ids and back: our own or one from the Hub.

    Attributes:
      vocab_size: one more than the highest id.
      bos, end: ids of the tokens that begin and end a document; `bos` is None where none begins it.
      ends: ids that end a reply.
      hash: sha256 of all that decides ids.
      marks: the texts that part the turns of a chat: control tokens, or plain words without these.
      has_template: whether it can render chats.
      special_ids: bos_token_id, eos_token_id and pad_token_id for a config.json.
    """

    vocab_size: int
    bos: int | None
    end: int

    @property
    def ends(self) -> tuple[int, ...]: ...
    @property
    def hash(self) -> str: ...
    @property
    def marks(self) -> tuple[str, ...]: ...
    @property
    def has_template(self) -> bool: ...
    @property
    def special_ids(self) -> dict[str, Any]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands, in which no text gives a control token."""

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole turns or documents, without control tokens."""

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """The text of `ids`; control tokens are left out, or written by name if `control`."""

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a whole turn or document, without control tokens."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that awaits a reply; see `render_prompt`."""

    def replies(
        self, messages: Sequence[Message], texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of a prompt and of replies to it; see `render_replies`."""

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], dict[int, range]]:
        """Tokens of a conversation and where replies stand in them; see `render_turns`."""

    def continuation(self, messages: Sequence[Message], *, for_tools: bool = False) -> list[int]:
        """Tokens between what ends a reply and the next reply; see `render_continuation`."""

    def with_template(self, template: str) -> Tokenizer:
        """Returns this tokenizer under another chat template, which must fit the vocabulary."""

    def save(self, run: Path) -> None:
        """Writes the tokenizer into a run directory, where `load_tokenizer` finds it."""

    def export(self, directory: Path) -> None:
        """Writes all that transformers reads, but for config.json."""


def check_messages(messages: Sequence[Message], *, reply_last: bool) -> None:
    """Raises UserError unless the roles alternate properly.

    An optional system message comes first, then a user's; a user's or tool's turn is answered by
    the assistant. `reply_last`: whether the last message must be the assistant's (a conversation)
    or must call for one (a prompt).
    """
    if not messages:
        raise UserError("the conversation is empty")
    previous = None
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise UserError(f"messages[{i}]: unknown role {message.role!r}; known: {ROLES}")
        if message.role not in _FOLLOWERS[previous]:
            raise UserError(
                f"messages[{i}]: role {message.role!r} cannot follow {previous or 'the start'!r}; "
                f"expected {' or '.join(_FOLLOWERS[previous])}"
            )
        if not isinstance(message.content, str):
            raise UserError(f"messages[{i}]: content must be text")
        previous = message.role
    if reply_last and previous != "assistant":
        raise UserError(f"a conversation must end with the assistant's turn, not {previous!r}")
    if not reply_last and "assistant" not in _FOLLOWERS[previous]:
        raise UserError(f"a prompt must end with a user's or tool's turn, not {previous!r}")


def render_turns(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[list[int], dict[int, range]]:
    """Tokens of a whole conversation, and where in them those replies stand that can be trained.

    Returns `(tokens, {index of the message: its places})`. A reply's places are its content and the
    `<|end|>`. It can be trained if it stands there as it would be generated: the last one always
    does, an earlier one not where the template strips its thoughts, say, or ends the last one only.
    """
    check_messages(messages, reply_last=True)
    return tokenizer.conversation(messages)


def mark(tokens: Sequence[int], places: Iterable[range]) -> list[int]:
    """1 for each token that stands in one of `places`, 0 for the others."""
    marks = [0] * len(tokens)
    for part in places:
        marks[part.start : part.stop] = [1] * len(part)
    return marks


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Tokens of a conversation that awaits a reply; in our format the last is `<|assistant|>`.

    Before it is a `stop_point`.
    """
    stop_point()
    check_messages(messages, reply_last=False)
    return tokenizer.prompt(messages)


def render_replies(
    prompt: Sequence[Message], replies: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, as `render_prompt` gives them, and those of each reply to it.

    The prompt's followed by those of a reply are those of `render_turns` of both, whatever the
    template makes of a reply there.
    """
    check_messages(prompt, reply_last=False)
    return tokenizer.replies(prompt, replies)


def render_continuation(
    messages: Sequence[Message], tokenizer: Tokenizer, *, for_tools: bool = False
) -> list[int]:
    """Tokens of the turns that answer a reply, and of what awaits the next one.

    for_tools: whether its prompt came with tools, for which some models have another template.

    They follow the token that ended the reply, whatever it said: a trajectory is the tokens of its
    prompt, of a reply, these, those of the next reply and so on, none rendered or encoded twice.
    """
    check_messages([Message("user", ""), Message("assistant", ""), *messages], reply_last=False)
    return tokenizer.continuation(messages, for_tools=for_tools)
