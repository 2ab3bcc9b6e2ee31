"""Labelers' effects as fitted from votes: exact derivatives, and the truth of simulated crowds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_jax.labelers import likelihood
from rlhf_jax.labelers.estimates import GUESSING, TOGETHER, estimate, spammers
from rlhf_jax.labelers.likelihood import Votes, fit
from rlhf_jax.labelers.read import Vote, arrays_of
from rlhf_jax.tasks.town.crowd import CROWD, votes
from rlhf_jax.tasks.town.town import Town

GOOD = ("careful", "hasty", "length-loving", "courtesy-loving", "first-position", "last-position")
WITHIN = {"position": 0.4, "length": 0.05, "lapses": 0.04}


def crowd(seed=0, prompts=650):
    """The votes of the named crowd, about 1,050 by each of the eight, gold scores known."""
    return arrays_of(
        [Vote(pair) for pair in votes(Town(), "train", prompts=prompts, seed=seed)], judged=True
    )


def simulated(seed, people=((3.0, 0.0, 0.0, 0.02),) * 3, pairs=2000):
    """Votes by people of (sharpness, length, position, lapses) about pairs of normal quality."""
    rng = np.random.default_rng(seed)
    quality, length = rng.normal(size=pairs), rng.normal(size=(pairs, 1)) * 10
    count = len(people)
    labeler, pair = np.repeat(np.arange(count), pairs), np.tile(np.arange(pairs), count)
    sharpness, bias, position, lapses = np.array(people).T[:, labeler]
    first = rng.choice([-1.0, 1.0], len(pair))
    logit = sharpness * quality[pair] + bias * length[pair, 0] + position * first
    likely = (1 - lapses) / (1 + np.exp(-logit)) + lapses / 2
    wins = (rng.random(len(pair)) < likely).astype(float)
    names = tuple(f"p{i}" for i in range(count))
    replies = np.arange(2 * pairs).reshape(-1, 2)
    return Votes(names, labeler, pair, wins, first, ("length",), length, replies, quality)


@pytest.mark.parametrize("known", [True, False])
def test_gradient_and_hessian_are_those_of_the_likelihood(known, monkeypatch):
    made = simulated(0, pairs=40)
    wins = made.wins.copy()
    wins[::7] = 0.5  # ties
    quality = made.quality if known else None
    monkeypatch.setattr(likelihood, "PART", 70)
    monkeypatch.setattr(likelihood, "PRECISION", np.float64)
    problem = likelihood._Problem(replace(made, wins=wins, quality=quality))
    theta = np.random.default_rng(1).normal(size=12) * 0.5 + np.tile([1.0, 0.2, 0.3, -2.0], 3)
    assert len(problem.parts) == 2
    _, gradient = problem.loss_and_gradient(theta)
    information = problem.information(theta)
    for i, step in enumerate(np.eye(12) * 1e-5):
        (above, up), (below, down) = (problem.loss_and_gradient(theta + s) for s in (step, -step))
        assert gradient[i] == pytest.approx((above - below) / 2e-5, abs=1e-5)
        np.testing.assert_allclose(information[i], (up - down) / 2e-5, atol=1e-5)


def test_the_likelihood_is_that_of_its_docstring():
    made = replace(simulated(0, people=((2.0, 0.1, 0.5, 0.1),), pairs=1), wins=np.ones(1))
    problem = likelihood._Problem(made)
    scale = abs(made.quality[0])
    theta = np.array([2.0 * scale, 0.1 * abs(made.features[0, 0]), 0.5, np.log(0.1 / 0.9)])
    logit = 2.0 * made.quality[0] + 0.1 * made.features[0, 0] + 0.5 * made.first[0]
    likely = 0.9 / (1 + np.exp(-logit)) + 0.05
    prior = 0.5 * (((theta - problem.center) / problem.prior) ** 2).sum()
    assert problem.loss_and_gradient(theta)[0] == pytest.approx(prior - np.log(likely), abs=1e-6)


def test_a_named_crowd_is_told_from_a_thousand_votes_each():
    report = estimate(crowd())
    assert report.converged and report.known and spammers(report.labelers) == ["spammer"]
    for labeler in report.labelers:
        truth = CROWD[labeler.name].compares
        if labeler.name in GOOD:
            for effect, reach in WITHIN.items():
                found = labeler.effects[effect]
                assert abs(found.value - getattr(truth, effect)) < reach, (labeler.name, effect)
                assert not found.why
    spammer = next(each for each in report.labelers if each.name == "spammer")
    assert spammer.effects["sharpness"].why == spammer.effects["lapses"].why == GUESSING
    lapsing = next(each for each in report.labelers if each.name == "lapsing")
    assert 0.2 < lapsing.effects["lapses"].value < 0.4


@pytest.mark.slow
def test_intervals_of_twenty_crowds_cover_what_the_labelers_are():
    covered, named, missed = [], 0, 0
    for seed in range(20):
        report = estimate(crowd(seed))
        named += spammers(report.labelers) == ["spammer"]
        for labeler in report.labelers:
            truth = CROWD[labeler.name].compares
            for effect, found in labeler.effects.items():
                covered.append(found.low <= getattr(truth, effect) <= found.high)
                if labeler.name in GOOD and effect in WITHIN:
                    missed += abs(found.value - getattr(truth, effect)) > WITHIN[effect]
    assert len(covered) == 20 * 8 * 5
    assert np.mean(covered) >= 0.88
    assert named >= 19
    assert missed <= 0.02 * 20 * 6 * 3


def test_without_known_quality_pairs_that_several_judged_tell_who_is_who():
    people = (
        (4.0, 0.0, 0.0, 0.02), (2.0, 0.0, 0.0, 0.02), (3.0, 0.0, 1.0, 0.02), (3.0, 0.0, 0.0, 0.3),
        (2.0, 0.3, 0.0, 0.02), (0.0, 0.0, 0.0, 0.02),
    )  # fmt: skip
    report = estimate(replace(simulated(2, people), quality=None))
    effects = [each.effects for each in report.labelers]
    for found, (sharpness, length, position, lapses) in zip(effects[:5], people, strict=False):
        assert found["length"].value == pytest.approx(length, abs=0.05)
        assert found["position"].value == pytest.approx(position, abs=0.3)
        if not found["lapses"].why:
            assert found["lapses"].value == pytest.approx(lapses, abs=0.08)
            assert found["sharpness"].value == pytest.approx(sharpness, rel=0.25)
    # Of whom three tenths are lapses neither can be told: somebody blunter would vote alike.
    assert effects[3]["sharpness"].why == effects[3]["lapses"].why == TOGETHER
    assert spammers(report.labelers) == ["p5"]


def test_what_most_labelers_share_counts_as_quality_where_that_is_unknown():
    made = simulated(3, people=((3.0, 0.3, 0.0, 0.02),) * 4 + ((3.0, 0.0, 0.0, 0.02),))
    known, blind = estimate(made), estimate(replace(made, quality=None))
    assert known.labelers[0].effects["length"].value == pytest.approx(0.3, abs=0.05)
    assert blind.labelers[0].effects["length"].value == pytest.approx(0, abs=0.05)
    assert blind.labelers[4].effects["length"].value == pytest.approx(-0.3, abs=0.08)


def test_two_labelers_of_unknown_replies_cannot_be_told_a_bias_for_length():
    report = estimate(replace(simulated(4, people=((3.0, 0.0, 0.0, 0.02),) * 2), quality=None))
    assert "three labelers" in report.labelers[0].effects["length"].why


def test_who_agree_on_all_that_is_longer_are_no_spammers():
    people = ((0.0, 3.0, 0.0, 0.0),) * 4  # whether they like length or quality nobody can tell
    report = estimate(replace(simulated(8, people, pairs=300), quality=None))
    assert not spammers(report.labelers)
    assert all(each.accuracy.why for each in report.labelers)


def test_nothing_is_told_of_a_position_that_was_not_recorded():
    made = simulated(5)
    report = estimate(replace(made, first=np.zeros_like(made.first)))
    assert all(each.effects["position"].why for each in report.labelers)
    assert not any(each.effects["sharpness"].why for each in report.labelers)


def test_who_prefers_the_worse_is_contrary():
    report = estimate(simulated(6, people=((3.0, 0.0, 0.0, 0.02),) * 2 + ((-3.0, 0.0, 0.0, 0.02),)))
    assert [each.verdict for each in report.labelers] == ["", "", "contrary"]


def test_a_tie_is_half_a_vote_for_each_side():
    tied = replace(simulated(7, people=((0.0,) * 4,) * 3, pairs=200), wins=np.full(600, 0.5))
    theta = fit(tied).theta
    np.testing.assert_allclose(theta[:, :3], 0, atol=0.01)


@pytest.mark.parametrize("seed", [13, 28])  # whose search comes to a saddle first
def test_the_fit_ends_where_the_likelihood_falls_in_all_directions(seed):
    rng, pairs = np.random.default_rng(seed), 6
    labeler, pair = np.tile(np.arange(4), pairs), np.repeat(np.arange(pairs), 4)
    wins, first = rng.integers(0, 2, 4 * pairs) * 1.0, rng.choice([-1.0, 1.0], 4 * pairs)
    replies = np.arange(2 * pairs).reshape(-1, 2)
    made = Votes(
        tuple("abcd"), labeler, pair, wins, first, ("length",), np.zeros((pairs, 1)), replies
    )
    fitted = fit(made)
    assert fitted.converged and np.linalg.eigvalsh(fitted.covariance)[0] > 0
    for each in estimate(made).labelers:
        assert all(np.isfinite(effect.error) for effect in each.effects.values())
