"""What a label is worth in gold labels, on accuracies whose answer is known."""

from __future__ import annotations

import json
from math import inf
from random import Random

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.held_out_answers import Answer
from rlhf_jax.files import write_json, write_jsonl
from rlhf_jax.judges.__main__ import main
from rlhf_jax.judges.constitution import DEFAULT, read_constitution
from rlhf_jax.judges.judge import People, SimulatedJudge, gold
from rlhf_jax.judges.sampled import Policy, read_pairs
from rlhf_jax.judges.worth import GOLD, Worth, fieller, label_both, table
from rlhf_jax.tasks.sources import read_source
from tests.test_export import saved

OVERALL = read_constitution(DEFAULT)[0]
COUNTS = [50, 100, 200]
SEEDS = np.array([0.01, -0.02, 0.0, 0.03, -0.01])


def accuracies(worth: float, slope: float = 0.05) -> np.ndarray:
    """[C, S] on the line 0.3 + slope · log₂(n · worth), each seed its own height."""
    return 0.3 + slope * np.log2(np.array(COUNTS) * worth)[:, None] + SEEDS


def test_a_label_that_does_the_work_of_half_a_gold_one_is_worth_half():
    found = Worth(COUNTS, accuracies(1.0), accuracies(0.5))
    assert np.allclose(found.each, 0.5) and np.allclose(found.whole, 0.5)
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 5))
    unsure = Worth(COUNTS, accuracies(1.0), accuracies(0.5) + noise)
    for ratio in (unsure.whole, *unsure.each):
        assert 0 < ratio.low < 0.5 < ratio.high < 1.2
    columns, rows = table(unsure)
    assert [row[0] for row in rows] == ["50", "100", "200"] and len(columns) == len(rows[0])


def test_where_more_gold_labels_teach_nothing_no_label_has_a_worth():
    level = Worth(COUNTS, accuracies(1.0, slope=0.0) + np.eye(3, 5) / 50, accuracies(0.5))
    assert (level.whole.low, level.whole.high) == (0.0, inf)
    assert level.to_json()["worth"]["all"][1:] == [0.0, None]


def test_the_interval_of_a_ratio_is_fiellers():
    """Of two seeds t is 12.706; below is 1 of both, so it is 2 ± t · deviation / √2."""
    above, below = np.array([1.99, 2.01]), np.array([1.0, 1.0])
    ratio = fieller(above, below)
    width = np.sqrt(12.7062047**2 / 2 * 0.0002)
    assert ratio.value == 2 and ratio == pytest.approx((2, 2 - width, 2 + width), rel=1e-6)
    assert fieller(np.array([1.0, 2.0]), np.array([1.0, -1.0])) == (inf, -inf, inf)


def test_intervals_of_a_ratio_hold_it():
    """Of 400 draws of five seeds about 95 % have an interval with the true ratio of 1.5 in it."""
    random, held = np.random.default_rng(1), 0
    for _ in range(400):
        below = random.normal(2, 0.5, 5)
        above = 1.5 * below + random.normal(0, 0.4, 5)
        ratio = fieller(above, below)
        held += ratio.low <= 1.5 <= ratio.high
    assert 0.92 <= held / 400 <= 0.98


def test_both_label_the_same_pairs():
    pairs = read_pairs("town", "train", 300, 0)
    ours, theirs = label_both(SimulatedJudge(0.8, 0.8), pairs, [OVERALL], 100)
    assert [line["pair"] for line in ours] == [line["pair"] for line in theirs]
    prompts = {frozenset((each.first, each.second)): each.prompt for each in pairs.of}
    for line in ours:
        prompt = prompts[frozenset((line["chosen"], line["rejected"]))]
        chosen, rejected = (gold(prompt, line[side], GOLD) for side in ("chosen", "rejected"))
        assert chosen > rejected
    turned = sum(a["chosen"] != b["chosen"] for a, b in zip(ours, theirs, strict=True))
    assert 5 < turned < 60
    with pytest.raises(UserError, match=r"of 300 pairs gold and the judge both prefer a side of"):
        label_both(SimulatedJudge(), pairs, [OVERALL], 300)


