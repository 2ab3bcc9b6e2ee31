"""Encoding of records: what is trained, and what happens to records longer than a row."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.conversation import render_prompt, render_replies
from rlhf_jax.data.encode import (
    check_trained_share,
    encode_conversations,
    encode_pairs,
    encode_texts,
)
from rlhf_jax.data.packing import Document
from rlhf_jax.data.records import Conversation, Message, Pair, Text
from rlhf_jax.data.tokenizer import ASSISTANT, BOS, END, train_bpe, train_chars
from rlhf_jax.errors import UserError
from tests.rendered import render_conversation

TOKENIZER = train_bpe(["abc"], 263)  # one token a byte


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))


def test_texts_start_with_bos_and_train_the_end():
    (document,), stats = encode_texts([Text("a", "xyz")], TOKENIZER, 16)
    assert document.tokens == [BOS, *TOKENIZER.encode(" xyz"), END]
    assert document.is_target == [0, 1, 1, 1, 1, 1]
    counts = {"records": 1, "encoded": 1, "dropped": 0, "truncated": 0, "split": 0}
    assert stats == counts | {"bytes": 3}


@pytest.mark.parametrize("length", [7, 8, 14, 15, 40])
def test_split_texts_train_every_token_once(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    documents, stats = encode_texts([Text("a", text)], TOKENIZER, 8)
    targets = [
        token
        for d in documents
        for token, trained in zip(d.tokens, d.is_target, strict=True)
        if trained
    ]
    assert targets == [*TOKENIZER.encode(f" {text}"), END]
    assert all(2 <= len(d.tokens) <= 8 for d in documents)
    assert [d.tokens[0] == BOS for d in documents] == [True] + [False] * (len(documents) - 1)
    assert stats["split"] == 1 and stats["encoded"] == 1


def test_long_texts_can_be_dropped_or_refused():
    texts = [Text("long", "x" * 20), Text("short", "x")]
    documents, stats = encode_texts(texts, TOKENIZER, 8, over_long="drop")
    assert len(documents) == 1 and stats["dropped"] == 1
    with pytest.raises(UserError, match=r"1 of 2 records .*'long', has 23"):
        encode_texts(texts, TOKENIZER, 8, over_long="error")
    with pytest.raises(UserError, match="unknown over_long policy 'cut'; known: split"):
        encode_texts(texts, TOKENIZER, 8, over_long="cut")
    with pytest.raises(UserError, match="character-level"):
        encode_texts(texts, train_chars("x"), 8)


def test_a_row_of_one_token_has_none_to_predict():
    for over_long in ("split", "error", "drop"):
        with pytest.raises(UserError, match=r"data\.row_length = 1: .*two tokens or more"):
            encode_texts([Text("a", "xyz")], TOKENIZER, 1, over_long=over_long)


def test_conversations_train_the_replies():
    record = Conversation("a", chat("hi", "yo", "so", "no"))
    (document,), _ = encode_conversations([record], TOKENIZER, 32)
    tokens, is_target = render_conversation(record.messages, TOKENIZER)
    assert (document.tokens, document.is_target) == (tokens, is_target)


def test_earlier_replies_can_be_read_and_not_trained():
    record = Conversation("a", chat("hi", "yo", "so", "no"))
    (whole,), counts = encode_conversations([record], TOKENIZER, 32)
    (last,), few = encode_conversations([record], TOKENIZER, 32, last_only=True)
    assert last.tokens == whole.tokens and (counts["turns"], few["turns"]) == (2, 1)
    assert sum(whole.is_target) == 8 and last.is_target == [0] * 17 + [1] * 4
    assert few["stripped"] == 0


@pytest.mark.parametrize("row_length", range(6, 27))
def test_left_truncation_of_conversations(row_length):
    """Of 27 tokens the end is kept; a reply cut in two is no longer trained."""
    record = Conversation("a", chat("hello", "yes", "more", "no"))
    tokens, _ = render_conversation(record.messages, TOKENIZER)
    assert len(tokens) == 27
    (document,), stats = encode_conversations(
        [record], TOKENIZER, row_length, over_long="truncate_prompt_left"
    )
    assert stats["truncated"] == 1
    assert document.tokens == [BOS, *tokens[-(row_length - 1) :]]
    kept = document.is_target
    first_reply_is_whole = ASSISTANT in document.tokens[: -len([*TOKENIZER.encode(" no"), END]) - 1]
    assert sum(kept) == 4 + (5 if first_reply_is_whole else 0)
    assert kept[-4:] == [1, 1, 1, 1]


def test_a_reply_is_never_cut():
    record = Conversation("a", chat("hello", "yes" * 5))
    with pytest.raises(UserError, match="record 'a': a reply of 17 tokens"):
        encode_conversations([record], TOKENIZER, 18, over_long="truncate_prompt_left")
    (document,), _ = encode_conversations([record], TOKENIZER, 19, over_long="truncate_prompt_left")
    assert document.tokens[:2] == [BOS, ASSISTANT]


def test_over_long_conversations_and_bad_roles_name_the_record():
    record = Conversation("c7", chat("hello", "yes"))
    with pytest.raises(UserError, match=r"longest, 'c7', has 15.*truncate_prompt_left"):
        encode_conversations([record], TOKENIZER, 8)
    with pytest.raises(UserError, match="no examples are left of 1: 1 were over-long"):
        encode_conversations([record], TOKENIZER, 8, over_long="drop")
    with pytest.raises(UserError, match="record 'c8': a conversation must end"):
        encode_conversations([Conversation("c8", chat("hello"))], TOKENIZER, 8)
    with pytest.raises(UserError, match="no examples are left of 0"):
        encode_conversations([], TOKENIZER, 8)


def test_pairs_share_their_prompt():
    pairs = [Pair("a", chat("hi"), "yes", "no"), Pair("b", chat("hi"), "x", "x")]
    groups, stats = encode_pairs(pairs, TOKENIZER, 32)
    prompt, replies = render_replies(chat("hi"), ("yes", "no"), TOKENIZER)
    assert groups[0].prompt == prompt == render_prompt(chat("hi"), TOKENIZER)
    assert groups[0].branches == tuple(replies)
    assert [g.example for g in groups] == [0, 1]
    assert stats["identical"] == 1 and stats["encoded"] == 2


def test_over_long_pairs():
    pairs = [Pair("a", chat("h" * 20), "yes", "no"), Pair("b", chat("hi"), "yes", "no")]
    with pytest.raises(UserError, match=r"1 of 2 .*'a', has 34"):
        encode_pairs(pairs, TOKENIZER, 16)
    groups, stats = encode_pairs(pairs, TOKENIZER, 16, over_long="drop")
    assert [g.example for g in groups] == [1] and stats["dropped"] == 1
    groups, stats = encode_pairs(pairs, TOKENIZER, 16, over_long="truncate_prompt_left")
    assert stats["truncated"] == 1
    assert groups[0].prompt == [BOS, *render_prompt(chat("h" * 20), TOKENIZER)[-6:]]
    assert groups[0].branches == groups[1].branches
    with pytest.raises(UserError, match="never cut"):
        encode_pairs(pairs, TOKENIZER, 8, over_long="truncate_prompt_left")


def lent(records, row_length=64, over_long="error"):
    """Of each record that is kept, the text of its third branch; and what was counted."""
    groups, stats = encode_pairs(
        records, TOKENIZER, row_length, over_long=over_long, mismatched=True
    )
    return {g.example: TOKENIZER.decode(g.branches[2]).strip() for g in groups}, stats


def asked(*prompts):
    """Pairs by prompt; the chosen reply spells the record's index."""
    return [Pair(f"r{i}", chat(p), str(i), "no") for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [1, 0]),
        ("aaab", [3, 3, 3, 0]),
        ("abba", [1, 3, 3, 1]),
        ("aabbcc", [2, 2, 4, 4, 0, 0]),
        ("abab", [1, 2, 3, 0]),
        ("baaaa", [1, 0, 0, 0, 0]),
    ],
)
def test_the_reply_beside_a_pair_is_the_next_one_to_another_prompt(prompts, expected):
    found, _ = lent(asked(*prompts))
    assert found == {i: str(other) for i, other in enumerate(expected)}


