"""What is told and asked for later: the right answers, by the texts alone."""

from __future__ import annotations

import re

import pytest

from rlhf_jax.tasks.town.families.exercise import loads, lower
from rlhf_jax.tasks.town.gold import mentioned
from rlhf_jax.tasks.town.memory import (
    DISTANCES,
    HELDOUT_COUNTS,
    KINDS,
    LOADS,
    MemoryTown,
    outcomes,
    values_of,
    verify,
)
from rlhf_jax.tasks.town.phrasings import PEOPLE, TURNS, VALUES
from rlhf_jax.tasks.town.tools import new_names
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN

TOWN = MemoryTown(Town())
DIALOGUES = [*TOWN.conversations(TRAIN, 400)]
HELD_OUT = [*TOWN.prompts(HELDOUT)]
ATTRIBUTES = [*TURNS["own"]]


def said_by(record, role):
    return [message.content for message in record.messages if message.role == role]


def of_kind(kind):
    return [record for record in HELD_OUT if record.meta["memory"] == kind]


def required(record):
    return loads(record.meta["expectation"]).required


def test_the_answer_of_a_dialogue_is_right_and_no_other_dialogue_s_is():
    kinds = {kind: [d for d in DIALOGUES if d.meta["memory"] == kind] for kind in KINDS}
    assert all(len(each) > 60 for each in kinds.values())
    for dialogue in DIALOGUES:
        assert verify(dialogue, dialogue.messages[-1].content).right
    for kind in ("own", "third", "update"):
        for one, other in zip(kinds[kind], kinds["unknown"], strict=False):
            assert not verify(one, other.messages[-1].content).right
            assert not verify(other, one.messages[-1].content).right


@pytest.mark.parametrize("records", [DIALOGUES, HELD_OUT])
def test_the_answer_stands_nowhere_but_where_it_was_told(records):
    for record in records:
        if record.meta["memory"] == "unknown":
            continue
        ((value,),) = required(record)
        turns = [m for m in record.messages if m.role == "user"]
        holds = [i for i, turn in enumerate(turns) if value in mentioned(turn.content)]
        assert holds == [len(turns) - 1 - int(record.meta["distance"])]
        replies = said_by(record, "assistant")[: len(turns) - 1]
        assert not any(value in mentioned(reply) for reply in replies)


def questions_for(told):
    """Every question, in lower case, for facts by (who, attribute), or (attribute,) of the user."""
    for *who, attribute in told:
        table = PEOPLE[attribute].questions if who else TURNS["own"][attribute]["questions"]
        slots = {"who": who[0], "whose": f"{who[0]}'s"} if who else {}
        yield from (q.format(**slots) for q in table if {*re.findall(r"{(\w+)}", q)} <= {*slots})


@pytest.mark.parametrize(("changes", "some"), [(0.2, 150), (0.4, 350)])
def test_a_drill_answers_with_what_was_told_last_and_admits_what_was_not(changes, some):
    attributes = {value.lower(): name for name in ATTRIBUTES for value in VALUES[name]}
    told_of = attributes.keys() - lower(*VALUES["visitor"])
    names = {*lower(*VALUES["visitor"], *new_names())}
    answered = admitted = changed = 0
    for drill in TOWN.drills(TRAIN, 150, changes=changes):
        own = any(reply.startswith("You") for reply in said_by(drill, "assistant"))
        people = set() if own else names
        told = {}  # (who, attribute) → value; who is nobody of the user
        for asks, reply in zip(said_by(drill, "user"), said_by(drill, "assistant"), strict=True):
            for sentence in [reply] if asks.endswith("?") else asks.split("."):
                values = mentioned(sentence)
                who = people & {*re.findall(r"[a-z]+", sentence.lower())}
                keys = {value: (*who, attributes[value]) for value in values & told_of}
                if asks.endswith("?"):
                    assert all(told[key] == value for value, key in keys.items()), (drill, reply)
                    answered, admitted = answered + bool(keys), admitted + (not keys)
                    was_told = asks.lower().endswith(tuple(questions_for(told)))
                    assert keys or not was_told, (drill, asks)
                    continue
                new = {key: value for value, key in keys.items() if told.get(key) != value}
                changed += bool(told.keys() & new.keys())
                told |= new
    assert answered > 400 and admitted > 100 and changed > some


