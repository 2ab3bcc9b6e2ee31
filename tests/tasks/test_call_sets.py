"""Which calls are right, by the sets' own answers and by calls that differ in one thing."""

from __future__ import annotations

import json

import pytest

from rlhf_jax import evaluate
from rlhf_jax.data.calls import render_call
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.public_requests import LONGEST, count_replies
from rlhf_jax.files import write_json
from rlhf_jax.tasks import data_files
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.call_sets import _golden, call_verdict

FOLDER = data_files.data_folder()
needs_data = pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "tool_bfcl").is_dir(), reason="no public sets here"
)
ACCEPTED = {
    "area": {
        "base": [10],
        "unit": ["square cm", ""],
        "exact": [True],
        "points": [[[1.0, 2], [3, 4]], ""],
        "where": [{"name": ["Rome", "Roma"], "zip": ["00100", ""]}, ""],
    }
}
SUMMARY = {"stage": "sft", "status": "done", "config_hash": "0", "parents": {}, "metrics": {}}
SUMMARY |= {"wall_seconds": 1.0}
GIVEN = {"base": 10, "exact": True}


def prompt(accepted, kind="simple"):
    meta = {"type": kind, "calls": json.dumps(accepted)}
    return Prompt(kind, (Message("user", "?"),), meta)


def right(reply, accepted=ACCEPTED):
    return call_verdict(prompt(accepted), reply).right


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"base": 10.0}, True),
        ({"base": "10"}, False),
        ({"base": 11}, False),
        ({"exact": 1}, False),  # True == 1 in Python, not in JSON
        ({"unit": "Square-CM."}, True),
        ({"unit": "cm"}, False),
        ({"points": [[1, 2.0], [3, 4]]}, True),
        ({"points": [[1, 2]]}, False),
        ({"where": {"name": "roma"}}, True),
        ({"where": {"name": "Rome", "zip": "1"}}, False),
        ({"where": {"zip": "00100"}}, False),
        ({"colour": "red"}, False),
        ({"unit": ""}, True),
        ({"points": ""}, False),  # which may be left out, and is no text
    ],
)
def test_an_argument_is_right_if_its_value_is_accepted(changed, expected):
    assert right(render_call("area", GIVEN | changed)) is expected


def test_an_object_in_a_golden_call_is_right_entry_by_entry():
    given = {"user": {"name": "Ann", "age": 3}, "rights": [{"id": "edit"}]}
    accepted, _ = _golden({"Action": "add", "Action_Input": json.dumps(given)}, {"add": ""})
    assert right(render_call("add", given), accepted)
    for name, value in (("user", {}), ("user", {"name": "Ann", "age": 4}), ("rights", [{}])):
        assert not right(render_call("add", given | {name: value}), accepted)


def test_what_is_no_right_call():
    call = render_call("area", GIVEN)
    assert right(f"<tool_call>{call}</tool_call>") and right(
        call.replace("arguments", "parameters")
    )
    assert not right(render_call("area", {"base": 10}))  # "exact" has to be there
    assert not right(render_call("volume", GIVEN))
    assert not right("The area is 100.") and not right(call[:-1]) and not right(call + call)
    # Where no tool helps, a call is wrong, also one that is none.
    assert right("I have no tool for that.", {}) and right("", {})
    assert not right(call, {}) and not right("{", {})
    with pytest.raises(UserError, match="does not say"):
        call_verdict(Prompt("p", ()), call)


def test_rates_are_of_each_type():
    prompts = [prompt(ACCEPTED), prompt(ACCEPTED), prompt({}, "irrelevance")]
    lines = count_replies(prompts, [render_call("area", GIVEN), " ", "No."])
    assert [(line.of, line.prompts, line.rate, line.empty) for line in lines] == [
        ("all", 3, 2 / 3, 1),
        ("irrelevance", 1, 1.0, 0),
        ("simple", 2, 0.5, 1),
    ]


def answered(accepted):
    """The first value that is accepted of each argument that has to be there."""

    def value(choice):
        if isinstance(choice, dict):
            return {name: value(values[0]) for name, values in choice.items() if "" not in values}
        return [*map(value, choice)] if isinstance(choice, list) else choice

    ((name, arguments),) = accepted.items()
    return render_call(name, value(arguments))


@needs_data
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bfcl/simple", 400),
        ("bfcl/multiple", 200),
        ("bfcl/live_simple", 256),
        ("bfcl/irrelevance", 240),
        ("toolalpaca/simulated", 51),
        ("toolalpaca/real", 87),
    ],
)
def test_the_sets_own_answers_are_right(name, count):
    records = load_records(name, "validation")
    assert len(records) == count
    for record in records:
        tools = json.loads(record.messages[0].more)["tools"]
        names = {tool["function"]["name"] for tool in tools}
        accepted = json.loads(record.meta["calls"])
        assert accepted.keys() <= names, record.id
        reply = answered(accepted) if accepted else "No tool does that."
        assert call_verdict(record, reply).right, record.id
        assert not call_verdict(record, render_call("another", {})).right
        # In tokens of 3.5 characters, with <tool_call> and its end around it.
        assert len(reply) / 3.5 + 30 < LONGEST["call"], record.id


@needs_data
def test_an_argument_that_is_required_is_not_to_be_left_out():
    for config in ("simple", "multiple", "live_simple"):
        for record in load_records(f"bfcl/{config}", "validation"):
            functions = (tool["function"] for tool in json.loads(record.messages[0].more)["tools"])
            described = {each["name"]: each["parameters"] for each in functions}
            for tool, arguments in json.loads(record.meta["calls"]).items():
                for name in described[tool]["required"]:
                    assert "" not in arguments[name], (record.id, name)


def test_a_set_that_there_is_not(tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", "--tasks=bfcl,nothing", f"--out={tmp_path}/out"]
    assert evaluate.main(flags) == 2
    assert "there are xstest, advbench, bfcl, toolalpaca" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--count=0", "--count=-1", "--max-new-tokens=0"])
def test_a_limit_below_1(tmp_path, capsys, flag):
    flags = [f"--workdir={tmp_path}", "--tasks=bfcl", f"--out={tmp_path}/out", flag]
    assert evaluate.main(flags) == 2
    assert f"{flag}: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["--tasks=bfcl", "--data=town"])
def test_a_file_in_place_of_the_directory_to_write(tmp_path, capsys, what):
    (tmp_path / "out").touch()
    write_json(tmp_path / "summary.json", SUMMARY)
    assert evaluate.main([f"--workdir={tmp_path}", what, f"--out={tmp_path}/out"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: Not a directory\n"


def test_a_hub_directory_has_no_stage_to_evaluate_records(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    assert evaluate.main([f"--workdir={tmp_path}", "--data=town", f"--out={tmp_path}/out"]) == 2
    assert "is no run of a stage that evaluates records" in capsys.readouterr().err


def test_a_chat_template_is_not_dropped(tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", "--data=town", "--config.data.chat_template=qwen"]
    assert evaluate.main(flags) == 2
    assert "chat_template is of --tasks, not of --data" in capsys.readouterr().err
