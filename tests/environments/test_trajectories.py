"""Environments in their process: one instance a trajectory, and no fault without a name."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.digests import ROOT as PACKAGE
from rlhf_jax.environments import worker
from rlhf_jax.environments.trajectories import (
    EnvironmentOptions,
    Environments,
    environments_of,
    trajectory_seeds,
)
from rlhf_jax.errors import UserError
from rlhf_jax.sampling.arguments import Turn
from tests.processes import is_gone

OWN = '''
import random, time
import os

class Count:
    """Says back how often it was asked; done at the third time."""
    def reset(self, row, seed):
        self.asked, self.limit = 0, 3
        return row["prompt"] + [] if row.get("plain") else [
            {"role": "user", "content": f"{row['id']} {row['colour']} {seed}"}
        ]
    def step(self, text):
        self.asked += 1
        if self.asked == self.limit:
            return [], 1.0, True
        return [{"role": "tool", "content": f"{self.asked}: {text}"}], 0.25, False

class Shared(Count):
    log = []
    def reset(self, row, seed):
        self.log.append(seed)
        return [{"role": "user", "content": str(len(self.log))}]

class Fragile(Count):
    made = 0
    def __init__(self):
        Fragile.made += 1
        if Fragile.made == 2:
            raise RuntimeError("no licence")

class Named(Count):
    final_reward = 0.5

class Renamed:
    def reset(self, record, seed):
        return record["prompt"]
    def step(self, text):
        return [], 0.0, True

class Two(Count):
    def reset(self, row, seed):
        return [*row["prompt"], {"role": "user", "content": "And?"}]

class Bad(Count):
    def step(self, text):
        if text == "raise":
            raise ValueError("no such shop")
        if text == "hang":
            while True:
                try:
                    time.sleep(1)
                except Exception:
                    pass
        if text == "die":
            os._exit(3)
        if text == "exit":
            raise SystemExit(2)
        return {
            "no text": ([{"role": "tool", "content": 4}], 0, False),
            "system": ([{"role": "system", "content": "x"}], 0, False),
            "no turn": ([], 0, False),
            "half": ([{"role": "tool", "content": "\\ud83d"}], 0, False),
            "set": ([{"role": "tool", "content": "x", "name": {1}}], 0, False),
            "both": ([{"role": r, "content": "x"} for r in ("tool", "user")], 0, False),
            "no reward": ([{"role": "tool", "content": "x"}], None, False),
            "nan": ([], float("nan"), True),
            "two": ([], 0),
        }.get(text, ([{"role": "tool", "content": "ok"}], 0, False))
'''

# https://huggingface.co/docs/trl/openenv: a class as TRL takes it.
TRL = '''
class IncrementEnv:
    def reset(self, start: str = "0", **kwargs) -> str | None:
        self.counter = int(start)
        return f" It is {self.counter}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter

    def get_reward(self) -> float:
        return float(self.counter == 3)

def calculate(expression: str) -> str:
    """Adds.

    Args:
        expression: Two numbers with + between.
    """
    return str(sum(map(int, expression.split("+"))))

def untyped(x):
    return x

NUMBER = 3
'''


class Words:
    """A tokenizer whose tokens are letters; a turn's last one is what ends it."""

    ends = (0,)

    def decode_text(self, tokens):
        return "".join(map(chr, tokens))

    def prompt(self, messages):
        return [ord(c) for m in messages for c in f"[{m.role}]{m.content}"]

    def continuation(self, messages, *, for_tools=False):
        return [*self.prompt(messages), *([ord("+")] if for_tools else [])]


RECORDS = [
    Prompt("ann", (Message("user", "Hi"),), {"colour": "red"}),
    Prompt("ann", (Message("user", "Ho"),), {"colour": "blue", "id": "not this"}),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "trl.py").write_text(TRL)
    monkeypatch.chdir(tmp_path)


def said(prompt, sample, text):
    return Turn(prompt, sample, [*map(ord, text), 0])


def opened(file="own.py:Count", samples=2, records=RECORDS, **options):
    environments = Environments(EnvironmentOptions(file, **options))
    seeds = trajectory_seeds(7, range(len(records)))
    return environments, environments.open(Words(), records, samples, seeds)


def texts(answers):
    return [None if a is None else "".join(map(chr, a)) for a in answers]


