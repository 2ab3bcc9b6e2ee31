"""JSONL: every format reads, and every kind of bad line is named, counted and never silent."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
from collections import Counter
from datetime import datetime
from decimal import Decimal

import numpy as np
import pytest

from rlhf_jax.data import jsonl
from rlhf_jax.data.jsonl import count_rows, read_jsonl, take_slice
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Text
from rlhf_jax.data.shapes import parse_columns
from rlhf_jax.errors import UserError

USER, REPLY = Message("user", "hi"), Message("assistant", "yo")
U, A, B = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "assistant", "content": "no"},
)
GOOD = {
    "text": ({"text": "hi"}, Text("f.jsonl:1", "hi")),
    "conversation": ({"messages": [U, A]}, Conversation("f.jsonl:1", (USER, REPLY))),
    "prompt": ({"prompt": "hi"}, Prompt("f.jsonl:1", (USER,))),
    "pair": (
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        Pair("f.jsonl:1", (USER,), "yo", "no"),
    ),
    "hh": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        Pair("f.jsonl:1", (USER,), "yo", "no"),
    ),
}
OTHER_FORMATS = [
    ("conversation", {"prompt": "hi", "response": "yo"}),
    ("conversation", {"prompt": [U], "response": "yo"}),
    ("conversation", {"prompt": "hi", "completion": "yo"}),
    ("conversation", {"prompt": [U], "completion": [A]}),
    ("prompt", {"messages": [U]}),
    ("prompt", {"prompt": [U]}),
    ("prompt", {"messages": [U, A]}),
    ("prompt", {"chosen": [U, A], "rejected": [U, B]}),
    ("pair", {"chosen": [U, A], "rejected": [U, B]}),
    ("pair", {"prompt": [U], "chosen": [A], "rejected": [B]}),
    ("pair", {"prompt": [U], "chosen": [U, A], "rejected": [U, B]}),
]
BAD = [
    ("text", b'{"text": "x"', "invalid JSON.*column 13"),
    ("text", b'{"text": "x"} {}', "invalid JSON"),
    ("text", b'{"text": NaN}', "NaN is not JSON"),
    ("text", b"[" * 100_000, "invalid JSON"),
    ("text", b'{"text": ' + b"9" * 5000 + b"}", "invalid JSON"),
    ("text", b'["text"]', "wrong type.*expected an object, got list"),
    ("text", b'{"text": 3}', "field 'text' must be text, not int"),
    ("text", b'{"text": null}', "must be text, not null"),
    ("text", b'{"text": ""}', "empty text"),
    ("text", b'{"text": "a\\u0000b"}', "NUL character.*'text'"),
    ("text", b'{"text": "a\x00b"}', "invalid JSON"),
    ("text", b'{"text": "\xff"}', "bad UTF-8.*column 11"),
    ("text", b'\xef\xbb\xbf{"text": "x"}', "byte order mark"),
    ("text", b'{"text": "\\ud800"}', "lone surrogate"),
    ("text", b'{"txt": "x"}', r"missing key.*needs \{'text'\} or .*; found \{'txt'\}"),
    ("text", b'{"text": "x", "text": "y"}', "duplicate key.*'text'"),
    ("text", b'{"text": "x", "id": []}', "field 'id'"),
    ("text", b'{"text": "x", "meta": 3}', "'meta' must be an object"),
    ("conversation", b'{"messages": []}', "bad roles: the conversation is empty"),
    ("conversation", b'{"messages": "hi"}', "must be a list, not str"),
    ("conversation", b'{"messages": [3]}', r"messages\[0\] must have exactly"),
    ("conversation", b'{"messages": [{"role": "user"}]}', "bad message"),
    ("conversation", b'{"messages": [{"role": "user", "content": "x"}]}', "must end with"),
    ("conversation", b'{"prompt": 3, "response": "x"}', "field 'prompt'"),
    ("pair", b'{"prompt": "x", "chosen": "y"}', "missing key"),
    ("pair", b'{"chosen": "y", "rejected": "z"}', "no prompt.* share no beginning"),
    ("pair", b'{"question": "q", "chosen": "It y", "rejected": "It z"}', "columns=prompt:question"),
    ("conversation", b'{"system": 3, "prompt": "x", "response": "y"}', "'system' must be text"),
    ("pair", b'{"chosen": "y", "rejected": []}', "both sides are lists of messages or texts"),
    ("pair", b'{"prompt": "x", "chosen": "y", "rejected": "z", "margin": -1}', "bad margin"),
    ("pair", b'{"prompt": "x", "chosen": "y", "rejected": "z", "margin": true}', "bad margin"),
    ("hh", b'{"chosen": "hi", "rejected": "x"}', "not a dialogue.*'chosen'"),
]


def write(tmp_path, *lines: bytes | dict, name="f.jsonl"):
    path = tmp_path / name
    encoded = [json.dumps(x).encode() if isinstance(x, dict) else x for x in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


@pytest.mark.parametrize("kind", GOOD)
def test_formats(tmp_path, kind):
    fields, record = GOOD[kind]
    assert read_jsonl(write(tmp_path, fields), kind) == [record]


@pytest.mark.parametrize(("kind", "fields"), OTHER_FORMATS)
def test_other_spellings_of_the_same_record(tmp_path, kind, fields):
    assert read_jsonl(write(tmp_path, fields), kind) == [GOOD[kind][1]]


def test_ids_margins_and_other_keys_are_kept(tmp_path):
    fields = {"prompt": "hi", "chosen": "yo", "rejected": "no", "margin": 2, "id": 7}
    fields |= {"meta": {"topic": "pets"}, "source": "me", "scores": [1, 2]}
    (pair,) = read_jsonl(write(tmp_path, fields), "pair")
    meta = {"topic": "pets", "source": "me", "scores": "[1, 2]"}
    assert pair == Pair("7", (USER,), "yo", "no", 2.0, meta)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def call(arguments, **more):
    return more | {"type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
def test_tool_calls(tmp_path, arguments, tools):
    turns = [
        U,
        {"role": "assistant", "content": None, "tool_calls": [call(arguments, id="c1")]},
        {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "18 °C"},
        A | {"tool_calls": []},
    ]
    (record,) = read_jsonl(write(tmp_path, {"messages": turns, "tools": tools}), "conversation")
    first, called, result, last = record.messages
    assert first.to_json() == U | {"tools": [WEATHER]}
    stated = [call({"city": "Köln"}, id="c1")]
    assert called.to_json() == {"role": "assistant", "content": "", "tool_calls": stated}
    assert list(called.to_json()["tool_calls"][0]) == ["id", "type", "function"]
    assert result.to_json() == turns[2]
    assert last == REPLY and record.meta == {}
    (prompt,) = read_jsonl(write(tmp_path, {"messages": turns, "tools": tools}), "prompt")
    assert prompt.messages == record.messages[:-1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (U | {"tool_calls": [call({})]}, r"bad message: messages\[0\] .* found .*tool_calls"),
        (A | {"tool_calls": "weather()"}, "tool_calls must be a list"),
        (A | {"tool_calls": ["weather()"]}, r"tool_calls\[0\] must be"),
        (A | {"tool_calls": [call({}) | {"type": "code"}]}, r"tool_calls\[0\] must be"),
        (A | {"tool_calls": [call([1])]}, "'arguments' must be an object"),
        (A | {"tool_calls": [call("{1}")]}, "invalid JSON"),
        (A | {"tool_calls": [call({"x": "\ud800"})]}, "lone surrogate"),
        (A | {"name": "me"}, "bad message"),
    ],
)
def test_bad_tool_calls_are_named(tmp_path, turn, message):
    turns = [turn] if turn["role"] == "user" else [U, turn]
    with pytest.raises(UserError, match=message):
        read_jsonl(write(tmp_path, {"messages": turns}), "conversation")


def test_tools_must_be_schemas_and_the_replies_of_pairs_text(tmp_path):
    with pytest.raises(UserError, match="bad tools"):
        read_jsonl(write(tmp_path, {"messages": [U, A], "tools": ["weather"]}), "conversation")
    pair = {"chosen": [U, A | {"tool_calls": [call({})]}], "rejected": [U, B]}
    with pytest.raises(UserError, match="a pair's replies are text"):
        read_jsonl(write(tmp_path, pair), "pair")


def test_preferences_are_pairs_or_labelled_replies(tmp_path):
    for fields in (
        {"prompt": "hi", "completion": "yo"},
        {"prompt": [U], "completion": [A]},
        {"prompt": "hi", "response": "yo"},
        {"messages": [U, A]},
    ):
        (record,) = read_jsonl(write(tmp_path, fields | {"label": True}), "preference")
        assert record == Conversation("f.jsonl:1", (USER, REPLY), {"label": "true"})
        for label in ("good", 0.5, None):
            with pytest.raises(UserError, match=r"bad label.* must be true or false"):
                read_jsonl(write(tmp_path, fields | {"label": label}), "preference")
    assert read_jsonl(write(tmp_path, GOOD["pair"][0]), "preference") == [GOOD["pair"][1]]
    with pytest.raises(UserError, match="missing key"):
        read_jsonl(write(tmp_path, {"messages": [U, A]}), "preference")


def test_a_prompt_that_is_only_implied_ends_at_a_white_space(tmp_path):
    fields = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    (pair,) = read_jsonl(write(tmp_path, fields), "pair")
    assert pair.prompt == (Message("user", "The sky is"),)
    assert (pair.chosen, pair.rejected) == (" blue.", " black.")
    (hh,) = read_jsonl(write(tmp_path, GOOD["hh"][0]), "pair")
    assert hh == GOOD["hh"][1]


def test_slices_are_those_of_tfds():
    import tensorflow_datasets as tfds

    for count in (1, 3, 7, 10, 30, 999):
        records = [Text(str(i), "x") for i in range(count)]
        whole = {"f": tfds.core.SplitInfo(name="f", shard_lengths=[count], num_bytes=0)}
        # Where 50 per cent come to a record: the next test.
        from_the_end = ("[-50%:]",) if count > 1 else ()
        for part in ("[:95%]", "[95%:]", "[0:1]", "[-1:]", "[50%:95%]", "[1:3]", *from_the_end):
            try:
                (theirs,) = tfds.core.ReadInstruction.from_spec("f" + part).to_absolute(whole)
                wanted = records[theirs.from_ : theirs.to]
            except (AssertionError, ValueError):
                wanted = []
            if wanted:
                assert take_slice(records, part, "f") == wanted, (count, part)
            else:
                with pytest.raises(UserError, match=r"f.* (is empty|there are only)"):
                    take_slice(records, part, "f")
    for part in ("[", "[]", "[:]", "[:", "[1]", "[:5x]", "[1:2:3]", "[1:2][0:1]", "[1:2]@a"):
        with pytest.raises(UserError, match=r"f\[.*: a slice looks like"):
            take_slice(records, part, "f")


def test_the_last_per_cent_of_few_records_is_not_all_of_them():
    records = [Text(str(i), "x") for i in range(40)]
    with pytest.raises(UserError, match=r"f\[-1%:\] is empty: there are 40 records in all"):
        take_slice(records, "[-1%:]", "f")
    assert take_slice(records, "[:-1%]", "f") == records
    assert take_slice(records, "[-2%:]", "f") == records[-1:]


def test_rows_are_counted_without_being_read(tmp_path):
    assert count_rows(write(tmp_path, b"{}", b" ", b"no JSON")) == 2


def test_dialogues_of_several_turns(tmp_path):
    before = "\n\nHuman: hi \n\nAssistant: a\n\nb\n\nHuman: more"
    fields = {"chosen": f"{before}\n\nAssistant: yo", "rejected": f"{before}\n\nAssistant: no\n"}
    (pair,) = read_jsonl(write(tmp_path, fields), "hh")
    assert [m.content for m in pair.prompt] == ["hi", "a\n\nb", "more"]
    assert (pair.chosen, pair.rejected) == ("yo", "no")
    other = {"chosen": fields["chosen"], "rejected": "\n\nHuman: ho\n\nAssistant: no"}
    with pytest.raises(UserError, match="prompts differ"):
        read_jsonl(write(tmp_path, other), "hh")


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, suffix, opener):
    path = tmp_path / f"f.jsonl{suffix}"
    with opener(path, "wb") as file:
        file.write(b'{"text": "a"}\n\n  \n{"text": "b"}')
    assert [r.text for r in read_jsonl(path, "text")] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(path, "text")


@pytest.mark.parametrize(("kind", "line", "message"), BAD)
def test_a_bad_line_is_named(tmp_path, kind, line, message):
    good = GOOD[kind][0]
    path = write(tmp_path, good, line, good)
    with pytest.raises(UserError, match=f"f.jsonl:2: .*{message}") as caught:
        read_jsonl(path, kind)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    skipped = Counter()
    assert len(read_jsonl(path, kind, max_bad_fraction=0.5, skipped=skipped)) == 2
    assert skipped.total() == 1


def test_bad_lines_are_counted_by_reason(tmp_path, caplog):
    lines = [{"text": "x"}] * 7 + [{"txt": "x"}, {"text": 3}, {"text": 4}]
    path = write(tmp_path, *lines)
    skipped = Counter()
    assert len(read_jsonl(path, "text", max_bad_fraction=0.3, skipped=skipped)) == 7
    assert skipped == {"missing key": 1, "wrong type": 2}
    assert "skipped 3 bad lines (2 wrong type, 1 missing key)" in caplog.text
    with pytest.raises(UserError, match=r"3 of 10 lines are bad .* first: .*f.jsonl:8"):
        read_jsonl(path, "text", max_bad_fraction=0.29)


def test_a_tie_is_one_of_the_lines_of_which_a_share_may_be_bad(tmp_path):
    pair = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    path = write(tmp_path, pair, *[pair | {"tie": True}] * 2, {"prompt": "hi"})
    assert len(read_jsonl(path, "pair", max_bad_fraction=0.25)) == 1
    with pytest.raises(UserError, match=r"1 of 4 lines are bad"):
        read_jsonl(path, "pair", max_bad_fraction=0.24)


def test_one_file_has_one_format(tmp_path):
    path = write(tmp_path, {"messages": [U, A]}, {"prompt": "hi", "response": "yo"})
    with pytest.raises(UserError, match=r"f.jsonl:2: mixed format"):
        read_jsonl(path, "conversation")


def test_long_lines_are_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    path = write(tmp_path, {"text": "a"}, {"text": "x" * 1000}, {"text": "b"})
    with pytest.raises(UserError, match=r"f.jsonl:2: line too long"):
        read_jsonl(path, "text")
    kept = read_jsonl(path, "text", max_bad_fraction=0.5)
    assert [(r.id, r.text) for r in kept] == [("f.jsonl:1", "a"), ("f.jsonl:3", "b")]


def test_files_without_records(tmp_path):
    for content in (b"", b"\n \n"):
        path = tmp_path / "f.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match="no records"):
            read_jsonl(path, "text")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "missing.jsonl", "text")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path, "text")
    with pytest.raises(UserError, match="unknown kind 'dpo'"):
        read_jsonl(path, "dpo")
    with pytest.raises(UserError, match="max_bad_fraction"):
        read_jsonl(path, "text", max_bad_fraction=1.0)


def test_two_thousand_mutated_lines_give_records_or_clean_errors(tmp_path):
    rng = np.random.default_rng(0)
    seeds = [(k, json.dumps(f).encode()) for k, (f, _) in GOOD.items()]
    seeds += [(k, json.dumps(f).encode()) for k, f in OTHER_FORMATS]
    good = bad = 0
    for _ in range(2000):
        kind, line = seeds[rng.integers(len(seeds))]
        path = write(tmp_path, mutate(line, rng))
        try:
            good += len(read_jsonl(path, kind))
        except UserError as error:
            assert "f.jsonl" in str(error) and "\n" not in str(error)
            bad += 1
    assert good > 20 and bad > 1000


def mutate(line: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(line)
    pieces = [b'"', b"{", b"}", b"[", b",", b"\\", b"\xff", b"\x00", b"\n", b"null", b"1e999"]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        match rng.integers(4):
            case 0:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                del data[at : at + int(rng.integers(1, 9))]
            case 2:
                data[at:at] = pieces[rng.integers(len(pieces))]
            case 3:
                data[at:at] = data[at : at + int(rng.integers(1, 20))]
    return bytes(data)


def test_a_tables_dates_and_decimals_are_text_and_its_bytes_are_refused(tmp_path):
    table = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime(2024, 5, 1, 3, 4)
    row = {"prompt": "hi", "completion": "yo", "seen": day, "price": Decimal("1.50"), "at": [day]}
    path = tmp_path / "chats.parquet"

    def read(row, kind="conversation"):
        parquet.write_table(table.Table.from_pylist([row]), path)
        return read_jsonl(path, kind)[0]

    text = "2024-05-01 03:04:00"
    assert read(row).meta == {"seen": text, "price": "1.50", "at": f'["{text}"]'}
    with pytest.raises(UserError, match=r"field 'picture' holds bytes; leave the column out"):
        read(row | {"picture": {"bytes": b"\xff"}})
    with pytest.raises(UserError, match=r"'completion' must be text, not datetime; `datasets`"):
        read(row | {"completion": day})
    with pytest.raises(UserError, match=r"'answer' must be text, not datetime; .* name the JSON"):
        read({"prompt": "When?", "answer": day}, "prompt")


def test_parquet_rows_are_the_same_records(tmp_path, capsys):
    table = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": "hi", "chosen": [A], "rejected": [B], "topic": "greeting", "margin": None},
        {"prompt": "ho", "chosen": [A], "rejected": [B], "topic": None, "margin": 2.0},
    ]
    path = tmp_path / "pairs.parquet"
    parquet.write_table(table.Table.from_pylist(rows), path)
    first, second = read_jsonl(path, "pair")
    assert first == Pair("pairs.parquet:1", (USER,), "yo", "no", None, {"topic": "greeting"})
    assert second == Pair("pairs.parquet:2", (Message("user", "ho"),), "yo", "no", 2.0, {})
    assert "2 records of {'chosen', 'prompt', 'rejected'}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"pairs\.parquet:1: missing key"):
        read_jsonl(path, "text")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot read row 1"):
        read_jsonl(path, "pair")


def test_a_system_text_beside_a_prompt_or_messages_is_the_first_turn(tmp_path):
    rest = {"prompt": "hi", "response": "yo"}, {"messages": [U, A]}
    lines = [{"system": "be"} | each for each in rest]
    for line in lines:
        (record,) = read_jsonl(write(tmp_path, line), "conversation")
        assert record.messages == (Message("system", "be"), USER, REPLY)
        assert "system" not in record.meta
    (pair,) = read_jsonl(
        write(tmp_path, {"system": "be", "prompt": "hi", "chosen": "yo", "rejected": "no"}), "pair"
    )
    assert pair.prompt == (Message("system", "be"), USER)
    (record,) = read_jsonl(write(tmp_path, {"system": ""} | rest[0]), "conversation")
    assert record.messages == (USER, REPLY)
    twice = {"system": "be", "messages": [{"role": "system", "content": "no"}, U, A]}
    with pytest.raises(UserError, match="'system' beside a message of the system"):
        read_jsonl(write(tmp_path, twice), "conversation")


def share_gpt(*turns, **more):
    return {"conversations": [{"from": f, "value": v} for f, v in turns], **more}


CALL = '{"name": "add", "arguments": {"a": 1}}'
FOREIGN = [  # kind, name said, theirs, ours
    (
        "conversation",
        "ShareGPT",
        share_gpt(("system", "be"), ("human", "hi"), ("gpt", "yo")),
        {"messages": [{"role": "system", "content": "be"}, U, A]},
    ),
    (
        "conversation",
        "ShareGPT",
        share_gpt(("human", "hi"), ("gpt", "yo"), system="be"),
        {"messages": [{"role": "system", "content": "be"}, U, A]},
    ),
    (
        "conversation",
        "ShareGPT",
        share_gpt(("human", "hi"), ("function_call", CALL), ("observation", "3"), ("gpt", "yo")),
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
                    ],
                },
                {"role": "tool", "content": "3"},
                A,
            ]
        },
    ),
    (
        "pair",
        "ShareGPT",
        share_gpt(
            ("human", "hi"),
            chosen={"from": "gpt", "value": "yo"},
            rejected={"from": "gpt", "value": "no"},
        ),
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    ),
    ("prompt", "ShareGPT", share_gpt(("human", "hi"), ("gpt", "yo")), {"prompt": "hi"}),
    ("conversation", "ShareGPT", {"conversations": [U, A]}, {"messages": [U, A]}),
    ("text", "ShareGPT", share_gpt(("human", "hi"), ("gpt", "yo")),
     {"text": "User: hi\n\nAssistant: yo"}),
    ("preference", "ShareGPT", share_gpt(("human", "hi"), ("gpt", "yo"), label=True),
     {"messages": [U, A], "label": True}),
    ("conversation", "Alpaca", {"instruction": "hi", "input": "", "output": "yo"},
     {"messages": [U, A]}),
    ("conversation", "Alpaca", {"instruction": "hi", "input": "x", "output": "yo"},
     {"prompt": "hi\n\nx", "completion": "yo"}),
    ("conversation", "Alpaca",
     {"instruction": "hi", "output": "yo", "history": [["hi", "yo"]], "input": None},
     {"messages": [U, A, U, A]}),
    ("conversation", "Dolly", {"instruction": "hi", "context": "x", "response": "yo"},
     {"prompt": "hi\n\nx", "completion": "yo"}),
    ("pair", "Alpaca", {"instruction": "hi", "input": "x", "chosen": "yo", "rejected": "no"},
     {"prompt": "hi\n\nx", "chosen": "yo", "rejected": "no"}),
    ("prompt", "Alpaca", {"instruction": "hi"}, {"prompt": "hi"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "theirs", "ours"), FOREIGN)
def test_foreign_formats_are_ours_and_said(tmp_path, capsys, kind, name, theirs, ours):
    (found,) = read_jsonl(write(tmp_path, theirs), kind)
    assert f"records of {name}, read as {kind}" in capsys.readouterr().out
    (same,) = read_jsonl(write(tmp_path, ours), kind)
    assert dataclasses.replace(found, meta={}) == dataclasses.replace(same, meta={})


def test_columns_are_named(tmp_path, capsys):
    path = write(tmp_path, {"question": "hi", "answer": "yo", "n": 3})
    columns = {"prompt": "question", "completion": "answer"}
    (record,) = read_jsonl(path, "conversation", columns=columns)
    assert record.messages == (Message("user", "hi"), Message("assistant", "yo"))
    assert record.meta == {"n": "3"}
    assert "prompt from 'question', completion from 'answer'" in capsys.readouterr().out
    (swapped,) = read_jsonl(
        write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}),
        "pair",
        columns={"chosen": "rejected", "rejected": "chosen"},
    )
    assert (swapped.chosen, swapped.rejected) == ("b", "a")
    with pytest.raises(UserError, match="names 'quest'; there are 'answer', 'n', 'question'"):
        read_jsonl(write(tmp_path, {"question": "hi", "answer": "yo", "n": 3}), "conversation",
                   columns={"prompt": "quest"})  # fmt: skip
    assert parse_columns(" prompt:question, completion:answer") == columns
    assert parse_columns("") == {}
    for spec in ("prompt", "prompt:", ":a", "prompt:a,prompt:b"):
        with pytest.raises(ValueError, match=r"write field:column"):
            parse_columns(spec)


def test_errors_name_the_forms_and_the_knob(tmp_path):
    for kind in ("conversation", "pair", "preference", "prompt"):
        with pytest.raises(UserError, match=r"ShareGPT.*Alpaca.*data\.columns.*max_bad_fraction"):
            read_jsonl(write(tmp_path, {"nothing": "known"}), kind)
    for history in (True, [["hi"]]):
        with pytest.raises(UserError, match=r"bad format: 'history' must be a list"):
            fields = {"instruction": "hi", "output": "yo", "history": history}
            read_jsonl(write(tmp_path, fields), "conversation")
    with pytest.raises(UserError, match=r"missing key: .*; found \{'conversations', 'system'\}"):
        read_jsonl(write(tmp_path, share_gpt(("human", "hi"), system="be")), "pair")
    with pytest.raises(UserError, match=r"bad format: conversations\[0\] must have 'from'"):
        read_jsonl(write(tmp_path, {"conversations": [{"value": "x"}]}), "conversation")
    asked, reply = {"from": "human", "value": "hi", "weight": 0}, {"from": "gpt", "value": "yo"}
    with pytest.raises(UserError, match=r"conversations\[1\] is a reply with 'weight': 0"):
        read_jsonl(
            write(tmp_path, {"conversations": [asked, reply | {"weight": 0}]}), "conversation"
        )
    read_jsonl(write(tmp_path, {"conversations": [asked, reply | {"weight": 1}]}), "conversation")


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.xz"])
@pytest.mark.parametrize("array", [False, True])
def test_json_files_are_lines_or_an_array(tmp_path, suffix, array):
    rows = [json.dumps({"text": text}, indent=1 if array else None) for text in "abc"]
    content = " [\n" + ",\n".join(rows) + "]\n" if array else "\n\n".join(rows)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(suffix[-3:], open)
    path = tmp_path / f"mine{suffix}"
    with opener(path, "wb") as file:
        file.write(content.encode())
    assert [record.text for record in read_jsonl(path, "text")] == ["a", "b", "c"]
    assert count_rows(path) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "no records"),
        (b'[{"text": "x"}', r"invalid JSON array: .* at line 1"),
        (b'[{"text": "x"},]', "invalid JSON array"),
        (b'[{"text": "x"}] 3', "invalid JSON array"),
        (b'[{"text": "x"}, 3]', "mine.json:2: wrong type"),
        (b'[{"text": "x"}, {"text": "x", "text": "y"}]', "mine.json:2: duplicate key"),
        (b'[{"text": "x"}, {"text": NaN}]', "mine.json:2: invalid JSON"),
        (b'[{"text": "\xff"}]', "cannot read"),
        (b'[{"text": ' + b"9" * 5000 + b"}]", "invalid JSON array"),
        (b"[" * 100_000, "invalid JSON array"),
    ],
)
def test_bad_arrays_are_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(path, "text")


def test_bad_objects_of_an_array_are_counted(tmp_path):
    path, skipped = tmp_path / "mine.json", Counter()
    path.write_bytes(b'[{"text": "x"}, {"text": NaN}, {"text": "y"}, 3]')
    records = read_jsonl(path, "text", max_bad_fraction=0.5, skipped=skipped)
    assert [record.text for record in records] == ["x", "y"]
    assert skipped == {"invalid JSON": 1, "wrong type": 1}