def test_people_vote_once_on_a_pair_whatever_the_order():
    pairs = read_pairs("town", "train", 300, 0).of
    votes = People(seed=3)(pairs, OVERALL).probabilities
    turned = People(seed=3)([p.swapped for p in pairs], OVERALL).probabilities
    assert np.array_equal(turned, 1 - votes)
    assert set(votes) == {0.0, 1.0}
    apart = [gold(p.prompt, p.first, GOLD) - gold(p.prompt, p.second, GOLD) for p in pairs]
    clear = [(vote > 0) == (d > 0) for vote, d in zip(votes, apart, strict=True) if abs(d) > 0.3]
    assert np.mean(clear) > 0.95  # all but the lapses
    assert not np.array_equal(People(seed=4)(pairs, OVERALL).probabilities, votes)


@pytest.mark.slow
def test_the_command_trains_from_both_and_says_what_a_label_is_worth(tmp_path, capsys, monkeypatch):
    saved(tmp_path, "tiny", max_length=256)

    def answers(policy, prompts, stream, begin):  # gold has 0 for all that an untrained model says
        random = Random(f"{policy.seed} {stream}")
        said = [random.choice((p.meta["reference"], "I don't know.")) for p in prompts]
        return [Answer(text, (), True) for text in said]

    monkeypatch.setattr(Policy, "answers", answers)
    pairs = [
        {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in read_source("town/ordered[:300]", "pair", "validation")
        if len(pair.prompt) == 1 and len(pair.chosen + pair.rejected) < 100
    ]
    write_jsonl(tmp_path / "ordered.jsonl", pairs[:40])
    command = [
        "worth", "--judge=gold,specificity=0.9", f"--workdir={tmp_path / 'run'}", "--counts=40,60",
        "--seeds=2", "--steps=11", "--count=400", "--max-new-tokens=12",
        f"--data={tmp_path}/ordered.jsonl", f"--out={tmp_path}/w",
    ]  # fmt: skip
    assert main(command) == 0
    found = json.loads((tmp_path / "w" / "worth.json").read_text())
    assert np.shape(found["accuracy"]["gold"]) == np.shape(found["accuracy"]["judge"]) == (2, 2)
    assert len((tmp_path / "w" / "seed-1" / "gold.jsonl").read_text().splitlines()) == 60
    assert "Over all counts a label is worth" in capsys.readouterr().out
    kept = tmp_path / "w" / "seed-1" / "accuracies.json"
    values = json.loads(kept.read_text())
    kept.unlink()  # as if it had been killed
    assert main(command) == 0 and json.loads(kept.read_text()) == values
    assert main([*command, "--steps=12"]) == 2
    assert "of another command" in capsys.readouterr().err


def test_it_does_not_go_on_with_another_judge_under_the_same_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge, out = tmp_path / "mine.py", tmp_path / "w"
    judge.write_text("def better(prompts, responses): return [1.0] * len(responses)\n")
    command = ["worth", f"--judge={judge}:better", "--workdir=none", f"--out={out}"]
    main(command)  # it begins, and finds that there is no such model
    for seed in range(5):  # as if all had been measured
        (out / f"seed-{seed}").mkdir(exist_ok=True)
        write_json(
            out / f"seed-{seed}" / "accuracies.json",
            {"gold": [0.6, 0.7, 0.8], "judge": [0.6, 0.7, 0.8]},
        )
    capsys.readouterr()
    assert main(command) == 0
    judge.write_text("def better(prompts, responses): return [0.0] * len(responses)\n")
    assert main(command) == 2
    assert "files that have changed since" in capsys.readouterr().err


@pytest.mark.parametrize("counts", ["60", "60,60", "0,60", "120,60", "a,b"])
def test_counts_that_are_none_are_refused(tmp_path, capsys, counts):
    command = ["worth", "--judge=gold", "--workdir=x", f"--out={tmp_path}/w", f"--counts={counts}"]
    assert main(command) == 2
    assert f"--counts={counts}: two numbers or more" in capsys.readouterr().err
