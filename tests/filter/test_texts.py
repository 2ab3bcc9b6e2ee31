"""Each filter of texts on values that can be counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Text
from rlhf_jax.errors import UserError
from rlhf_jax.filter import texts
from rlhf_jax.filter.records import Item, turns_of
from rlhf_jax.filter.texts import Band, EvaluationSet
from tests.filter.defects import clean_records


def items(*records) -> list[Item]:
    made = []
    for number, record in enumerate(records, 1):
        if isinstance(record, str):
            record = Text(str(number), record)
        made.append(Item(record, "a", number))
    return made


def chat(*turns: str, **meta) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    return Conversation("", tuple(map(Message, roles, turns)), meta)


def call(name: str, **arguments) -> Message:
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return Message("assistant", "", json.dumps({"tool_calls": [called]}))


def test_a_copy_has_the_same_turns_roles_calls_and_label():
    pair = Pair("", (Message("user", "Who?"),), "Ann.", "No.")
    turned = Pair("", pair.prompt, "No.", "Ann.")
    called = Conversation("", (Message("user", "Who?"), call("who")))
    given = items(
        chat("Who?", "Ann."), chat("Who? Ann."), chat("Who?\n", " Ann."), chat("who?", "Ann."),
        chat("Who?", "Ann.", label="true"), pair, turned, pair, chat("Who?", ""), called,
    )  # fmt: skip
    assert texts.duplicates(given) == {2: "a copy of a:1", 7: "a copy of a:6"}


def test_a_near_duplicate_shares_so_many_n_grams_with_one_that_stays():
    pytest.importorskip("datasketch", reason="requirements-filter.txt is not installed")
    # "abcdefghij" has six 5-grams; with one letter more at the end it shares them all, 6 of 7, and
    # the next, with two more, has 6 of 8 with the first and 7 of 8 with one that went.
    given = items("abcdefghij", "ABCDEFGHIJ\nk".replace("\n", ""), "abcdefghijkl", "abcd")
    assert texts.near_duplicates(given, 0.8) == {1: "0.86 of the n-grams of a:1"}
    assert texts.near_duplicates(given, 0.75) == {
        1: "0.86 of the n-grams of a:1", 2: "0.75 of the n-grams of a:1",
    }  # fmt: skip
    assert texts.near_duplicates(items("ab", "ab ", "ab c"), 1.0) == {
        1: "1.00 of the n-grams of a:1"
    }


def test_calls_of_tools_are_part_of_what_a_record_says():
    pytest.importorskip("datasketch", reason="requirements-filter.txt is not installed")
    asked = Message("user", "What do they come to, please?")
    sums = [
        Conversation("", (asked, call("add", sum=of))) for of in ("17 + 25", "300 + 4", "17 + 25")
    ]
    assert turns_of(sums[0])[1] == '{"name": "add", "arguments": {"sum": "17 + 25"}}'
    assert texts.near_duplicates(items(*sums), 0.95) == {2: "1.00 of the n-grams of a:1"}
    seven = Band("7", "7")  # words by white space, as the call is written
    assert texts.wrong_length(items(*sums), seven) == {}


def test_the_index_finds_what_comparing_all_with_all_finds():
    pytest.importorskip("datasketch", reason="requirements-filter.txt is not installed")
    given = items(*clean_records(300))
    grams = [
        {text[i : i + 5] for i in range(max(1, len(text) - 4))}
        for text in (" ".join(" ".join(turns_of(item.record)).lower().split()) for item in given)
    ]
    kept, gone = [], set()
    for number, ours in enumerate(grams):
        alike = any(len(ours & grams[k]) >= 0.5 * len(ours | grams[k]) for k in kept)
        (gone.add if alike else kept.append)(number)
    found = set(texts.near_duplicates(given, 0.5))
    assert len(gone) > 10 and len(found & gone) >= len(gone) - 1
    assert len(found - gone) <= 1  # like one that stays as the other was missed


def evaluation(monkeypatch, *records) -> EvaluationSet:
    monkeypatch.setattr(texts, "_read_evaluation", lambda sources: items(*records))
    return EvaluationSet("mocked")


def test_contamination_is_the_share_of_a_prompts_words_in_common_n_grams(monkeypatch):
    asked = "one two three four five six seven eight nine ten"
    held_out = evaluation(monkeypatch, Prompt("", (Message("user", asked),)))
    given = items(
        chat(f"So: {asked.upper()}?", "No."),
        chat("One, two, three, four, five, six, seven, eight!", "9."),
        chat("one two three four five six seven", "eight nine"),
        chat("two three four five six seven nine ten", "x"),
    )
    assert held_out.contaminated(given, 0.9) == {
        0: "100% of the words of a:1", 2: "90% of the words of a:1",
    }  # fmt: skip
    assert held_out.contaminated(given, 0.8) == {
        0: "100% of the words of a:1", 1: "80% of the words of a:1", 2: "90% of the words of a:1",
    }  # fmt: skip


def test_a_short_prompt_is_found_as_a_whole_turn_only(monkeypatch):
    held_out = evaluation(
        monkeypatch, Prompt("", (Message("user", "Where is Ann?"),)), chat("", "")
    )
    given = items(chat("where is ann", "x"), chat("Do you know where is Ann?", "y"), chat("", ""))
    assert texts.Gone(held_out.contaminated(given, 0.1)) == {0: "100% of the words of a:1"}


@pytest.mark.parametrize(
    ("reply", "stops"),
    [
        ("It is green.", False), ("It is gre", True), ("It is green,", True), ("Is it?)", False),
        ("It has 4", True), ("42", False), ("So 6 · 7 = 42", False), ("Done.\n#### 1,234", False),
        ("```\nx = 1\n```", False), ("```\nx = (1)", True), ("Well -", True), ("", True),
        ("好。", False), ("Thanks 🙂", False), ("a (", True), ("**Bold**", False),
    ],
)  # fmt: skip
def test_what_stops_in_mid_sentence_is_truncated(reply, stops):
    assert bool(texts.truncated(items(chat("Who?", reply)))) == stops


def test_an_engines_word_for_it_and_a_call_are_believed():
    called = Conversation(
        "", (Message("user", "?"), Message("assistant", "", '{"tool_calls": []}'))
    )
    given = items(chat("?", "Yes.", finish_reason="length"), called)
    assert texts.truncated(given) == {0: "its finish_reason is length"}


def test_repetition_is_the_share_of_n_grams_that_came_before():
    # "no" six times: three 4-grams, one of them new.
    given = items("no no no no no no", "a b c d a b c d", "too short")
    assert texts.repetitive(given, 0.6) == {0: "67% of its n-grams came before"}
    assert texts.repetitive(given, 0.1) == {
        0: "67% of its n-grams came before", 1: "20% of its n-grams came before",
    }  # fmt: skip


def test_a_band_is_of_numbers_or_of_shares_of_all():
    assert Band.parse("words", "3..40") == ("3", "40")
    assert Band.parse("score", "-1.5e-3..") == ("-1.5e-3", "")
    assert Band.parse("score", "2.5%..3") == ("2.5%", "3")
    values = np.array([5.0, 1.0, 3.0, 2.0, 4.0])
    assert Band("2", "4").outside(values, "v") == {0: "v 5, above 4", 1: "v 1, below 2"}
    assert Band.parse("v", "50%..").outside(values, "v") == {1: "v 1, below 3", 3: "v 2, below 3"}
    assert Band.parse("v", "..-1").outside([0, -1], "v") == {0: "v 0, above -1"}
    assert Band("2", "4").outside([], "v") == {}
    assert texts.wrong_length(items("a b c", "a"), Band("2", "3")) == {1: "words: 1, below 2"}


@pytest.mark.parametrize(
    "text", ["7", "..", "1..2..3", "120%..", "..-5%", "a..b", "1e3%..", "nan.."]
)
def test_what_is_no_band_is_refused(text):
    with pytest.raises(UserError, match=r"write LOW\.\.HIGH"):
        Band.parse("words", text)


@pytest.mark.parametrize("text", ["5%..3%", "5..3", "0..-1"])
def test_a_band_whose_low_end_is_above_its_high_one_is_refused(text):
    with pytest.raises(UserError, match=f"^--words={text}: the low end.*is above the high end"):
        Band.parse("words", text)


def test_a_share_above_a_number_is_refused_once_it_is_known():
    with pytest.raises(UserError, match=r"^words: 50%\.\.3: the low end, 4, is above"):
        Band.parse("words", "50%..3").outside([4.0, 4.0, 2.0], "words:")
