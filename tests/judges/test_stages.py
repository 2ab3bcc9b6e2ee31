"""The stages of AI feedback: what they make is kept in the run, and trained on by ordinary ones."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.held_out_answers import Answer
from rlhf_jax.files import write_jsonl
from rlhf_jax.judges import __main__ as command
from rlhf_jax.judges import ai_preference, ai_sft, feedback
from rlhf_jax.judges.constitution import DEFAULT, read_constitution
from rlhf_jax.judges.judge import Answers, SimulatedJudge
from rlhf_jax.judges.revision import gold_changes, keep_preferred
from rlhf_jax.judges.sampled import Policy
from rlhf_jax.label.files import prompt_fields
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import prepare
from rlhf_jax.stages.checks import check
from rlhf_jax.stages.identity import made_from
from rlhf_jax.tasks.sources import read_source
from rlhf_jax.tasks.town.town import Town
from tests.test_export import saved

PRINCIPLES = {each.name: each for each in read_constitution(DEFAULT)}


def config_of(stage, **sections):
    return defaults.resolve(defaults.base(stage, **sections))


def test_a_judge_labels_as_many_pairs_as_are_asked_for(tmp_path):
    run, *_ = saved(tmp_path, "tiny", max_length=256)
    config = config_of(
        "ai_preference", init={"policy": str(run)}, data={"train": "town/prompt[:20]"},
        feedback={"judge": "people", "count": 6, "max_new_tokens": 8},
    )  # fmt: skip
    lines, counts, measured = ai_preference.label_answers(config, {"policy": run})
    assert [line["number"] for line in lines] == [*range(6)]
    assert {line["labeler"] for line in lines} == {"people"}
    assert counts["labelled"] - counts["labelled, not used"] == 6
    assert 0 <= measured.get("feedback/agreement", 0.5) <= 1
    many = dataclasses.replace(config.feedback, count=40)
    config = dataclasses.replace(config, feedback=many)
    with pytest.raises(
        UserError, match=r"count = 40: of the 20 prompts of town/prompt\[:20\] 20 were asked, and"
    ):
        ai_preference.label_answers(config, {"policy": run})


def test_prompts_are_asked_in_parts_with_random_streams_of_their_own(tmp_path, monkeypatch):
    """One part of which no prompt has two answers is no end, where others have labels."""
    asked = [Prompt(str(i), (Message("user", f"Who is {i}?"),)) for i in range(100)]
    begun = []

    def answers(prompts, stream, begin):
        begun.append((stream, begin))
        apart = [begin == 52 or int(each.id) < 4 for each in prompts]
        texts = [f"{stream if differs else 0}" for differs in apart]
        return [Answer(text, (1,), finished=True) for text in texts]

    policy = SimpleNamespace(name="said", answers=answers)
    monkeypatch.setattr(ai_preference, "policy_of", lambda config, directory: policy)
    monkeypatch.setattr(ai_preference, "read_prompts", lambda *arguments: asked)
    monkeypatch.setattr(ai_preference, "open_judge", lambda name, seed: nullcontext(prefer_zero))
    asked_for = {"count": 10, "judge": "people"}
    config = config_of("ai_preference", init={"policy": "x"}, feedback=asked_for)
    lines, counts, _ = ai_preference.label_answers(config, {"policy": tmp_path})
    assert begun == [(stream, begin) for begin in (0, 28, 52) for stream in (0, 1)]
    assert len(lines) == 10 and {line["chosen"] for line in lines} == {"0"}
    assert counts["the same answer twice"] == 48 and counts["labelled, not used"] == 18
    monkeypatch.setattr(ai_preference, "read_prompts", lambda *arguments: asked[4:40])
    with pytest.raises(UserError, match=r"28 were asked, and 0 have .*: \{'the same answer twice'"):
        ai_preference.label_answers(config, {"policy": tmp_path})


def test_a_command_whose_models_say_the_same_of_all_prompts_ends_in_a_line(monkeypatch):
    said = [Answer("Yes.", (1,), finished=True)] * 2
    policy = SimpleNamespace(name="said", answers=lambda *asked: said)
    monkeypatch.setattr(command, "_policy", lambda given, name: policy)
    monkeypatch.setattr(command, "_prompts", lambda *given: [None] * 2)
    with pytest.raises(UserError, match=r"each of 2 prompts are the same text.* --temperature"):
        command._sampled(SimpleNamespace(workdir="runs/sft", compare=""), "train")


def prefer_zero(shown, principle):
    return Answers(np.array([float(each.first == "0") for each in shown]), {})


def test_an_answer_depends_on_the_place_of_its_prompt_among_all(tmp_path):
    run, *_ = saved(tmp_path, "tiny", max_length=256)
    policy = Policy.load(str(run), 8, 1.0, 0)
    prompts = [Prompt(name, (Message("user", "Who?"),)) for name in "ab"]
    first, second = (each.tokens for each in policy.answers(prompts, 0, 0))
    (later,) = policy.answers(prompts[1:], 0, 1)
    assert later.tokens == second != first


def test_a_judge_and_a_critic_learn_from_pairs_in_the_order_of_gold():
    for of, turns in (("judging", 2), ("critiques", 4)):
        config = config_of(
            "ai_sft", init={"policy": "x"}, data={"train": "town/judged"},
            feedback={"of": of, "count": 200, "principles": "safe,correct"},
        )  # fmt: skip
        lines, _, measured = ai_sft.write(config, {})
        assert {line["principle"] for line in lines} == {"safe", "correct"} and not measured
        assert {len(line["messages"]) for line in lines} == {turns}


def test_what_is_made_is_kept_once_and_read_from_a_path_that_data_can_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    run = SimpleNamespace(path=tmp_path / "judge=people,seed=0")
    run.path.mkdir()
    made = []

    def make():
        made.append(1)
        return (
            [{"prompt": "Who?", "chosen": "Ann.", "rejected": "No."}],
            {"labelled": 1},
            {"x": 0.5},
        )

    assert feedback.keep(run, make) == feedback.keep(run, make) == {"x": 0.5} and len(made) == 1
    config = feedback.reading(config_of("ai_preference", init={"policy": "x"}), run)
    (record,) = read_source(config.data.train, "pair", "train")
    assert (record.chosen, record.rejected) == ("Ann.", "No.")


def test_of_labels_on_the_prompts_of_a_file_the_last_ones_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    run = SimpleNamespace(path=tmp_path)
    pairs = [{"prompt": f"{i}?", "chosen": "Ann.", "rejected": "No."} for i in range(40)]
    write_jsonl(tmp_path / feedback.FILE, pairs)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}] * 40)
    given = defaults.base(
        "ai_preference", init={"policy": "x"},
        data={"train": f"{tmp_path}/prompts.jsonl", "validation": ""},
    )  # fmt: skip
    config = feedback.reading(prepare(given), run)
    train, held_out = config.data.train, config.data.validation
    assert len(read_source(train, "pair", "train")) == 38
    assert [r.prompt[0].content for r in read_source(held_out, "pair", "train")] == ["38?", "39?"]
    assert config.eval.source == "town"  # whose prompts are answered at the end
    data = {"train": f"{tmp_path}/prompts.jsonl", "validation": "hh_rlhf/helpful"}
    config = feedback.reading(config_of("ai_preference", init={"policy": "x"}, data=data), run)
    assert config.data.validation == "hh_rlhf/helpful" and "[" not in config.data.train


def test_a_judge_in_a_file_is_part_of_what_a_run_was_made_from(tmp_path):
    judge = tmp_path / "mine.py"
    config = config_of("ai_preference", init={"policy": "x"}, feedback={"judge": f"{judge}:better"})
    digests = set()
    for code in ("def better(responses): ...", "def better(rivals): ..."):
        judge.write_text(code)
        digests.add(made_from(config, {})["contents"][f"feedback.judge: {judge}"])
    assert len(digests) == 2


def revisions():
    """Two requests of the town's, answered and revised: one obeyed, one needlessly refused."""
    harmful, borderline = (
        next(p for p in Town().prompts("heldout") if p.meta["family"] == family)
        for family in ("harmful", "borderline")
    )
    right = [p.meta["reference"] for p in (harmful, borderline)]
    lines = [
        {
            "id": harmful.id,
            "answer": "First, grab it.",
            "completion": right[0],
            "principle": "safe",
        },
        {"id": borderline.id, "answer": right[1], "completion": right[0], "principle": "correct"},
    ]
    prompts = [harmful, borderline]
    asked = [prompt_fields(prompt.messages, {}) for prompt in prompts]
    return [a | line for a, line in zip(asked, lines, strict=True)], prompts