@pytest.mark.parametrize("count", [1, 3])
def test_one_prompt_alone_has_no_reply_to_another(count):
    with pytest.raises(UserError, match="record 'r0': kto needs replies to two prompts or more"):
        lent(asked(*["a"] * count))


def test_pairs_of_one_reply_twice_lend_none():
    records = asked(*"abc")
    records[1] = Pair("r1", chat("b"), "same", "same")
    assert lent(records)[0] == {0: "2", 1: "2", 2: "0"}


# A prompt of one letter has 6 tokens, a reply its bytes and 2 more: r0 5, r1 22, r2 and r3 3 of the
# chosen one, 4 of the rejected one.
LENDERS = [
    Pair("r0", chat("a"), "yes", "no"),
    Pair("r1", chat("b"), "x" * 20, "no"),
    Pair("r2", chat("c"), "2", "no"),
    Pair("r3", chat("a"), "3", "no"),
]


def test_what_is_beside_a_pair_counts_in_its_length():
    # 6 + 5 + 4 + 22, 6 + 22 + 4 + 3, 6 + 3 + 4 + 3, 6 + 3 + 4 + 22: r0 answers r3's prompt.
    with pytest.raises(UserError, match=r"3 of 4 .* 34 tokens, with a reply .* 'r0', has 37"):
        lent(LENDERS, 34)
    found, stats = lent(LENDERS, 35, "drop")
    assert found == {1: "2", 2: "3", 3: "x" * 20}
    assert (stats["dropped"], stats["keeps_95"]) == (1, 37)
    assert lent(LENDERS, 37)[0].keys() == {0, 1, 2, 3}


def test_a_pair_too_long_by_itself_lends_nothing():
    found, stats = lent(LENDERS, 31, "drop")  # r1 alone has 32
    assert found == {0: "2", 2: "3", 3: "2"} and stats["dropped"] == 1
    with pytest.raises(UserError, match="no examples are left of 4: 4 were over-long"):
        lent(LENDERS, 12, "drop")


def test_a_prompt_is_cut_for_the_reply_beside_it():
    groups, stats = encode_pairs(
        LENDERS, TOKENIZER, 35, over_long="truncate_prompt_left", mismatched=True
    )
    assert stats["truncated"] == 1
    assert groups[0].prompt == [BOS, *render_prompt(chat("a"), TOKENIZER)[-3:]]
    assert [len(branch) for branch in groups[0].branches] == [5, 4, 22]
    with pytest.raises(
        UserError, match=r"'r0': a pair .*\(with one to another prompt\) of 31 .*cut"
    ):
        encode_pairs(LENDERS, TOKENIZER, 32, over_long="truncate_prompt_left", mismatched=True)


def test_trained_share():
    assert check_trained_share([Document([1, 2, 3, 4], [0, 0, 1, 1])]) == 0.5
    for is_target in ([0, 0], [1, 1]):
        with pytest.raises(UserError, match="of 2 tokens"):
            check_trained_share([Document([1, 2], is_target)])


def test_empty_and_blank_turns_are_allowed():
    record = Conversation("a", chat(" ", ""))
    (document,), _ = encode_conversations([record], TOKENIZER, 16)
    assert np.sum(document.is_target) == 1 and document.tokens[-1] == END