def test_an_environment_is_opened_stepped_and_done(files):
    environments, play = opened()
    with environments:
        first, second = (trajectory_seeds(7, [i])[0] for i in (0, 1))
        assert texts(play.prompts) == [f"[user]ann red {first}", f"[user]ann blue {second}"]
        assert play.records[1].messages == (Message("user", f"ann blue {second}"),)
        # Two records of one id, and samples of one record, do not share an instance.
        turns = [said(0, 0, "a"), said(1, 1, "b"), said(0, 1, "c")]
        assert texts(play.respond(turns)) == ["[tool]1: a", "[tool]1: b", "[tool]1: c"]
        assert texts(play.respond([said(0, 0, "d")])) == ["[tool]2: d"]
        assert texts(play.respond([said(0, 0, "e"), said(1, 1, "f")])) == ["", "[tool]2: f"]
        ours = play.trajectories[0]
        assert ours.rewards == [0.25, 0.25, 1.0] and ours.calls == 2 and not ours.invalid
        assert [len(each.rewards) for each in play.trajectories] == [3, 1, 0, 2]
    assert environments._child.pid is None


def test_an_instance_of_all_or_a_shared_log_is_found_where_answers_open_differently(files):
    with pytest.raises(UserError, match=r"prompt 'ann', sample 0: .* opened by different turns"):
        opened("own.py:Shared")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise", r"raised ValueError: no such shop \(.*own.py, line \d+\)"),
        ("hang", "took longer than 0.2 s"),
        ("die", "ended its process with exit status 3"),
        ("exit", r"raised SystemExit: 2 \(.*own.py, line \d+\)"),
        ("half", r"of a turn, .* surrogates not allowed"),
        ("set", r"of a turn, .* Object of type set is not JSON serializable"),
        ("both", "turns of tool, user: one of the user, or of tools alone"),
        ("no text", "the content 4 of a turn is no text"),
        ("system", r"\{.*'system'\} is no turn of user or tool"),
        ("no turn", r"returned \[\] instead of a list of turns"),
        ("no reward", "its reward None is no finite number"),
        ("nan", "its reward nan is no finite number"),
        ("two", r"returned \(\[\], 0\) instead of \(turns, reward, done\)"),
    ],
)
def test_an_environment_that_fails_ends_the_run_by_name_or_is_masked(files, text, detail, capsys):
    environments, play = opened("own.py:Bad", timeout_seconds=0.2)
    told = rf"^environment, prompt 'ann', sample 1: {detail}.*; mend it, or leave such"
    with environments, pytest.raises(UserError, match=told):
        play.respond([said(0, 1, text)])
    environments, play = opened("own.py:Bad", timeout_seconds=0.2, on_error="mask")
    with environments:
        answers = texts(play.respond([said(0, 1, text), said(1, 0, "fine")]))
        if text == "die":  # with its process all instances went
            assert answers == [None, None] and texts(play.respond([said(0, 0, "x")])) == [None]
            assert play.trajectories[0].fault == "lost"
        else:
            assert answers == [None, "[tool]ok"] and not play.trajectories[2].fault
        assert play.trajectories[1].fault and texts(play.respond([said(0, 1, "x")])) == [None]
    assert capsys.readouterr().out.count("left out of training, and counted") == 1 + (text == "die")


def test_an_instance_that_cannot_be_made_is_one_trajectorys_fault(files):
    environments, play = opened("own.py:Fragile", on_error="mask")
    with environments:
        assert [each.fault for each in play.trajectories] == ["", "raised", "", ""]
        assert texts(play.respond([said(0, 0, "a"), said(0, 1, "b")])) == ["[tool]1: a", None]


def test_turns_that_no_prompt_may_have_are_told_with_the_trajectory(files):
    with pytest.raises(UserError, match=r"^environment, prompt 'ann', sample 0: .*cannot follow"):
        opened("own.py:Two", records=[dataclasses.replace(RECORDS[0], meta={})])


def test_only_tools_are_asked_for_a_final_reward(files):
    environments, play = opened("own.py:Named")
    with environments:
        play.respond([said(0, 0, "a")])
        play.end([False, True, True, True])
        assert play.trajectories[0].rewards == [0.25, 0.0]


