"""Agreement of labelers: Krippendorff's α against published values and the package of that name."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.labelers.agreement import (
    cycles,
    dawid_skene,
    krippendorff_alpha,
    majority,
    self_consistency,
    vote_table,
)
from rlhf_jax.labelers.likelihood import Votes

NAN = np.nan
# Example C of Krippendorff's "Computing Krippendorff's Alpha-Reliability": 4 coders, 12 units.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def votes_of(rows, labelers=("ann", "bob", "cyd"), replies=None):
    """Votes of (labeler, pair, share for a), shown in no known order."""
    labeler, pair, wins = (np.array(column) for column in zip(*rows, strict=True))
    pairs = int(pair.max()) + 1
    replies = np.arange(2 * pairs).reshape(-1, 2) if replies is None else np.array(replies)
    features = np.zeros((pairs, 1))
    first = np.zeros(len(rows))
    return Votes(labelers, labeler, pair, wins.astype(float), first, ("length",), features, replies)


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_has_its_published_values(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level).value == pytest.approx(alpha, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, level).of == 11  # the last unit has a single value


def test_alpha_by_hand():
    # Units (0, 0), (0, 1), (1, 1): coincidences [[2, 1], [1, 2]], so D_o = 2/6 and
    # D_e = 2·3·3 / (6·5), which make 1 − (1/3) / (3/5) = 4/9.
    table = np.array([[0, 0, 1], [0, 1, 1]], float)
    assert krippendorff_alpha(table).value == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([[1, NAN], [NAN, 0]], "nothing has two labels"),
        ([[1, 1], [1, 1]], "all labels are the same"),
    ],
)
def test_an_undefined_alpha_says_why(table, why):
    measured = krippendorff_alpha(np.array(table, float))
    assert measured.value is None and measured.why == why


def test_alpha_is_that_of_the_package_of_that_name():
    package = pytest.importorskip("krippendorff", reason="GPL: nothing here is installed with it")
    rng = np.random.default_rng(0)
    for _ in range(100):
        table = rng.integers(1, 6, (rng.integers(2, 6), rng.integers(3, 30))).astype(float)
        table[rng.random(table.shape) < 0.4] = np.nan
        for level in ("nominal", "ordinal", "interval"):
            ours = krippendorff_alpha(table, level).value
            try:
                theirs = package.alpha(table, level_of_measurement=level)
            except ValueError:
                theirs = np.nan
            if ours is not None:
                assert ours == pytest.approx(theirs, abs=1e-9)


def test_only_the_first_vote_about_a_pair_is_a_coders():
    votes = votes_of([(0, 0, 1), (1, 0, 0), (0, 0, 0)])
    np.testing.assert_array_equal(vote_table(votes), [[1], [0], [NAN]])


def test_self_consistency_is_of_pairs_that_came_again():
    votes = votes_of([(0, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 1)])
    ann, bob, _ = self_consistency(votes)
    assert (ann.value, ann.of) == (0.5, 2)
    assert bob.value is None and "twice" in bob.why


def test_a_cycle_is_a_over_b_over_c_over_a():
    triangle = [(0, 1), (1, 2), (0, 2)]
    around = [(0, 0, 1), (0, 1, 1), (0, 2, 0)]
    straight = [(1, 0, 1), (1, 1, 1), (1, 2, 1)]
    tied = [(2, 0, 1), (2, 1, 1), (2, 2, 0.5)]
    ann, bob, cyd = cycles(votes_of(around + straight + tied, replies=triangle))
    assert (ann.value, ann.of) == (1.0, 1) and (bob.value, bob.of) == (0.0, 1)
    assert (cyd.value, cyd.of) == (0.0, 1)
    assert cycles(votes_of([(0, 0, 1)]))[0].value is None


def test_with_one_vote_a_pair_dawid_skene_is_the_majority():
    rng = np.random.default_rng(0)
    votes = votes_of([(int(rng.integers(3)), pair, int(rng.integers(2))) for pair in range(60)])
    np.testing.assert_array_equal(dawid_skene(votes) > 0.5, majority(votes) > 0.5)


def test_two_who_are_wrong_of_three_are_believed_by_both():
    rows = [(who, pair, 1) for pair in range(20) for who in range(3)]
    rows += [(0, 20, 1), (1, 20, 0), (2, 20, 0)]
    votes = votes_of(rows)
    assert majority(votes)[20] == pytest.approx(1 / 3) and dawid_skene(votes)[20] < 0.5


def test_dawid_skene_learns_whom_not_to_believe():
    rng = np.random.default_rng(1)
    truth = rng.integers(2, size=400)
    rows = [(who, p, t) for p, t in enumerate(truth.tolist()) for who in (0, 1)]
    guesses = rng.integers(2, size=(3, 400)).tolist()
    rows += [(2 + who, p, vote) for who, each in enumerate(guesses) for p, vote in enumerate(each)]
    votes = votes_of(rows, labelers=tuple("abcde"))
    right = [((belief > 0.5) == truth).mean() for belief in (majority(votes), dawid_skene(votes))]
    assert right[0] < 0.95 and right[1] == 1.0
