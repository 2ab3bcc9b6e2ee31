"""The stages of AI feedback: what they make is kept in the run, and trained on by ordinary ones."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_jsonl
from rlhf_jax.judges import ai_preference, ai_sft, feedback
from rlhf_jax.judges.constitution import DEFAULT, read_constitution
from rlhf_jax.judges.judge import Answers, SimulatedJudge
from rlhf_jax.judges.revision import gold_changes, keep_preferred
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
