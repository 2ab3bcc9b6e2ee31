"""Tasks: who verifies what, and that only tasks/ knows the town."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_jax.data.records import Conversation, Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.scorers import TextScorers
from rlhf_jax.tasks.builders import TASKS, load_records, task_of, verifier_of, verify
from rlhf_jax.tasks.town.dataset import TOWN

ROOT = Path(__file__).parents[2] / "rlhf_jax"
ASKED = (Message("user", "6 times 7?"),)
NUMBER = Prompt("n", ASKED, {"answer": "42"})
NEITHER = Prompt("x", ASKED, {"answer": "Ann, aged 9", "label": "1"})


def test_a_record_says_which_verifier_can_judge_replies_to_it():
    fact = load_records("town/facts", "validation")[0]
    assert verifier_of([fact]) is TOWN and verifier_of([NUMBER]) is TASKS["gsm8k"]
    assert verifier_of([NUMBER, fact]) is None and verifier_of([NEITHER]) is None
    assert verifier_of([]) is None
    assert verify(fact, fact.meta["reference"]).total > 0.9
    solved = Conversation("c", (*ASKED, Message("assistant", "#### 42")), NUMBER.meta)
    assert verify(solved, "The answer is 42.").right and not verify(solved, "6 or 7").right
    with pytest.raises(UserError, match="nothing to verify a reply by"):
        verify(NEITHER, "9")


def test_the_gold_reward_is_that_of_each_record_s_task():
    fact = load_records("town/facts", "validation")[0]
    with TextScorers({"gold": 1, "correct": 1}) as scorers:
        replies = ["It is 42.", "41", fact.meta["reference"]]
        scores = scorers.score([NUMBER, NUMBER, fact], replies, lengths=[1, 1, 1])
    assert scores.components["correct"].tolist() == [1, 0, 1]
    assert scores.components["gold"][:2].tolist() == [1, 0] and scores.total[2] > 1.9


def test_safe_is_that_component_of_the_verifier_that_has_one():
    asked = load_records("safety/asked", "validation")
    harmful = next(record for record in asked if record.meta["safety"] == "harmful")
    with TextScorers({"safe": 1}) as scorers:
        replies = [harmful.meta["reference"], "Just grab it and run."]
        assert scorers.score([harmful] * 2, replies, lengths=[1, 1]).total.tolist()[1] == 0
        assert scorers.score([harmful], replies[:1], lengths=[1]).total.tolist() == [1]
        with pytest.raises(UserError, match="no component 'safe'; there are: correct"):
            scorers.score([NUMBER], ["42"], lengths=[1])


def test_a_name_is_a_task_or_a_line_that_names_them_all():
    assert task_of("gsm8k/prompt") is TASKS["gsm8k"] and task_of("town") is TOWN
    with pytest.raises(
        UserError, match=r"unknown data set 'twon'; known: .*imdb, .*safety, town, town_tools, hf:"
    ):
        task_of("twon/facts")


def test_only_tasks_knows_the_town():
    for path in ROOT.rglob("*.py"):
        if ROOT / "tasks" not in path.parents:
            assert not re.search(r"tasks\.town|tasks import town", path.read_text("utf-8")), path
