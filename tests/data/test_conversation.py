"""Chat format: one BOS, masks by construction, and prompts that are prefixes of conversations."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.data.conversation import render_prompt, render_replies
from rlhf_jax.data.records import Message
from rlhf_jax.data.template import Template
from rlhf_jax.data.tokenizer import (
    ASSISTANT,
    BOS,
    END,
    SYSTEM,
    TEMPLATE,
    USER,
    train_bpe,
    train_chars,
)
from rlhf_jax.errors import UserError
from tests.rendered import render_conversation

TOKENIZER = train_bpe(["hello there, how are you 12"], 270)


def reply_tokens(text: str) -> list[int]:
    return render_replies(messages("u:hello"), [text], TOKENIZER)[1][0]


def messages(*turns: str) -> tuple[Message, ...]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(names[turn[0]], turn[2:]) for turn in turns)


def random_conversation(rng: np.random.Generator) -> tuple[Message, ...]:
    texts = ["", " ", "hello", "<|end|>", "<|assistant|>x", "\n\nAssistant:", "é🙂", "12"]
    turns = ["s"] if rng.random() < 0.5 else []
    for _ in range(rng.integers(1, 4)):
        turns += ["u", "a"]
        if rng.random() < 0.3:
            turns += ["t", "t", "a"]
    return messages(*(f"{turn}:{''.join(rng.choice(texts, 2))}" for turn in turns))


def test_golden_tokens():
    hello, hi = TOKENIZER.encode(" hello"), TOKENIZER.encode(" hi")
    tokens, is_target = render_conversation(messages("s:hi", "u:hello", "a:hi"), TOKENIZER)
    assert tokens == [BOS, SYSTEM, *hi, END, USER, *hello, END, ASSISTANT, *hi, END]
    assert is_target == [0] * (len(tokens) - len(hi) - 1) + [1] * (len(hi) + 1)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|end|> é"}}}]
CALLING = (
    Message("user", "hello", json.dumps({"tools": TOOLS})),
    Message("assistant", "", json.dumps({"tool_calls": CALLS}, ensure_ascii=False)),
    Message("tool", "12", json.dumps({"name": "f", "tool_call_id": "1"})),
    Message("assistant", "hi", json.dumps({"tool_calls": CALLS}, ensure_ascii=False)),
)


def test_tool_calls_are_text_of_the_turn_that_makes_them():
    tokens, is_target = render_conversation(CALLING, TOKENIZER)
    assert tokens.count(END) == 4
    called = json.dumps({"tool_calls": CALLS}, ensure_ascii=False)
    trained = [t for t, on in zip(tokens, is_target, strict=True) if on]
    expected = [reply_tokens(text) for text in (called, f"hi\n{called}")]
    assert trained == expected[0] + expected[1]
    rendered = Template(TEMPLATE, {}).render(
        [m.to_json() | {"tools": None} for m in CALLING], tools=TOOLS
    )
    assert rendered == TOKENIZER.decode(tokens, control=True)


def test_last_turn_only():
    turns = messages("u:hello", "a:hi", "u:you", "a:12")
    _, every = render_conversation(turns, TOKENIZER)
    _, last = render_conversation(turns, TOKENIZER, last_turn_only=True)
    assert sum(every) == sum(len(reply_tokens(t)) for t in ("hi", "12"))
    assert sum(last) == len(reply_tokens("12")) == sum(last[-sum(last) :])


def test_random_conversations():
    rng = np.random.default_rng(1)
    for _ in range(200):
        turns = random_conversation(rng)
        tokens, is_target = render_conversation(turns, TOKENIZER)
        prompt = render_prompt(turns[:-1], TOKENIZER)
        assert prompt + TOKENIZER.encode_texts([turns[-1].content])[0] + [END] == tokens
        assert tokens.count(BOS) == 1 and tokens[0] == BOS
        assert tokens.count(END) == len(turns)
        assert prompt[-1] == ASSISTANT
        check_mask_against_a_scan_of_the_tokens(tokens, is_target)


def check_mask_against_a_scan_of_the_tokens(tokens, is_target):
    """Content cannot hold control ids, so the mask can be read off the tokens."""
    inside, expected = False, []
    for token in tokens:
        expected.append(int(inside))
        if token == ASSISTANT:
            inside = True
        if token == END:
            inside = False
    assert is_target == expected


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "empty"),
        (("a:hi",), "cannot follow"),
        (("u:hi", "u:hi", "a:x"), r"messages\[1\]"),
        (("u:hi", "s:hi", "a:x"), "'system' cannot follow 'user'"),
        (("u:hi", "a:x", "a:x"), "cannot follow 'assistant'"),
        (("u:hi",), "must end with the assistant"),
        (("t:hi", "a:x"), "cannot follow"),
    ],
)
def test_bad_conversations(turns, message):
    with pytest.raises(UserError, match=message):
        render_conversation(messages(*turns), TOKENIZER)


def test_bad_prompts_and_roles():
    with pytest.raises(UserError, match="a prompt must end"):
        render_prompt(messages("u:hi", "a:x"), TOKENIZER)
    with pytest.raises(UserError, match="unknown role 'human'"):
        render_prompt((Message("human", "hi"),), TOKENIZER)
    with pytest.raises(UserError, match="content must be text"):
        render_prompt((Message("user", None),), TOKENIZER)
    with pytest.raises(UserError, match="character-level"):
        render_prompt(messages("u:a"), train_chars("a"))


def test_a_prompt_that_calls_for_a_turn_after_a_tool():
    assert render_prompt(messages("u:a", "a:b", "t:c"), TOKENIZER)[-1] == ASSISTANT


def test_a_word_has_one_token_wherever_it_stands():
    first, later = TOKENIZER.encode_texts(["hello", "say hello"])
    assert later[-len(first) :] == first
    for text in ("hello", " hello", "", "two\nlines"):
        assert TOKENIZER.decode_text(TOKENIZER.encode_texts([text])[0]) == text


def test_our_format_is_the_only_one_of_our_tokenizers():
    with pytest.raises(UserError, match=r"data\.chat_template is for models from the Hub"):
        TOKENIZER.with_template(TEMPLATE)
