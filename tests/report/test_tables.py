"""Numbers as text, and the console summary: plain in a pipe, hostile text without effect."""

from __future__ import annotations

import io
from math import nan

import numpy as np
import pytest

from rlhf_jax.report.tables import (
    format_numbers,
    format_percent,
    format_seconds,
    join_turns,
    make_printable,
    print_table,
)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.5, 0.1234], ["0.500", "0.123"]),
        ([-0.05, 1, None, nan, "x"], ["−0.050", "1.000", "–", "–", "x"]),
        ([3, 12345], ["3", "12,345"]),
        ([12.345, 1.0], ["12.35", "1.00"]),
        ([1234.5, 0.2], ["1,234", "0"]),
        ([0.0003, 0.0], ["3.00e−04", "0.00e+00"]),
        ([np.float32(0.25), np.int64(2)], ["0.250", "2.000"]),
        ([None], ["–"]),
    ],
)
def test_format_numbers(values, expected):
    assert format_numbers(values) == expected


def test_format_percent_and_seconds():
    assert format_percent(0.7839) == "78.4\u00a0%"
    assert [format_seconds(s) for s in (0.4, 59.6, 312, 11220)] == [
        "0 s", "1 min 00 s", "5 min 12 s", "3 h 07 min"
    ]  # fmt: skip
    assert format_seconds(None) == "–"


def test_prompts():
    assert join_turns("hi") == "hi"
    assert join_turns([{"role": "user", "content": "hi"}]) == "hi"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert join_turns(turns) == "user: a\nassistant: b"


def test_printable():
    assert make_printable("a\x1b[31m\n\tb\x9b\x00") == "a\ufffd[31m\n\tb\ufffd\ufffd"


def test_print_table():
    out = io.StringIO()
    responses = {"sft": "", "dpo": "4 \x1b[2Jcoins :smile:"}
    sample = {"prompt": "How much? [red]", "responses": responses}
    print_table(
        "dpo · done",
        ["held out", "sft", "dpo"],
        [("gold reward", 0.5, 0.9134), ("win rate", None, 0.784)],
        [sample],
        file=out,
    )
    text = out.getvalue()
    assert "\x1b" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "dpo · done", "held out sft dpo", "gold reward 0.500 0.913", "win rate – 0.784",
        "prompt How much? [red]", "sft (empty)", "dpo 4 \ufffd[2Jcoins :smile:",
    ):  # fmt: skip
        assert line in lines


def test_a_row_is_one_line_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    cells = ["beta=0.05,name=sigmoid", *["0.637\u00a0to\u00a00.776"] * 5]
    print_table("t", ["cell", *["95 %"] * 5], [cells], file=out)
    assert any(all(cell in line for cell in cells) for line in out.getvalue().splitlines())
