"""Tools: their schemas, and what a turn that calls one is answered."""

from __future__ import annotations

import json
from functools import partial
from typing import List, Literal  # noqa: UP035

import pytest

from rlhf_jax.data.calls import (
    Call,
    CallError,
    is_error,
    parse_call,
    render_call,
    render_error,
    render_result,
)
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.environments.tools import ToolEnvironment, schema_of
from rlhf_jax.tasks.sources import read_source


def add(first: int, second: int = 1, *, how: Literal["plain", "wide"] = "plain") -> str:
    """Adds two numbers.

    And nothing else.

    Args:
        first: The one
            number.
        second (int): The other.
        how: The way.

    Returns:
        Their sum.
    """
    return str(first + second)


def pick(names: list[str], share: float | None = None) -> dict:
    """Picks.

    Args:
        names: Of people.
        share: Of them.
    """
    return {"picked": names[0]} if names else None


def listed(names: List) -> str:  # noqa: UP006, as one may write it
    """
    Lists.

    Args:
        names: Of people.
    """
    return ", ".join(names)


def read_page(page: int) -> str:
    """Reads a page of the manual.

    Pages are counted from 0. Never ask for one twice.

    Args:
        page: Its number.
    """
    return str(page)


def test_a_schema_is_read_from_types_and_docstring():
    assert schema_of(add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.\n\nAnd nothing else.",
            "parameters": {
                "type": "object",
                "properties": {
                    "first": {"type": "integer", "description": "The one number."},
                    "second": {"type": "integer", "description": "The other."},
                    "how": {"type": "string", "enum": ["plain", "wide"], "description": "The way."},
                },
                "required": ["first"],
            },
        },
    }
    properties = schema_of(pick)["function"]["parameters"]["properties"]
    assert properties["names"]["items"] == {"type": "string"}
    assert properties["share"] == {"type": "number", "nullable": True, "description": "Of them."}


def test_a_schema_is_the_one_of_transformers():
    utils = pytest.importorskip("transformers.utils")
    for function in (pick, listed, read_page):
        theirs = utils.get_json_schema(function)
        assert schema_of(function) == theirs | {
            "function": {k: v for k, v in theirs["function"].items() if k != "return"}
        }


def undocumented(x: int):
    return x


def untyped(x):
    """Does.

    Args:
        x: What.
    """


async def later(x: int):
    """Does.

    Args:
        x: What.
    """


def unresolved(x: Missing):  # noqa: F821
    """Does.

    Args:
        x: What.
    """


def strange(x: object):
    """Does.

    Args:
        x: What.
    """


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (undocumented, "no docstring"),
        (untyped, "its argument x needs a type"),
        (strange, "none that JSON has"),
        (lambda *x: 0, "no docstring"),
        (later, "the tool later is async"),
        (unresolved, "the tool unresolved: of its types, name 'Missing' is not defined"),
        (partial(read_page), "is no function, as a tool must be"),
        (ToolEnvironment, "is no function, as a tool must be"),
    ],
)
def test_a_function_without_a_schema_is_refused_by_name(function, why):
    with pytest.raises(TypeError, match=why):
        schema_of(function)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "add", "arguments": {"first": 17}}',
        ' {"arguments": {"first": 17}, "name": "add"}\n',
        '<tool_call>\n{"name": "add", "arguments": {"first": 17}}\n</tool_call>',
        'Let me see.\n<tool_call>{"name": "add", "arguments": {"first": 17}}</tool_call>',
        '{"name": "add", "parameters": {"first": 17}}',
        '<|python_tag|>{"name": "add", "parameters": {"first": 17}}',
    ],
)
def test_calls_of_our_own_format_and_of_those_of_the_hub_are_read(text):
    assert parse_call(text) == Call("add", {"first": 17})


@pytest.mark.parametrize("words", ["", "Let me see."])
def test_a_call_of_a_record_is_read_as_our_own_format_writes_it(tmp_path, words):
    function = {"name": "add", "arguments": '{"first": 17}'}
    made = [{"id": "1", "type": "function", "function": function}]
    calls = {"role": "assistant", "content": words, "tool_calls": made}
    ends = {"role": "tool", "content": "18"}, {"role": "assistant", "content": "18."}
    turns = [{"role": "user", "content": "?"}, calls, *ends]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": turns}))
    (record,) = read_source(f"{tmp_path}/calls.jsonl", "conversation", "train")
    tokenizer = train_bpe(["17 and 18"], 280)
    tokens, places = tokenizer.conversation(record.messages)
    text = tokenizer.decode_text([tokens[i] for i in places[1]])
    assert parse_call(text) == Call("add", {"first": 17})
    with pytest.raises(CallError):  # of two
        parse_call(text.replace("[{", '[{"function": {}}, {'))


