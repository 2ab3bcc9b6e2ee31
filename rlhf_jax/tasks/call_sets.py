"""Public sets of requests that a call of a tool answers, and which calls are right.

bfcl/{simple,multiple,live_simple}   Berkeley's function-calling leaderboard, v4: one call, of the
                                     one tool or of one of the tools that a request comes with
bfcl/irrelevance                     requests whose tool is of no use for them
toolalpaca/{simulated,real}          ToolAlpaca's evaluation, https://arxiv.org/abs/2306.05301, as
                                     far as one call is its answer

The tools' schemas are entries of the first message, for the chat template to render. A reply is
parsed as any model's call is (`data.calls`). It is right if it calls the right tool, gives no
argument that the set does not know, and gives each one a value that the set accepts; leaving out an
argument that is not required is right where the set accepts "". As on the leaderboard, texts are
compared without case, spaces and the punctuation ,./-_*^. Numbers are compared by value, so that
4.0 is 4; the leaderboard refuses it for an integer: https://gorilla.cs.berkeley.edu/leaderboard.html.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.data.calls import CallError, parse_call
from rlhf_jax.data.jsonl import open_bytes, read_lines
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text
from rlhf_jax.data.shapes import Fields, string
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.data_files import DataFile
from rlhf_jax.tasks.task import Task, Verdict

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": ""}  # Python's → JSON's

Splits = Mapping[str, Iterable[Record]]


def call_verdict(record: Prompt | Pair | Conversation, reply: str) -> Verdict:
    """Whether a reply is one of the calls that `meta["calls"]` accepts, or no call where it is {}.

    `meta["calls"]` is JSON, {tool: {argument: [accepted values]}}.

    Raises:
        UserError: the record does not say which calls are right.
    """
    if "calls" not in record.meta:
        raise UserError(f"{record.id!r} does not say as meta['calls'] which calls are right")
    accepted = json.loads(record.meta["calls"])
    try:
        call = parse_call(reply)
    except CallError:
        return _verdict(False)
    if call is None or not accepted:
        return _verdict(call is None and not accepted)
    return _verdict(call.name in accepted and _fits(call.arguments, accepted[call.name]))


def _verdict(right: bool) -> Verdict:
    return Verdict(float(right), {"correct": float(right)})


def _fits(given: Mapping[str, Any], accepted: Mapping[str, list[Any]]) -> bool:
    """Whether every entry has an accepted value, and none is missing that has to be there."""
    return given.keys() <= accepted.keys() and all(
        any(_equal(given[name], value) for value in _stated(values))
        if name in given
        else "" in values
        for name, values in accepted.items()
    )


def _stated(values: list[Any]) -> list[Any]:
    """Without the "" for an argument that is left out, unless the others are texts or null."""
    texts = all(value is None or isinstance(value, str) for value in values)
    return [value for value in values if value != "" or texts]


def _equal(given: Any, accepted: Any) -> bool:
    """Whether a value is the accepted one, in which an object's entries are lists of values."""
    match given, accepted:
        case str(), str():
            return _plain(given) == _plain(accepted)
        case list(), list():
            pairs = zip(given, accepted, strict=False)
            return len(given) == len(accepted) and all(_equal(*pair) for pair in pairs)
        case dict(), dict():
            return _fits(given, accepted)
        case (bool(), _) | (_, bool()):
            return given is accepted
        case _:
            return given == accepted


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _bfcl(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """`config`'s questions with the calls that are accepted, in the file of the same name."""

    answers: dict[str, Any] = {}

    def read_answer(fields: Fields, default_id: str) -> Text:
        (answers[string(fields, "id")],) = fields["ground_truth"]
        return Text(default_id, "")

    questions, *accepted = paths
    for path in accepted:
        read_lines(path, read_answer)

    def convert(fields: Fields, default_id: str) -> Prompt | None:
        name, (turns,) = string(fields, "id"), fields["question"]
        described = {each["name"]: each["parameters"] for each in fields["function"]}
        calls = {
            tool: _of_parameters(accepted, described[tool])
            for tool, accepted in answers.get(name, {}).items()
        }
        if not all(map(_has_values, calls.values())):
            left_out["answered by no value"] += 1
            return None
        tools = [{"type": "function", "function": _in_json(each)} for each in fields["function"]]
        first, *others = [Message(turn["role"], turn["content"]) for turn in turns]
        more = json.dumps({"tools": tools}, ensure_ascii=False)
        messages = (Message(first.role, first.content, more), *others)
        return Prompt(name, messages, {"type": config, "calls": json.dumps(calls)})

    return {"validation": read_lines(questions, convert)}


def _of_parameters(
    accepted: Mapping[str, list[Any]], parameters: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """The accepted values of a tool's arguments, "" only where one may be left out.

    What no text is and accepts "" alone can be left out only: it is no argument of the call.
    """
    made = {}
    for name, values in accepted.items():
        textual = parameters["properties"][name]["type"] in ("string", "any")
        if name in parameters["required"]:
            made[name] = [value for value in values if value != ""]
        elif textual or any(value != "" for value in values):
            made[name] = values
    return made


def _has_values(accepted: Mapping[str, list[Any]]) -> bool:
    """Whether every argument has a value that is accepted, in objects too."""
    objects = (value for values in accepted.values() for value in values if isinstance(value, dict))
    return all(accepted.values()) and all(map(_has_values, objects))


def _in_json(schema: Any) -> Any:
    """A schema with JSON's names of types in place of Python's; "any" has none."""
    if isinstance(schema, list):
        return [*map(_in_json, schema)]
    if not isinstance(schema, dict):
        return schema
    made = {name: _in_json(value) for name, value in schema.items()}
    if isinstance(schema.get("type"), str):
        made["type"] = _TYPES.get(schema["type"], schema["type"])
        if not made["type"]:
            del made["type"]
    return made


def _toolalpaca(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """The instructions of every tool that are answered by one call; the others are counted."""
    with open_bytes(paths[0]) as file:
        groups = json.load(file)
    prompts = []
    for group in groups:
        described = {**group["Function_Description"]}
        described.pop("components", None)  # what objects hold, no function
        tools = [_described(*item) for item in described.items()]
        asked = zip(group["Instructions"], group["Golden_Answers"], strict=True)
        for i, (instruction, calls) in enumerate(asked):
            if len(calls) != 1:
                left_out["answered by several calls"] += 1
                continue
            accepted, why = _golden(calls[0], described)
            if why:
                left_out[why] += 1
                continue
            first = Message("user", instruction, json.dumps({"tools": tools}, ensure_ascii=False))
            meta = {"type": config, "calls": json.dumps(accepted)}
            prompts.append(Prompt(f"{group['Name']} {i}", (first,), meta))
    return {"validation": prompts}


def _golden(call: Mapping[str, str], described: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """(the call as `meta["calls"]` has it, why it is none): some are no JSON or of no tool here."""
    if call["Action"] not in described:
        return {}, "answered by a tool that is not described"
    try:
        given = json.loads(call["Action_Input"])
    except ValueError:
        return {}, "answered by arguments that are no JSON"
    return {call["Action"]: _entries(given)}, ""


def _entries(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values that are accepted of each entry of an object, which are those that it has."""
    return {name: [_accepted(value)] for name, value in given.items()}


def _accepted(value: Any) -> Any:
    """A value as the accepted one, in which an object's entries are lists of values."""
    if isinstance(value, list):
        return [*map(_accepted, value)]
    return _entries(value) if isinstance(value, dict) else value


def _described(name: str, text: str) -> dict[str, Any]:
    """A function's schema, of the lines that describe it: `Parameters: {name: text}` is one."""
    described = re.search(r"^Parameters: (\{.*\})$", text, re.MULTILINE)
    parameters = json.loads(described[1]) if described else {}
    schema = {
        "type": "object",
        "properties": {key: {"description": value} for key, value in parameters.items()},
        "required": [key for key, value in parameters.items() if value.startswith("Required")],
    }
    purpose = text.partition("\n")[0]
    function = {"name": name, "description": purpose, "parameters": schema}
    return {"type": "function", "function": function}


_BFCL_URL = (
    "https://raw.githubusercontent.com/ShishirPatil/gorilla/6ea57973c7a6097fd7c5915698c54c17c5b1b6c8/"
    "berkeley-function-call-leaderboard/bfcl_eval/data/"
)
_TOOLALPACA_URL = (
    "https://raw.githubusercontent.com/tangqiaoyu/ToolAlpaca/189069998d64a7baf1b4a1c3c4b2e75eb9d05532/"
    "data/"
)


def _bfcl_files(name: str, sha256: str, answers_sha256: str = "") -> tuple[DataFile, ...]:
    """The questions and, where there are any, the calls that are accepted."""
    file = f"BFCL_v4_{name}.json"
    questions = DataFile(f"tool_bfcl/BFCL_v4_{name}.jsonl.gz", _BFCL_URL + file, sha256)
    if not answers_sha256:
        return (questions,)
    answers = f"tool_bfcl/possible_answer_BFCL_v4_{name}.jsonl.gz"
    return questions, DataFile(answers, f"{_BFCL_URL}possible_answer/{file}", answers_sha256)


def _toolalpaca_files(config: str, sha256: str) -> tuple[DataFile, ...]:
    file = f"eval_{config}.json"
    return (DataFile(f"tool_toolalpaca/{file}.gz", _TOOLALPACA_URL + file, sha256),)


def _set(name: str, make, files: Mapping[str, tuple[DataFile, ...]]) -> Task:
    return Task(
        name,
        dict.fromkeys(files, "prompt"),
        make,
        files,
        verify=call_verdict,
        verifies=lambda meta: "calls" in meta,
        group="type",
    )


CALL_SETS = (
    _set(
        "bfcl",
        _bfcl,
        {
            "simple": _bfcl_files(
                "simple_python",
                "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
                "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
            ),
            "multiple": _bfcl_files(
                "multiple",
                "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
                "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047",
            ),
            "live_simple": _bfcl_files(
                "live_simple",
                "1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4",
                "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce",
            ),
            "irrelevance": _bfcl_files(
                "irrelevance", "2b6ed4c2e992cdcf5f1678a701851f944bef7550ee026ed1ddb89efed5be01a6"
            ),
        },
    ),
    _set(
        "toolalpaca",
        _toolalpaca,
        {
            "simulated": _toolalpaca_files(
                "simulated", "17085ffefae0a0e15c1d2d564263063932d692011edf27ce8ae3d3803432ba08"
            ),
            "real": _toolalpaca_files(
                "real", "86d1392c786060e00dd6feaa963d8a87660e3042380b0abbd8ccad2b931e2778"
            ),
        },
    ),
)
