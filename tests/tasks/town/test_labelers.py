"""Simulated labelers: Bradley–Terry statistics, biases, and the ceiling they set."""

from __future__ import annotations

from math import exp, sqrt
from random import Random

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.families.exercise import Expectation
from rlhf_jax.tasks.town.labelers import Labeler, compare, preference
from rlhf_jax.tasks.town.town import Town

PROMPT = Prompt(
    "p",
    (Message("user", "What does Ann work as?"),),
    {"expectation": Expectation(required=(("baker",),), allowed=("ann",)).dumps()},
)
WARM, PLAIN = "Sure! Ann works as a baker.", "Ann works as a baker."  # gold 1 and 0.925


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_probability_is_the_sigmoid_of_the_gold_difference():
    labeler = Labeler(sharpness=10, lapses=0)
    assert preference(labeler, PROMPT, WARM, PLAIN) == pytest.approx(_sigmoid(0.75), abs=1e-9)
    assert preference(labeler, PROMPT, PLAIN, WARM) == pytest.approx(_sigmoid(-0.75), abs=1e-9)
    assert preference(labeler, PROMPT, PLAIN, PLAIN) == 0.5
    lapsing = Labeler(sharpness=10, lapses=0.2)
    assert preference(lapsing, PROMPT, WARM, PLAIN) == pytest.approx(
        0.8 * _sigmoid(0.75) + 0.1, abs=1e-9
    )


@pytest.mark.parametrize(
    ("labeler", "logit"),
    [
        (Labeler(sharpness=0, length=0.3, lapses=0), 0.3),  # the warm reply is one word longer
        (Labeler(sharpness=0, length=-0.3, lapses=0), -0.3),
        (Labeler(sharpness=0, courtesy=2.0, lapses=0), 1.0),  # polite is 1 against ½
        (Labeler(sharpness=0, position=0.7, lapses=0), 0.7),
    ],
)
def test_biases_are_logits(labeler, logit):
    assert preference(labeler, PROMPT, WARM, PLAIN) == pytest.approx(_sigmoid(logit), abs=1e-9)


def test_empirical_frequency_matches_within_four_standard_errors():
    labeler, rng, count = Labeler(sharpness=15, lapses=0.05), Random(5), 4000
    probability = preference(labeler, PROMPT, WARM, PLAIN)
    wins = sum(compare(labeler, rng, PROMPT, WARM, PLAIN).chosen == WARM for _ in range(count))
    error = sqrt(probability * (1 - probability) / count)
    assert abs(wins / count - probability) < 4 * error


def test_pairs_record_the_probability_of_the_choice_made():
    labeler, rng = Labeler(sharpness=15, lapses=0), Random(1)
    for _ in range(20):
        pair = compare(labeler, rng, PROMPT, WARM, PLAIN)
        expected = preference(labeler, PROMPT, pair.chosen, pair.rejected)
        assert float(pair.meta["probability"]) == pytest.approx(expected, abs=1e-6)
        golds = {WARM: 1.0, PLAIN: 0.925}
        assert float(pair.meta["gold_chosen"]) == pytest.approx(golds[pair.chosen], abs=1e-4)
        assert float(pair.meta["gold_rejected"]) == pytest.approx(golds[pair.rejected], abs=1e-4)


def test_the_gold_scorer_reaches_the_ceiling_and_does_not_pass_it():
    pairs = list(Town().pairs(count=3000))
    probabilities = [float(pair.meta["probability"]) for pair in pairs]  # known to no model
    ceiling = sum(max(p, 1 - p) for p in probabilities) / len(pairs)
    standard_error = sqrt(sum(p * (1 - p) for p in probabilities)) / len(pairs)
    points = (
        (float(pair.meta["gold_chosen"]) > float(pair.meta["gold_rejected"]))
        + 0.5 * (pair.meta["gold_chosen"] == pair.meta["gold_rejected"])
        for pair in pairs
    )
    accuracy = sum(points) / len(pairs)
    assert 0.75 < ceiling < 0.98
    assert abs(accuracy - ceiling) < 4 * standard_error


def test_length_bias_makes_the_chosen_longer():
    town = Town()

    def longer(labeler):
        pairs = list(town.pairs(count=1500, labeler=labeler))
        return sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)

    assert longer(Labeler(length=0.5)) > longer(Labeler()) + 0.1


def test_what_cannot_be_is_the_users_mistake():
    with pytest.raises(UserError, match="sharpness"):
        Labeler(sharpness=-1)
    with pytest.raises(UserError, match="lapses"):
        Labeler(lapses=1.5)
