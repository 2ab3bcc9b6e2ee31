"""The named crowd: who votes on what, and how the same people rate."""

from __future__ import annotations

from collections import Counter, defaultdict
from random import Random

import pytest

from rlhf_jax.data.records import Message
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.town.crowd import CROWD, VOTES_PER_PAIR, Person, ratings, votes
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.labelers import Labeler
from rlhf_jax.tasks.town.town import Town

PROMPTS = 60


@pytest.fixture(scope="module")
def voted():
    return [*votes(Town(), "train", prompts=PROMPTS)]


def test_every_pair_has_several_labelers_and_both_orders(voted):
    people, orders = defaultdict(set), defaultdict(Counter)
    for vote in voted:
        people[vote.meta["pair"]].add(vote.meta["labeler"])
        shown = vote.chosen if vote.meta["order"] == "chosen_first" else vote.rejected
        orders[vote.meta["pair"]][shown] += 1
    assert len(people) == 3 * PROMPTS
    assert {len(each) for each in people.values()} == {VOTES_PER_PAIR}
    for shown in orders.values():
        assert len(shown) == 2 and abs(shown.most_common()[0][1] - shown.most_common()[1][1]) <= 1
    assert {vote.meta["labeler"] for vote in voted} == set(CROWD)
    assert len({vote.id for vote in voted}) == len(voted)


def test_some_pairs_come_again_with_sides_swapped(voted):
    asked = defaultdict(list)
    for vote in voted:
        shown = vote.chosen if vote.meta["order"] == "chosen_first" else vote.rejected
        asked[vote.meta["pair"], vote.meta["labeler"]].append(shown)
    again = [shown for shown in asked.values() if len(shown) > 1]
    assert 0.05 < len(again) / len(asked) < 0.15
    assert all(len(shown) == 2 and shown[0] != shown[1] for shown in again)


def test_votes_are_a_function_of_their_seed(voted):
    assert [*votes(Town(), "train", prompts=PROMPTS)] == voted
    other = [*votes(Town(), "train", prompts=PROMPTS, seed=1)]
    assert {vote.prompt for vote in other} == {vote.prompt for vote in voted}
    assert [vote.meta["labeler"] for vote in other] != [vote.meta["labeler"] for vote in voted]


def test_ratings_cost_what_the_votes_cost(voted):
    rated = [*ratings(Town(), "train", prompts=PROMPTS)]
    read = Counter(side for vote in voted for side in (vote.chosen, vote.rejected))
    assert read.keys() == {each.messages[-1].content for each in rated}
    assert len(rated) == pytest.approx(2 * len(voted), rel=0.05)
    assert {each.meta["rating"] for each in rated} <= set("12345")
    assert all(float(each.meta["label"]) == (int(each.meta["rating"]) - 1) / 4 for each in rated)


def test_rated_pairs_are_of_one_persons_ratings():
    pairs = load_records("town/rated", "validation")
    stated = {}
    for each in load_records("town/ratings", "validation"):
        key = (each.messages, each.meta["labeler"])
        stated.setdefault(key, int(each.meta["rating"]))
    for pair in pairs[:300]:
        chosen, rejected = (
            stated[(*pair.prompt, Message("assistant", side)), pair.meta["labeler"]]
            for side in (pair.chosen, pair.rejected)
        )
        assert chosen > rejected
    assert len({pair.id for pair in pairs}) == len(pairs)


def mean_rating(person, prompt, reply, time=0.5, count=300):
    rng = Random(0)
    return sum(person.rate(rng, prompt, reply, time) for _ in range(count)) / count


def test_a_rating_is_the_worth_on_the_persons_own_scale():
    steady = Labeler(sharpness=1000, lapses=0)  # hardly any noise
    pairs = Town().pairs("train", 200)
    pair = next(p for p in pairs if gold_score(p, p.chosen).total == pytest.approx(0.925))
    # 3 + slope · (0.925 − 0.75) / 0.125 = 3 + 1.4 slope
    for person, rating in [
        (Person(steady), 4),
        (Person(steady, slope=0.2), 3),
        (Person(steady, offset=-1.0), 3),
        (Person(steady, offset=9.0), 5),
    ]:
        assert mean_rating(person, pair, pair.chosen) == rating
    drifting = Person(steady, drift=2.0)
    assert [mean_rating(drifting, pair, pair.chosen, time) for time in (0.0, 1.0)] == [3, 5]
    assert mean_rating(CROWD["spammer"], pair, pair.chosen, count=2000) == pytest.approx(3, abs=0.1)


def test_what_is_ordered_is_in_the_order_of_gold_scores():
    pairs = load_records("town/ordered", "validation")
    assert len(pairs) > 500
    for pair in pairs[:100]:
        better, worse = (gold_score(pair, side).total for side in (pair.chosen, pair.rejected))
        assert better > worse
        assert pair.meta["gold_chosen"] == f"{better:.4f}"
