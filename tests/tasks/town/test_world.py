"""The town's facts: seeded, evenly spread, unambiguous, and held out cleanly."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.phrasings import DANGER, MANNERS, PEOPLE, RUDE_WORDS, SHOPS, VALUES
from rlhf_jax.tasks.town.world import ATTRIBUTES, SPLITS, TownConfig, build_world


def test_equal_configs_give_equal_worlds_and_other_seeds_others():
    assert build_world(TownConfig(seed=3)) == build_world(TownConfig(seed=3))
    assert build_world(TownConfig(seed=3)).people != build_world(TownConfig(seed=4)).people


def test_no_value_is_in_two_pools():
    owners = Counter(value.lower() for pool in VALUES.values() for value in set(pool))
    assert [value for value, count in owners.items() if count > 1] == []


def test_sizes_and_held_out_shares():
    world = build_world(TownConfig(people=40, heldout=0.25))
    assert {split: len(world.people_of[split]) for split in SPLITS} == {"train": 30, "heldout": 10}
    assert len({person.name for person in world.people}) == 40
    assert all(set(person.facts) == set(ATTRIBUTES) for person in world.people)


def test_values_are_used_evenly_so_that_the_commonest_answer_is_no_good_guess():
    world = build_world(TownConfig(people=80))
    for attribute in ("job", "street", "pet_name", "food", "hobby", "child"):
        counts = Counter(person.facts[attribute] for person in world.people)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_friends_are_of_the_same_split():
    world = build_world(TownConfig())
    split = {person.name: person.split for person in world.people}
    for person in world.people:
        assert split[person.facts["friend"]] == person.split
        assert person.facts["friend"] != person.name


@pytest.mark.parametrize(("people", "one_sided"), [(60, 6), (56, 0)])  # 45 and 15, 42 and 14
def test_best_friends_are_mutual_but_for_three_where_they_are_odd(people, one_sided):
    world = build_world(TownConfig(people=people))
    friend = {person.name: person.facts["friend"] for person in world.people}
    assert sum(friend[friend[name]] != name for name in friend) == one_sided
    assert sorted(friend.values()) == sorted(friend)


def test_every_attribute_has_phrasings_and_held_out_ones_are_others():
    assert tuple(PEOPLE) == ATTRIBUTES
    for phrasing in (*PEOPLE.values(), *SHOPS.values()):
        assert len(phrasing.statements) >= 4
        assert phrasing.heldout_questions
        assert not set(phrasing.heldout_questions) & set(phrasing.questions + phrasing.follow)


def test_polite_phrases_hold_no_rude_or_dangerous_word():
    for pool in ("opening", "closing", "filler", "refusal", "polite_request", "persona_who"):
        words = set(" ".join(MANNERS[pool]).lower().replace(".", "").replace(",", "").split())
        assert not words & (RUDE_WORDS | DANGER), pool


@pytest.mark.parametrize(
    "change",
    [
        {"people": 3},
        {"people": 1000},
        {"heldout": 0.9},
        {"attributes": ("job", "street", "pet", "shoe size")},
        {"families": {"fact": 1.0}},
        {"styles": {"plain": -1.0}},
        {"kinds": {"quiz": 0.0}},
        {"max_operand": 2},
        {"misjudged": 2.0},
        {"texts": -1},
    ],
)
def test_impossible_configs_are_the_users_mistake(change):
    with pytest.raises(UserError, match=next(iter(change))):
        TownConfig(**change)
