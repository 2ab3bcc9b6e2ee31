"""What a judge makes for training is read by the ordinary stages as it is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.judges.__main__ import main
from rlhf_jax.judges.constitution import DEFAULT, Principle, read_constitution
from rlhf_jax.judges.judge import Answers, Comparison, SimulatedJudge, gold
from rlhf_jax.judges.labels import examples, label
from rlhf_jax.judges.sampled import Pairs, read_pairs
from rlhf_jax.tasks.sources import read_records
from tests.test_export import saved

OVERALL = read_constitution(DEFAULT)[0]
ONE = Principle("one", "Which?", "What?", "Again.")
TWO = Principle("two", "Which one?", "What?", "Again.")
CONFIG = ConfigDict({"data": {"max_bad_fraction": 0.0, "columns": ""}})


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("always", [0.15, 0.4, 0.6, 0.9])
def test_who_says_the_same_of_both_orders_prefers_neither(always):
    pairs = Pairs([Comparison(Prompt("p", (Message("user", "Q?"),)), "a", "b")])
    for say in (always, 1 - always):
        said = {"one": always, "two": say}

        def judge(shown, principle, said=said):
            return Answers(np.full(len(shown), said[principle.name]), {})

        lines, counts, _ = label(judge, "mine", pairs, [ONE, TWO], seed=0)
        assert counts == {"ties": 1} and lines[0]["tie"] and lines[0]["probability"] == 0.5


def test_principles_that_cancel_prefer_neither():
    pairs = Pairs([Comparison(Prompt("p", (Message("user", "Q?"),)), "a", "b")])
    said = {"one": 0.7, "two": 0.6, "three": 0.2}  # whose sum is 1.5 but for its last bit

    def judge(shown, principle):
        first = said[principle.name]
        return Answers(np.array([first, 1 - first]), {})

    three = Principle("three", "Which?", "What?", "Again.")
    _, counts, _ = label(judge, "mine", pairs, [ONE, TWO, three], seed=0)
    assert counts == {"ties": 1}


def test_pairs_are_labelled_by_the_mean_of_principles_and_what_lacks_a_verdict_is_counted(tmp_path):
    prompts = [Prompt(str(i), (Message("user", f"Q{i}?"),), {"n": str(i)}) for i in range(4)]
    pairs = Pairs(
        [Comparison(prompt, "a", "b") for prompt in prompts],
        models=("runs/x", "runs/y"), cut={1: [0]}, left_out={"the same answer twice": 2},
    )  # fmt: skip
    said = {  # P(a first), P(b first) of the four prompts
        "one": ([0.9, 0.2, 0.5, 0.7], [0.1, 0.8, 0.5, 0.3]),
        "two": ([0.6, 0.4, 0.5, 0.9], [0.4, 0.6, 0.5, math.nan]),
    }

    def judge(shown, principle):
        values = np.array([*said[principle.name][0], *said[principle.name][1]])
        return Answers(values, {int(i): "mute" for i in np.flatnonzero(np.isnan(values))})

    lines, counts, measured = label(judge, "mine", pairs, [ONE, TWO], seed=7)
    assert measured == {}  # no verifier knows these prompts
    assert counts == {
        "the same answer twice": 2, "no verdict, two: mute": 1, "labelled": 2, "ties": 1,
    }  # fmt: skip
    assert [line["probability"] for line in lines] == [0.75, 0.7, 0.5]
    assert lines[0]["models"] == {"chosen": "runs/x", "rejected": "runs/y"}
    assert lines[1]["models"] == {"rejected": "runs/x", "chosen": "runs/y"}
    assert lines[1]["cut"] == ["rejected"] and lines[2]["tie"] is True
    records = read_records(CONFIG, written(tmp_path / "p.jsonl", lines), "preference", "train")
    assert [(r.chosen, r.rejected) for r in records] == [("a", "b"), ("b", "a")]  # no tie
    assert records[0].meta["labeler"] == "mine" and records[0].meta["n"] == "0"


def test_an_exact_judge_agrees_with_gold_and_a_noisy_one_less():
    pairs = read_pairs("town", "validation", 200, 0)
    exact = label(SimulatedJudge(), "gold", pairs, [OVERALL], 0)[2]
    assert exact["agrees with gold"] == 1
    noisy = label(SimulatedJudge(0.7, 0.7), "gold", pairs, [OVERALL], 0)[2]
    assert 0.5 < noisy["agrees with gold"] < 0.9 and noisy["of"] < exact["of"] < 200


def test_a_model_learns_to_judge_from_what_gold_prefers(tmp_path):
    pairs = read_pairs("town", "train", 60, 0)
    lines, counts = examples(pairs, [OVERALL], 0)
    assert counts["written"] == len(lines) == 60 - counts["equal by gold"]
    by_text = {f"First: {p.first}\nSecond: {p.second}": p for p in pairs.of}
    by_text |= {f"First: {p.second}\nSecond: {p.first}": p.swapped for p in pairs.of}
    sides = set()
    for line in lines:
        asked, said = (turn["content"] for turn in line["messages"])
        shown = by_text[asked[asked.index("First: ") :]]
        first, second = (gold(shown.prompt, t, OVERALL) for t in (shown.first, shown.second))
        assert said == ("First." if first > second else "Second.")
        sides.add(said)
    assert sides == {"First.", "Second."}
    records = read_records(CONFIG, written(tmp_path / "e.jsonl", lines), "conversation", "train")
    assert len(records) == len(lines)


def test_the_command_labels_a_policys_answers_and_says_what_from(tmp_path, capsys):
    saved(tmp_path, "tiny", max_length=256)
    out = tmp_path / "made" / "pairs.jsonl"
    command = [
        "label", "--judge=gold,specificity=0.9", f"--workdir={tmp_path / 'run'}", "--count=8",
        "--max-new-tokens=8", f"--out={out}",
    ]  # fmt: skip
    assert main(command) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    made = json.loads(out.with_suffix(".made.json").read_text())
    counts = made["counts"]
    assert counts.get("labelled", 0) + counts.get("ties", 0) == len(lines) <= 8
    assert made["made_from"]["judge"] == "gold,specificity=0.9"
    assert [*made["made_from"]["models"]] == [str(tmp_path / "run")]
    assert all(line["meta"]["expectation"] for line in lines)
    assert main(command) == 0  # the same again
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    assert str(out) in capsys.readouterr().out


def test_votes_of_people_are_not_written_over(tmp_path, capsys):
    votes = tmp_path / "votes.jsonl"
    votes.write_text("{}\n")
    assert main(["examples", f"--out={votes}"]) == 2
    assert "and not made by this command" in capsys.readouterr().err
    assert votes.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["label", "--judge=gold", "--out=x.jsonl"], "--workdir"),
        (["label", "--judge=gold", "--workdir=none", "--out=x.jsonl"], "none"),
        (["examples"], "--out"),
        (["labels"], "invalid choice"),
        (["examples", "--out=pairs"], "--out=pairs: a name that ends in .jsonl"),
        (["examples", "--out=x.jsonl", "--seed=-1"], "--seed=-1: at least 0"),
        (["examples", "--out=x.jsonl", "--seed=1073741824"], "the last one at most 1073741823"),
        (["examples", "--out=/dev/null/x.jsonl"], "--out=/dev/null/x.jsonl: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]
