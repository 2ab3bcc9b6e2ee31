"""Messages to tokens, with the training mask made by construction.

A model that came with a chat template keeps it (`hub_tokenizer`); ours is

    <|bos|><|user|>question<|end|><|assistant|>answer<|end|><|user|>…

Training and generation render through the same function, so the tokens of a prompt followed by
those of a reply and what ends it are exactly the tokens of the conversation. A reply has no tokens
of its own: templates trim it, or write a block of thoughts before it, as its prompt asks for.

Tool calls, a tool's name, and with the first turn the tools there are, follow the content of a turn
as one line of JSON, {"tool_calls": […]}, {"name": …}, {"tools": […]}.

The text of a turn or document is encoded with a space in front, which `decode_text` takes away: a
word then has the same token at the start as anywhere else, and can be copied from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf_jax.data.hub_tokenizer import HubTokenizer
from rlhf_jax.data.records import ROLES, Message
from rlhf_jax.data.tokenizer import ASSISTANT, BOS, END, SYSTEM, TOOL, USER, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

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


def render_turns(
    messages: Sequence[Message], tokenizer: AnyTokenizer, *, last_turn_only: bool = False
) -> tuple[list[int], dict[int, range]]:
    """Tokens of a whole conversation, and where in them those replies stand that can be trained.

    Returns `(tokens, {index of the message: its places})`. A reply's places are its content and the
    `<|end|>`. It can be trained if it stands there as it would be generated: the last one always
    does, an earlier one not where the template strips its thoughts, say, or ends the last one only.
    With `last_turn_only` earlier ones are not looked for.
    """
    check_messages(messages, reply_last=True)
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.conversation(messages, last_turn_only=last_turn_only)
    tokens, turns = _render(messages, tokenizer)
    last = len(messages) - 1
    return tokens, {last: turns[last]} if last_turn_only else turns


def render_conversation(
    messages: Sequence[Message], tokenizer: AnyTokenizer, *, last_turn_only: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of a whole conversation and which of them are trained.

    Returns `(tokens, is_target)`, of one length: `is_target` is 1 on the places of `render_turns`,
    0 elsewhere.
    """
    tokens, turns = render_turns(messages, tokenizer, last_turn_only=last_turn_only)
    return tokens, mark(tokens, turns.values())


def mark(tokens: Sequence[int], places: Iterable[range]) -> list[int]:
    """1 for each token that stands in one of `places`, 0 for the others."""
    marks = [0] * len(tokens)
    for part in places:
        marks[part.start : part.stop] = [1] * len(part)
    return marks


def render_prompt(messages: Sequence[Message], tokenizer: AnyTokenizer) -> list[int]:
    """Tokens of a conversation that awaits a reply; in our format the last is `<|assistant|>`.

    Before it is a `stop_point`.
    """
    stop_point()
    check_messages(messages, reply_last=False)
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.prompt(messages)
    return [*_render(messages, tokenizer)[0], ASSISTANT]


def render_replies(
    prompt: Sequence[Message], replies: Sequence[str], tokenizer: AnyTokenizer
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, as `render_prompt` gives them, and those of each reply to it.

    The prompt's followed by those of a reply are those of `render_turns` of both, whatever the
    template makes of a reply there.
    """
    check_messages(prompt, reply_last=False)
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.replies(prompt, replies)
    return render_prompt(prompt, tokenizer), _ended(replies, tokenizer)


def control_texts(tokenizer: AnyTokenizer) -> tuple[str, ...]:
    """What a chat is rendered with: control tokens, or the words that part a plain one's turns."""
    if isinstance(tokenizer, HubTokenizer):
        return tokenizer.marks
    return tuple(tokenizer.control)


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


def _ended(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    # One at a time: to wake the library's threads takes longer than to encode a few turns.
    return [[*encode_texts([text], tokenizer)[0], END] for text in texts]


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[list[int], dict[int, range]]:
    """Tokens of messages in our format, and where the assistant's stand, by index."""
    if not tokenizer.control:
        raise UserError(
            "a character-level tokenizer has no control tokens and cannot render chats; train a BPE"
        )
    tokens, turns = [BOS], {}
    texts = ["\n".join(filter(None, (message.content, message.more))) for message in messages]
    for i, (message, ids) in enumerate(zip(messages, _ended(texts, tokenizer), strict=True)):
        tokens.append(ROLE_IDS[message.role])
        if message.role == "assistant":
            turns[i] = range(len(tokens), len(tokens) + len(ids))
        tokens += ids
    return tokens, turns