def test_a_call_is_read_as_it_is_written():
    text = render_call("add", {"é": [1, None]})
    assert text == '{"name": "add", "arguments": {"é": [1, null]}}'
    assert parse_call(text) == Call("add", {"é": [1, None]})


@pytest.mark.parametrize("text", ["", "42.", "The call is {}", "[1]", '"{"'])
def test_what_begins_unlike_a_call_is_none(text):
    assert parse_call(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"name": "add"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "add", "arguments": []}',
        '{"name": "add", "arguments": {}, "id": 1}',
        '{"name": "add", "arguments": {}, "parameters": {}}',
        '{"name": "add", "arguments": {"x": 1, "x": 2}}',
        '{"name": "add", "arguments": {"x": NaN}}',
        '{"name": "add", "arguments": {"x": 1e999}}',
        '{"name": "add", "arguments": {"x": "\\ud83d"}}',  # half a character, which no token has
        '{"name": "\\ud83d", "arguments": {}}',
        '{"name": "add", "arguments": {}} 42',
        '{"name": "add", "arguments": {}}{"name": "add", "arguments": {}}',
        '<tool_call>{"name": "add", "arguments": {}}',
        '<tool_call>{"name": "add", "arguments": {}}</tool_call> So 42.',
        '{"name": "add", "arguments": ' + '{"x": ' * 9999,
        '{"name": "add", "arguments": {"x": ' + "1" * 9999 + "}}",
    ],
)
def test_what_begins_like_a_call_and_is_none_is_a_mistake(text):
    with pytest.raises(CallError):
        parse_call(text)


def test_results_are_texts_as_they_are_and_else_json():
    assert render_result("4 2") == "4 2" and render_result(42) == "42"
    assert render_result({"a": [True, None]}) == '{"a": [true, null]}'
    for value in (None, object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            render_result(value)
    assert is_error(render_error('no "x"')) and not is_error("4") and not is_error('{"error": 1')
    assert not is_error('{"error": "x", "more": 1}')


def answer(text, *functions):
    turns, reward, done = ToolEnvironment(functions or (add, pick)).step(text)
    assert reward == 0 and len(turns) == (not done)
    return turns[0]["content"] if turns else None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("The sum is 18.", None),
        (render_call("add", {"first": 17}), "18"),
        (render_call("add", {"first": 17, "second": 25}), "42"),
        (render_call("pick", {"names": ["Ann"]}), '{"picked": "Ann"}'),
        (render_call("pick", {"names": ["Ann"], "share": 1}), '{"picked": "Ann"}'),
        ('{"name": "add"', '{"error": "the call is no JSON"}'),
        (render_call("sum", {}), '{"error": "unknown tool sum"}'),
        (render_call("add", {}), '{"error": "missing argument first"}'),
        (render_call("add", {"first": 1, "third": 1}), '{"error": "unknown argument third"}'),
        (render_call("add", {"first": "1"}), '{"error": "argument first must be integer"}'),
        (render_call("add", {"first": True}), '{"error": "argument first must be integer"}'),
        (render_call("add", {"first": 1.0}), '{"error": "argument first must be integer"}'),
        (
            render_call("add", {"first": 1, "how": "x"}),
            '{"error": "argument how must be one of plain, wide"}',
        ),
        (
            render_call("pick", {"names": [1]}),
            '{"error": "argument names must be array of string"}',
        ),
    ],
)
def test_a_call_is_answered_by_its_result_or_by_what_is_wrong_with_it(text, content):
    assert answer(text) == content


def test_a_result_that_is_not_finite_is_told_to_the_model_whose_arguments_made_it():
    def twice(x: float) -> float:
        """Doubles.

        Args:
            x: A number.
        """
        return 2 * x

    assert answer(render_call("twice", {"x": 1e307}), twice) == "2e+307"
    told = '{"error": "the result is no finite number"}'
    assert answer(render_call("twice", {"x": 1e308}), twice) == told


def test_what_a_tool_raises_is_told_to_the_model_and_what_it_does_not_return_is_not():
    def halve(x: int) -> int:
        """Halves.

        Args:
            x: An even number.
        """
        if x % 2:
            raise ValueError("x is odd")
        return x // 2 or None

    assert answer(render_call("halve", {"x": 3}), halve) == '{"error": "x is odd"}'
    with pytest.raises(TypeError, match="it returned nothing"):
        answer(render_call("halve", {"x": 0}), halve)