def test_calls_end_at_their_limit_and_what_was_cut_off_is_asked_for_its_reward(files):
    record = Prompt("n", (Message("user", "Count to 3."),), {"start": "1"})
    environments, play = opened("trl.py:IncrementEnv", 2, [record], max_calls=1, describe=False)
    with environments:
        assert texts(play.prompts) == ["[user]Count to 3. It is 1."]
        call = '{"name": "increment", "arguments": {"step": 2}}'
        assert texts(play.respond([said(0, 0, call), said(0, 1, call)])) == ["[tool]3", "[tool]3"]
        assert texts(play.respond([said(0, 0, call), said(0, 1, "Done.")])) == [None, ""]
        play.end([False, True])
        assert [sum(each.rewards) for each in play.trajectories] == [0.0, 1.0]
        assert [each.calls for each in play.trajectories] == [1, 1]


def test_tools_are_described_in_the_first_turn_and_mistakes_are_counted(files):
    environments, play = opened("", 1, tools="trl.py:calculate")
    with environments:
        more = play.records[0].messages[0].to_json()["tools"]
        assert [tool["function"]["name"] for tool in more] == ["calculate"]
        good = said(0, 0, '{"name": "calculate", "arguments": {"expression": "17+25"}}')
        bad = said(1, 0, '{"name": "calculate", "arguments": {"expression": 1}}')
        error = '[tool]{"error": "argument expression must be string"}+'
        assert texts(play.respond([good, bad])) == ["[tool]42+", error]
        assert [(t.calls, t.invalid) for t in play.trajectories] == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"file": "own.py:Missing"}, "own.py has no function or class 'Missing'"),
        ({"file": "trl.py:calculate"}, "trl.py:calculate is no class"),
        ({"file": "trl.py:NUMBER"}, "has no function or class 'NUMBER'"),
        ({"tools": "trl.py:untyped"}, "the tool untyped has no docstring"),
        ({"tools": "trl.py:calculate,trl.py:calculate"}, "two tools are called calculate"),
        ({"file": "own.py:Renamed"}, r"has reset\(self, row, seed\) and step"),
        ({"file": "own.py:Count", "tools": "trl.py:calculate"}, "has step"),
        ({"file": "gone.py:Env"}, "there is no file gone.py"),
        ({"tools": "trl.py"}, "'trl.py' names no function or class; write mine.py:name"),
    ],
)
def test_what_is_no_environment_and_no_tool_is_told_before_anything_runs(files, options, why):
    with pytest.raises(UserError, match=why):
        Environments(EnvironmentOptions(**options))


def test_where_none_is_named_there_is_none(files):
    for options in (None, EnvironmentOptions(), EnvironmentOptions(tools=" , ")):
        with environments_of(options) as environments:
            assert environments is None


def test_the_process_ends_with_its_context(files):
    environments, _ = opened()
    with environments:
        pid = environments._child.pid
    assert is_gone(pid)


def test_seeds_are_of_the_prompt_and_of_31_bits():
    assert trajectory_seeds(3, [5, 6]) == [*trajectory_seeds(3, [5]), *trajectory_seeds(3, [6])]
    assert trajectory_seeds(3, [5]) != trajectory_seeds(4, [5])
    assert all(0 <= s < 2**31 for s in trajectory_seeds(0, range(100)))
    assert dataclasses.replace(EnvironmentOptions(), file="a.py:B").named == ["a.py:B"]


def test_a_file_of_the_package_is_found_from_anywhere(files):
    town = "rlhf_jax/tasks/town/episodes.py:TownEnvironment"
    options = EnvironmentOptions(town, "trl.py:calculate")
    assert options.named == [str(PACKAGE.parent / town), "trl.py:calculate"]
    with Environments(EnvironmentOptions(town)) as environments:
        assert environments.schemas == []


def test_what_is_too_slow_at_its_very_end_has_one_outcome(monkeypatch):
    @contextlib.contextmanager
    def at_its_end(seconds):
        yield
        raise worker._TooSlow

    class Turns:
        def reset(self, row, seed):
            return row["prompt"]

    monkeypatch.setattr(worker, "_within", at_its_end)
    row = {"row": {"prompt": [{"role": "user", "content": "?"}]}, "seed": 0}
    outcomes = worker.play(worker.Loaded(Turns, [], 1.0, ""), "open", ["0", "1"], [row, row])
    assert [outcome["fault"][0] for outcome in outcomes] == ["timed out"] * 2
