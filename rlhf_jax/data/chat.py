"""Messages to tokens, with the training mask made by construction.

A model that came with a chat template keeps it (`hub_tokenizer`); ours is

    <|bos|><|user|>question<|end|><|assistant|>answer<|end|><|user|>…

Training and generation render through the same function, so the tokens of a prompt followed by
those of a reply and `<|end|>` are exactly the tokens of the conversation.

Tool calls, a tool's name, and with the first turn the tools there are, follow the content of a turn
as one line of JSON, {"tool_calls": […]}, {"name": …}, {"tools": […]}.

The text of a turn or document is encoded with a space in front, which `decode_text` takes away: a
word then has the same token at the start as anywhere else, and can be copied from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_jax.data.hub_tokenizer import HubTokenizer
from rlhf_jax.data.records import ROLES, Message
from rlhf_jax.data.tokenizer import ASSISTANT, BOS, END, SYSTEM, TOOL, USER, Tokenizer
from rlhf_jax.errors import UserError

ROLE_IDS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


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


AnyTokenizer = Tokenizer | HubTokenizer


def render_conversation(
    messages: Sequence[Message], tokenizer: AnyTokenizer, *, last_turn_only: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of a whole conversation and which of them are trained.

    Returns `(tokens, is_target)`, of one length: `is_target` is 1 on the content and the `<|end|>`
    of each assistant turn (only the last one if `last_turn_only`), 0 elsewhere.
    """
    check_messages(messages, reply_last=True)
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.conversation(messages, last_turn_only=last_turn_only)
    return _render(messages, tokenizer, last_turn_only)


def render_prompt(messages: Sequence[Message], tokenizer: AnyTokenizer) -> list[int]:
    """Tokens of a conversation that awaits a reply; in our format the last is `<|assistant|>`."""
    check_messages(messages, reply_last=False)
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.prompt(messages)
    tokens, _ = _render(messages, tokenizer, False)
    return [*tokens, ASSISTANT]


def render_reply(reply: str, tokenizer: AnyTokenizer) -> list[int]:
    """Tokens of an assistant's reply as they follow `render_prompt`; the last one ends it."""
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.reply(reply)
    return [*encode_texts([reply], tokenizer)[0], END]


def encode_texts(texts: Sequence[str], tokenizer: AnyTokenizer) -> list[list[int]]:
    """Tokens of whole turns or documents, without control tokens."""
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.encode_batch(texts)
    return tokenizer.encode_batch([f" {text}" if text else "" for text in texts])


def decode_text(ids: Sequence[int], tokenizer: AnyTokenizer) -> str:
    """The text of a turn; control tokens are left out."""
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.decode(ids)
    return tokenizer.decode(ids).removeprefix(" ")


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer, last_turn_only: bool
) -> tuple[list[int], list[int]]:
    if not tokenizer.control:
        raise UserError(
            "a character-level tokenizer has no control tokens and cannot render chats; train a BPE"
        )
    tokens, is_target = [BOS], [0]
    for i, message in enumerate(messages):
        text = "\n".join(filter(None, (message.content, message.more)))
        content = render_reply(text, tokenizer)
        trained = message.role == "assistant" and (not last_turn_only or i == len(messages) - 1)
        tokens += [ROLE_IDS[message.role], *content]
        is_target += [0, *[int(trained)] * len(content)]
    return tokens, is_target