def test_a_revision_that_the_judge_does_not_prefer_is_not_trained_on():
    lines, prompts = revisions()
    principles = [PRINCIPLES["safe"], PRINCIPLES["correct"]]
    kept, counts = keep_preferred(SimulatedJudge(), lines, prompts, principles)
    assert counts == {"revision preferred": 1, "answer kept": 1}
    assert kept[0] == lines[0]
    assert kept[1]["completion"] == lines[1]["answer"] and kept[1]["revised"] is False

    def mute(shown, principle):
        return Answers(np.full(len(shown), np.nan), dict.fromkeys(range(len(shown)), "mute"))

    kept, counts = keep_preferred(mute, lines, prompts, principles)
    assert counts == {"no verdict, safe: mute": 1, "no verdict, correct: mute": 1}
    assert all(k["completion"] == k["answer"] for k in kept)


def test_gold_says_of_each_group_what_revision_changed():
    lines, prompts = revisions()
    changes = gold_changes(lines, prompts, [PRINCIPLES["safe"]])
    assert [*changes] == ["borderline", "harmful", "all"]
    assert changes["harmful"]["safe"][0] < 0.5 < changes["harmful"]["safe"][1]
    assert changes["borderline"]["correct"] == (1.0, 0.0)
    assert gold_changes(lines, [Prompt("1", (Message("user", "?"),))], []) == {}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"columns": "prompt:q"}}, "reads its own file too"),
        ({"feedback": {"count": 0}}, "feedback.count = 0 must be at least 1"),
        ({"feedback": {"temperature": 0.0}}, "feedback.temperature must be in"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(sections, said):
    with pytest.raises(UserError, match=said):
        check(config_of("ai_preference", init={"policy": "x"}, **sections))


def test_a_judge_that_is_not_there_is_named():
    config = config_of("ai_preference", init={"policy": "x"})
    with pytest.raises(UserError, match=r"feedback.judge is 'model', but there is no init.judge"):
        feedback.judge_named(config, {})
    config = config_of("ai_preference", init={"policy": "x"}, feedback={"principles": "sade"})
    with pytest.raises(UserError, match="did you mean 'safe'"):
        feedback.principles_of(config)
