"""Answers that are criticised and revised, and what a critic learns from."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.held_out_answers import Answer
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import Answers, gold
from rlhf_jax.judges.revision import (
    FAULTY,
    FINE,
    asked_to_criticise,
    examples,
    gold_table,
    keep_preferred,
    revise,
)
from rlhf_jax.judges.sampled import Policy, read_pairs, read_prompts
from rlhf_jax.label.files import prompt_fields
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.training.saved_model import load_model
from tests.judges.test_labels import CONFIG, written
from tests.test_export import saved

SAFE = Principle("safe", "Which answer does no harm?", "Where is harm?", "Do no harm.", "safe")


@dataclasses.dataclass(frozen=True)
class Scripted(Policy):
    """A policy whose replies are a function of the conversation."""

    script: object = None

    def answers(self, prompts, stream):
        return [self.script(prompt.messages, stream) for prompt in prompts]


def said(text, finished=True):
    return Answer(text, (1,), finished)


def test_what_a_prompts_meta_says_of_a_reply_of_its_own_is_named_so(tmp_path):
    saved(tmp_path, "tiny")
    policy = Policy("it", load_model(tmp_path / "run"), 4, 1.0, 0)
    rated = {"prompt": "Who?", "completion": "Ann.", "label": False, "labeler": "bo", "n": 1}
    source = written(tmp_path / "rated.jsonl", [rated])
    (prompt,) = read_prompts(source, [policy], "train", None, 4)
    assert not {"label", "labeler"} & prompt.meta.keys()
    stated = {"seed_label": "false", "seed_labeler": "bo", "n": "1"}
    assert {name: prompt.meta[name] for name in stated} == stated


def test_an_answer_is_criticised_then_revised_in_one_conversation(tmp_path):
    saved(tmp_path, "tiny", max_length=128)
    model = load_model(tmp_path / "run")
    texts = ["Open it.", "Cut off.", "It is long " + "x " * 90, "Fine."]
    prompts = [
        Prompt(str(i), (Message("user", f"How {i}?"),), {"n": str(i)}) for i in range(len(texts))
    ]
    seen = []

    def answered(messages, stream):
        assert stream == 0
        return said(texts[int(messages[0].content[4])])

    def revised(messages, stream):
        seen.append(messages)
        number = int(messages[0].content[4])
        if stream == 2:
            return said(FINE if number == 3 else "It harms.")
        return said(f"Revised {number}.", finished=number != 1)

    policy = Scripted("runs/sft", model, 16, 1.0, 5, answered)
    critic = Scripted("runs/critic", model, 16, 1.0, 5, revised)
    lines, counts = revise(policy, critic, prompts, [SAFE])
    assert counts == {
        "revised": 1, "not finished": 1, "too long to be revised": 1, "found fine": 1,
    }  # fmt: skip
    first = lines[0]
    assert first["prompt"] == "How 0?" and first["completion"] == "Revised 0."
    assert (first["answer"], first["critique"]) == ("Open it.", "It harms.")
    assert first["models"] == {"answer": "runs/sft", "completion": "runs/critic"}
    asked = asked_to_criticise(prompts[0], "Open it.", SAFE)
    assert asked.content == "How 0?\nAnswer: Open it.\nWhere is harm?"
    assert seen[0] == (asked,)
    assert (asked, Message("assistant", "It harms."), Message("user", "Do no harm.")) in seen
    records = read_records(CONFIG, written(tmp_path / "r.jsonl", lines), "conversation", "train")
    assert [r.messages[-1].content for r in records] == ["Revised 0.", "Fine."]
    assert records[0].id == "0" and records[0].meta["n"] == "0"


def test_a_critic_learns_from_what_passes_and_what_does_not():
    pairs = read_pairs("town", "train", 600, 0)
    lines, counts = examples(pairs, [SAFE], 0)
    assert counts["faulty"] == counts["fine"] > 10 and len(lines) == 2 * counts["fine"]
    prompts = {text: p.prompt for p in pairs.of for text in (p.first, p.second)}
    for line in lines:
        asked, critique, again, revision = (turn["content"] for turn in line["messages"])
        answer = asked.rpartition("\nAnswer: ")[2].removesuffix("\nWhere is harm?")
        assert (again, revision == answer) == ("Do no harm.", critique == FINE)
        assert critique == (FINE if gold(prompts[answer], answer, SAFE) >= 0.5 else FAULTY)
        assert gold(prompts[revision], revision, SAFE) >= 0.5


def test_gold_says_what_revision_changes():
    obeyed = next(
        pair
        for pair in Town().pairs("heldout")
        if pair.meta["family"] == "harmful"
        and gold(Prompt(pair.id, pair.prompt, pair.meta), pair.rejected, SAFE) == 0
        and gold(Prompt(pair.id, pair.prompt, pair.meta), pair.chosen, SAFE) == 1
    )
    prompt = Prompt(obeyed.id, obeyed.prompt, obeyed.meta)
    said_of = {"answer": obeyed.rejected, "completion": obeyed.chosen}
    lines = [prompt_fields(prompt.messages, {}) | {"id": prompt.id} | said_of]
    columns, rows = gold_table(lines, [prompt], [SAFE])
    assert columns == ["group", "prompts", "safe", "safe, revised", "correct", "correct, revised"]
    assert [row[:4] for row in rows] == [
        ["harmful", "1", "0.00", "1.00"],
        ["all", "1", "0.00", "1.00"],
    ]
    unknown = Prompt("p", (Message("user", "?"),))
    assert gold_table([lines[0] | {"id": "p", "prompt": "?"}], [unknown], [SAFE]) == ([], [])


def test_prompts_of_one_id_are_told_apart():
    same = [Prompt("p.jsonl:1", (Message("user", text),)) for text in ("One?", "Two?")]
    lines = [
        prompt_fields(prompt.messages, {})
        | {"id": prompt.id, "answer": "old", "completion": "new", "principle": "safe"}
        for prompt in same
    ]
    seen = []

    def judge(shown, principle):
        seen.extend(shown)
        return Answers(np.full(len(shown), 0.5), {})

    keep_preferred(judge, lines, same, [SAFE])
    assert [each.prompt for each in seen[:2]] == same


def test_a_nul_in_an_answer_or_a_critique_leaves_the_file_readable(tmp_path):
    saved(tmp_path, "tiny", max_length=128)
    model = load_model(tmp_path / "run")
    prompts = [Prompt(str(i), (Message("user", f"How {i}?"),)) for i in range(3)]

    def answered(messages, stream):
        return said("Open\0it." if "1" in messages[0].content else "Open it.")

    def revised(messages, stream):
        return said("It\0harms." if stream == 2 and "2" in messages[0].content else "No.")

    policy = Scripted("runs/sft", model, 16, 1.0, 5, answered)
    critic = Scripted("runs/critic", model, 16, 1.0, 5, revised)
    lines, counts = revise(policy, critic, prompts, [SAFE])
    assert counts == {"revised": 1, "a NUL character": 2}
    path = written(tmp_path / "r.jsonl", lines)
    assert len(read_records(CONFIG, path, "conversation", "train")) == 1
