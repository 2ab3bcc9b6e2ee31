"""A model's chat template at work: messages to text in which only the template writes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError
from rlhf_jax.hub.chat_formats import NAMES, WITH_TOOLS
from rlhf_jax.hub.template import DEFAULT, TOOL_USE, Template
from rlhf_jax.hub.vocabulary import CLOSE, ESCAPED, OPEN, Spelling

_ELSE = (
    "; for a judge, or where a command has no such option, write a chat_template.jinja in the Hub "
    "model's directory"
)
ANOTHER = f"to use another: --config.data.chat_template={NAMES}{_ELSE}"
_WITH_TOOLS = (
    f"templates that take tools: --config.data.chat_template={' or '.join(WITH_TOOLS)}, where "
    f"their control tokens are in the vocabulary, or a .jinja file{_ELSE}"
)
_NO_TEMPLATE = (
    f"the model has no chat template: name one, --config.data.chat_template={NAMES}{_ELSE}"
)
# Places of a conversation's messages, and whether it awaits a reply.
Part = tuple[Sequence[int], bool]


def render(
    templates: Mapping[str, Template],
    spelling: Spelling,
    messages: Sequence[Message],
    parts: Sequence[Part],
    *,
    for_tools: bool = False,
) -> list[str]:
    """Texts of conversations, each made of some of the messages, with hidden names.

    As in transformers the template "tool_use", if there is one, renders those with tools, and the
    parts of such a one, which are told by `for_tools`; "default" renders all others.

    Raises:
        UserError: there is no such template, it fails, or it ignores what concerns tools.
    """
    more = [spelling.hide_all(json.loads(m.more)) if m.more else {} for m in messages]
    tools = more[0].pop("tools", None) if more else None
    template = _choose(templates, for_tools=for_tools or tools is not None)
    turns = [
        {"role": m.role, "content": spelling.hide(m.content, of_tool=m.role == "tool")} | keys
        for m, keys in zip(messages, more, strict=True)
    ]
    with_tools = tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
    try:
        texts = template.render_all(turns, parts, tools=tools)
    except UserError as error:
        raise UserError(f"{error}; {_WITH_TOOLS if with_tools else ANOTHER}") from error
    if with_tools or any(more):  # the longest has them all
        longest = max(range(len(parts)), key=lambda k: len(parts[k][0]))
        places, opened = parts[longest]
        again = partial(template.render, add_generation_prompt=opened)
        for what, fewer, fewer_tools in _remove_each([turns[i] for i in places], tools):
            try:
                ignored = again(fewer, tools=fewer_tools) == texts[longest]
            except UserError:  # it asks for what was taken out
                continue
            if ignored:
                raise UserError(f"the chat template ignores {what}; {_WITH_TOOLS}")
        if re.search(ESCAPED, texts[longest]):
            raise UserError(
                "the chat template escapes non-ASCII letters of tool calls, which hold a control "
                "token's name; take it out of them"
            )
    return texts


def _choose(templates: Mapping[str, Template], *, for_tools: bool) -> Template:
    if for_tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if DEFAULT in templates:
        return templates[DEFAULT]
    if TOOL_USE in templates:
        raise UserError(
            f"the model's only chat template is {TOOL_USE!r}, for conversations with tools, and "
            f"this one has none; {ANOTHER}"
        )
    raise UserError(_NO_TEMPLATE)


def _remove_each(
    turns: Sequence[Mapping[str, Any]], tools: Any
) -> Iterator[tuple[str, list[Mapping[str, Any]], Any]]:
    """(what it is, turns and tools without it) of all that concerns tools in a conversation."""
    if tools:
        yield "tools", [*turns], None
    for i, turn in enumerate(turns):
        before, after = turns[:i], turns[i + 1 :]
        if turn["role"] == "tool" and turn["content"]:
            yield "tool results", [*before, {**turn, "content": ""}, *after], tools
        calls = turn.get("tool_calls", [])
        for j in range(len(calls)):
            fewer = {k: v for k, v in turn.items() if k != "tool_calls"}
            if len(calls) > 1:
                fewer["tool_calls"] = [*calls[:j], *calls[j + 1 :]]
            yield "tool_calls", [*before, fewer, *after], tools


def looks_like_markup(text: str) -> bool:
    """Whether a token is like a format's marks, <x> or [x]: letters, and something else."""
    return bool(re.search(r"[^\W_]", text) and re.search(r"[^\w\s]", text))


def find_parting(texts: Iterable[str], control: Collection[str], template: Template) -> set[str]:
    """Finds the added tokens, beside the `control` ones, that part a template's turns.

    They are all of `texts` that it names or writes, without what opens and closes a block in a
    turn, such as <think> and </think>; with these too where nothing else stands between a question
    and its answer. All, where the template refuses the conversation that would show it.
    """
    marks = {text for text in texts if looks_like_markup(text)}
    if not marks:
        return marks
    question, answer = (f"{OPEN}{number}{CLOSE}" for number in range(2))
    roles = zip(("system", "user", "assistant"), ("s", question, answer), strict=True)
    turns = [{"role": role, "content": content} for role, content in roles]
    try:
        try:
            whole = template.render(turns)
        except UserError:  # some know no system message
            whole = template.render(turns[1:])
    except UserError:
        return marks
    written = {mark for mark in marks if mark in f"{whole}\n{template.source}"}
    known = "\n".join((whole, template.source, *texts))
    parting = {mark for mark in written if _counterpart(mark) not in known}
    between = whole.partition(question)[2].partition(answer)[0]
    alone = not any(token in between for token in (*control, *parting))
    return written if alone else parting


def _counterpart(mark: str) -> str:
    """</x> for <x>, and <x> for </x>."""
    return mark.replace("/", "", 1) if "/" in mark else f"{mark[0]}/{mark[1:]}"
