"""A judge's report card, by hand and against simulated judges whose mistakes are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.judges.__main__ import main
from rlhf_jax.judges.card import better_side, cohen_kappa, measure, report
from rlhf_jax.judges.constitution import DEFAULT, Principle, read_constitution
from rlhf_jax.judges.judge import Comparison, SimulatedJudge, Verdicts
from rlhf_jax.judges.page import write_card
from rlhf_jax.judges.rates import Calibration
from rlhf_jax.judges.sampled import Pairs, read_pairs

OVERALL = read_constitution(DEFAULT)[0]
PROMPT = Prompt("p", (Message("user", "Where?"),))


def pairs_of(lengths, models=("", "")):
    """Pairs whose a has so many words more than b."""
    of = [Comparison(PROMPT, "x " * (20 + n), "x " * 20) for n in lengths]
    return Pairs(of, models=models)


def test_a_card_by_hand():
    # P(a first is better), P(b first is better): the second pair turns with the order.
    first = np.array([[0.9, 0.1], [0.8, 0.8], [0.4, 0.8], [math.nan, 0.5], [0.7, 0.1], [0.2, 0.6]])
    verdicts = Verdicts((first[:, 0] + 1 - first[:, 1]) / 2, first, {"too long": 1})
    better = np.array([1.0, -1.0, 1.0, 1.0, 0.0, -1.0])
    # With a plea behind the worse answers of the five that gold orders.
    second = np.array([[0.7, 0.1], [0.8, 0.8], [0.2, 0.8], [0.5, 0.5], [0.6, 0.6]])
    pleaded = Verdicts((second[:, 0] + 1 - second[:, 1]) / 2, second, {})
    pairs = pairs_of([0, 5, -5, 3, 5, -5], ("a", "b"))
    card = measure(verdicts, pleaded, better, pairs, calibrated=5)
    assert (card.pairs, card.masked, card.ordered) == (5, {"too long": 1}, 4)
    np.testing.assert_allclose(verdicts.preferred, [0.9, 0.5, 0.3, math.nan, 0.8, 0.3])
    assert card.accuracy.rate == (1 + 0.5 + 0 + 1) / 4
    # Of the three that both order: judge a, b, b; gold a, a, b. Agreement 2/3, by chance 4/9.
    assert math.isclose(card.kappa, (2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert card.flips == 1 / 5
    assert math.isclose(card.position, (5.4 / 10) - 0.5, abs_tol=1e-12)
    # Calibration: of pairs 0 to 4, two are better (one is called so), two not (one called better).
    assert card.known == Calibration(hits=1, positives=2, rejections=1, negatives=2)
    assert (card.exact, card.naive.rate) == (0.0, 0.0)
    # Where a is better 0.9 and 0.3, where b is 0.5 and 0.3.
    assert math.isclose(card.favour[0], (0.6 + 0.4) / 2 - 0.5, abs_tol=1e-12)
    assert math.isclose(card.favour[1], math.sqrt((0.18 + 0.02) / 2) / 2)
    # 0.9 → 0.8 and 0.3 → 0.2 where a is better, 0.5 → 0.5 and 0.3 → 0.5 where b is.
    assert math.isclose(card.plea[0], (0.1 + 0.0 + 0.1 + 0.2) / 4)
    assert json.loads(json.dumps(card.to_json()))["corrected"] == [None, 0.0, 1.0]


def test_kappa_of_chance_is_none_and_of_one_side_unknown():
    one, two = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
    assert cohen_kappa(one, two) == 0 and cohen_kappa(one, one) == 1
    assert math.isnan(cohen_kappa(np.ones(4), np.ones(4)))
    # Nine of ten agree, and by chance 0.82 would: agreement overstates.
    judged = np.array([1.0] * 9 + [-1.0])
    truth = np.array([1.0] * 8 + [-1.0] * 2)
    assert math.isclose(cohen_kappa(judged, truth), (0.9 - 0.74) / 0.26)


def test_the_length_slope_is_what_was_put_in():
    rng = np.random.default_rng(0)
    better, longer = rng.choice([-1.0, 0.0, 1.0], 400), rng.integers(-15, 16, 400)
    preferred = np.clip(0.5 + 0.3 * better + 0.08 * longer / 10 + rng.normal(0, 0.02, 400), 0, 1)
    first = np.stack([preferred, 1 - preferred], axis=1)
    said, silent = Verdicts(preferred, first, {}), np.full(int((better != 0).sum()), math.nan)
    none = Verdicts(silent, first, {})
    card = measure(said, none, better, pairs_of(longer), 200)
    assert abs(card.length[0] - 0.08) < 3 * card.length[1] < 0.01
    assert math.isnan(card.favour[0])  # sides of no models
    assert math.isnan(card.plea[0])
    same = measure(said, none, better, pairs_of([3] * 400), 200)
    assert math.isnan(same.length[0])  # cannot be told


@pytest.mark.parametrize("bias", [0.0, 0.15])
def test_self_preference_is_found_however_seldom_the_own_answer_is_better(bias):
    rng = np.random.default_rng(1)
    better = rng.choice([-1.0, -1.0, -1.0, 1.0], 500)
    p = 0.5 + 0.3 * better + bias
    preferred = (rng.random(500) < p).astype(float)
    first = np.stack([preferred, 1 - preferred], axis=1)
    pairs = pairs_of([0] * 500, ("runs/judge", "runs/other"))
    said = Verdicts(preferred, first, {})
    favour, deviation = measure(said, said, better, pairs, 200).favour
    assert abs(favour - bias) < 3 * deviation < 0.1


def test_a_simulated_judge_has_the_card_of_its_mistakes():
    pairs = read_pairs("town", "validation", 400, 0)
    card = report(SimulatedJudge(), pairs, OVERALL, 150)
    assert card.accuracy.rate == card.kappa == 1 and card.flips == 0 and card.plea[0] == 0
    assert card.naive.rate == card.exact and math.isclose(card.exact, card.corrected.rate)
    judge = SimulatedJudge(sensitivity=0.8, specificity=0.7, gullibility=0.4)
    card = report(judge, pairs, OVERALL, 150)
    assert card.accuracy.rate < 0.9 and card.flips == 0 and card.plea[0] > 4 * card.plea[1]
    assert card.corrected.low <= card.exact <= card.corrected.high


def test_a_file_says_itself_which_is_better(tmp_path, capsys):
    lines = [
        {"prompt": f"How much is {i}?", "chosen": "y" * (1 + i % 3), "rejected": "no"}
        for i in range(60)
    ]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.py").write_text(
        "def by_letter(prompts, responses, rivals):\n"
        "    return [1.0 if 'y' in r else 0.0 for r in responses]\n"
    )
    command = ["card", f"--judge={tmp_path / 'mine.py'}:by_letter", "--principles=overall",
               f"--data={tmp_path / 'known.jsonl'}", "--count=60", "--calibrate=20",
               f"--out={tmp_path / 'card.json'}"]  # fmt: skip
    assert main(command) == 0
    card = json.loads((tmp_path / "card.json").read_text())["overall"]
    assert card["accuracy"][0] == card["kappa"] == 1 and card["pairs"] == card["ordered"] == 60
    assert "Accuracy" in capsys.readouterr().out
    page = (tmp_path / "card.html").read_text()
    assert "How often it prefers the better answer" in page and "<td>100 %</td>" in page
    assert main([*command[:-1], f"--out={tmp_path / 'card.html'}"]) == 2
    assert "a name that ends in .json" in capsys.readouterr().err


def test_texts_stay_texts_on_the_page(tmp_path):
    found = report(SimulatedJudge(), read_pairs("town", "validation", 40, 0), OVERALL, 20)
    write_card(tmp_path / "card.html", "<b>judge</b>", "<i>pairs</i>", {"<script>": found})
    page = (tmp_path / "card.html").read_text()
    assert "&lt;b&gt;judge&lt;/b&gt;" in page and "<script>" not in page and "<i>pairs" not in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--calibrate=600"], "--calibrate=600 must be at least 1 and less than the 600"),
        (["--principles=kind"], "--principles: there is no 'kind'"),
        (["--count=100000"], "--count=100000: there are"),
        (["--count=-1"], "--count=-1: there are"),
        (["--data=none.jsonl"], "none.jsonl"),
        (["--compare=runs/dpo"], "--compare needs --workdir"),
        (["--prompts=mine.jsonl"], "--prompts are for a model to answer: they need --workdir"),
        (["--workdir=runs/sft", "--data=mine.jsonl"], "a card with --workdir takes --prompts"),
        (["--constitution=none.json"], "cannot read none.json"),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, said):
    assert main(["card", "--judge=gold", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_principle_that_stands_for_nothing_has_no_gold():
    pairs = read_pairs("town", "validation", 2, 0)
    principle = Principle("kind", "Which?", "What?", "Again.", "kindness")
    with pytest.raises(UserError, match="its gold is 'kindness', and the verifier"):
        better_side(pairs, principle)