def test_held_out_drills_go_on_where_all_new_values_are_told():
    for options in ({}, {"name": "change", "changes": 0.4}):
        assert len([*TOWN.drills(HELDOUT, 1_200, **options)]) == 1_200


def test_loads_are_what_is_told_at_once():
    for record in (*of_kind("own"), *of_kind("third")):
        first = mentioned(said_by(record, "user")[0])
        values = (
            first - set(lower(*VALUES["visitor"])) if record.meta["memory"] == "third" else first
        )
        assert len(values) == int(record.meta["load"]), record


def test_held_out_questions_are_about_what_training_never_tells():
    told = {name: {*lower(*values_of(name, HELDOUT))} for name in ATTRIBUTES}
    for name in ATTRIBUTES:
        assert {*values_of(name, TRAIN)} | {*values_of(name, HELDOUT)} == {*VALUES[name]}
    held_out = set().union(*told.values())
    for dialogue in DIALOGUES:
        expected = {value for group in required(dialogue) for value in group}
        stated = mentioned(said_by(dialogue, "user")[0])
        assert held_out.isdisjoint(stated | expected), dialogue
    for record in (*of_kind("own"), *of_kind("third"), *of_kind("update")):
        ((value,),) = required(record)
        assert (value in held_out) == (record.meta["values"] == "new")


def test_held_out_questions_are_of_every_kind_distance_and_load():
    for kind in ("own", "third"):
        found = [(r.meta["load"], r.meta["distance"]) for r in of_kind(kind)]
        for load in LOADS:
            for distance in DISTANCES:
                assert found.count((str(load), str(distance))) == HELDOUT_COUNTS["recall"]
    assert len(of_kind("update")) == len(of_kind("unknown")) == HELDOUT_COUNTS["other"]
    assert len({tuple(r.messages) for r in HELD_OUT}) == len(HELD_OUT)
    trained = {d.messages[:-1] for d in DIALOGUES}
    assert trained.isdisjoint(r.messages for r in HELD_OUT)


def test_outcomes_by_hand():
    foods = lower(*VALUES["food"])
    own = next(record for record in of_kind("own") if required(record)[0][0] in foods)
    food = required(own)[0][0]
    other = next(v for v in VALUES["food"] if v != food)
    names = {f"distance/{own.meta['distance']}", f"load/{own.meta['load']}", "own"}
    for reply, right in ((f"You like {food}.", 1), (f"You like {other}.", 0), ("I see.", 0),
                         (f"You like {food} and {other}.", 0), ("I don't know.", 0)):  # fmt: skip
        counted = {f"memory/{own.meta['values']}/recall/{name}": (right, 1) for name in names}
        assert outcomes(own, [reply]) == counted

    def shares(record, reply):
        found = outcomes(record, [reply]).items()
        return {name.rpartition("/")[2]: share for name, (share, _) in found}

    update = of_kind("update")[0]
    new, old = required(update)[0][0], update.meta["old"]
    assert old != new
    assert shares(update, f"It is {new}.") == {"updated": 1, "resurrected": 0}
    assert shares(update, f"It is {old}.") == {"updated": 0, "resurrected": 1}
    unknown = of_kind("unknown")[0]
    value = VALUES[unknown.meta["attribute"]][0]
    assert shares(unknown, "I don't know.") == {"abstained": 1, "false_memory": 0}
    assert shares(unknown, f"It is {value}.") == {"abstained": 0, "false_memory": 1}
    assert shares(unknown, "I see.") == {"abstained": 0, "false_memory": 0}
