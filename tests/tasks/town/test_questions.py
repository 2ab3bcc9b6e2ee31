"""Twenty questions: the fewest that are needed, what is answered, and what a game is worth."""

from __future__ import annotations

import itertools
import json
from random import Random

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.tasks.town.language import words_of
from rlhf_jax.tasks.town.questions import (
    MOST,
    Game,
    QuestionsEnvironment,
    conversations,
    outcomes,
    prompts,
    replay,
    town_game,
)
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN

GAME = town_game()
PEOPLE = [*GAME.names]


def game_of(people, *groups):
    """A game of people named by letters, with a question for each group beside their names."""
    names = {name: f"Is it {name}?" for name in people}
    asked = {f"Question {i}?": frozenset(group) for i, group in enumerate(groups)}
    return Game(names, asked | {text: frozenset(name) for name, text in names.items()})


@pytest.mark.parametrize(
    ("game", "fewest"),
    [
        (game_of("a"), 1),
        (game_of("ab", "a"), 1.5),  # by name: 1 or 2
        (game_of("abcd"), 2.5),  # one name after the other: 1, 2, 3 and 4
        (game_of("abcdefgh"), 4.5),
        (game_of("abcdefgh", "abcd"), 3.5),  # a half, then four names
        # Three halves: two questions, then one name or the other; the third half is of no use.
        (game_of("abcdefgh", "abcd", "abef", "aceg"), 3.5),
        (game_of("abcdefgh", "ab", "abc"), 29 / 8),  # three and five names: 8 + 6 + 15 in all
    ],
)
def test_the_fewest_questions_by_hand(game, fewest):
    assert game.fewest == fewest


def total(game, left):
    """The fewest questions of all games together, by trying each one everywhere."""
    if not left:
        return 0
    named = [total(game, left - {name}) for name in left]
    groups = [yes for yes in game.questions.values() if left & yes and left - yes]
    split = [total(game, left & yes) + total(game, left - yes) for yes in groups]
    return len(left) + min(named + split)


def test_the_fewest_questions_are_those_of_the_best_of_all_players():
    rng = Random(0)
    for _ in range(20):
        groups = [[name for name in "abcde" if rng.random() < 0.4] for _ in range(3)]
        game = game_of("abcde", *groups)
        assert game.fewest == total(game, frozenset("abcde")) / 5


def play(choose, person):
    """The turns of a player who chooses a question of a game for those who are left."""
    world, left, turns = QuestionsEnvironment(), frozenset(PEOPLE), []
    world.reset({"thought_of": person, "prompt": [{"role": "user", "content": "Who?"}]}, 0)
    while True:
        turns.append(choose(left))
        answers, reward, done = world.step(turns[-1])
        if done:
            return turns, reward
        yes = GAME.questions[turns[-1]]
        left = left & yes if answers[0]["content"] == "Yes." else left - yes


def halve(left):
    """The question that comes nearest to halving those who are left; one of two by name."""
    if len(left) < 3:
        return GAME.names[sorted(left)[0]]
    return min(
        GAME.questions, key=lambda text: abs(2 * len(left & GAME.questions[text]) - len(left))
    )


def test_the_town_can_be_halved_down_to_names():
    # 16, 8, 4 and 2 people are left; then a name is right, or the next one is.
    assert len(PEOPLE) == 16 and GAME.fewest == 4.5
    games = [play(halve, person) for person in PEOPLE]
    assert 4.5 <= sum(len(turns) for turns, _ in games) / 16 < 5
    for (turns, reward), person in zip(games, PEOPLE, strict=True):
        assert turns[-1] == GAME.names[person] and reward == GAME.worth(len(turns))
        assert replay(Prompt("", (), {"thought_of": person}), turns).total == reward


def test_a_question_is_answered_by_the_facts_and_else_not_understood():
    asked = ["is it a woman", "Is it somebody older than 30?"]
    asked += ["Is it somebody who lives on a lane?", "IS IT SOMEBODY WITH A GOAT?"]
    facts = {"Abel": ("No.", "Yes.", "No.", "Yes."), "Cora": ("Yes.", "No.", "Yes.", "No.")}
    for person, answers in facts.items():  # a man of 39 on Bridge Street; a woman of 27 on Oak Lane
        for text, answer in zip(asked, answers, strict=True):
            assert GAME.answer(text, person) == answer
        for text in ("", "Is it", "Is it Ann or Abel?", "Is it somebody older than 36?", "Yes."):
            assert GAME.answer(text, person) == "I do not understand."
    assert not GAME.questions["Is it a woman?"] & {"Abel", "Colin", "Felix", "Walt"}


def test_worth_and_outcomes_of_a_game_by_hand():
    row = Prompt("p", (Message("user", "Who?"),), {"thought_of": "Ann"})
    wrong, right = "Is it Abel?", "Is it Ann?"
    for before, worth in ((0, 1), (4, 1), (5, 15 / 16), (19, 1 / 16), (20, 0)):
        turns = [wrong] * before + [right]
        assert replay(row, turns).total == worth
        assert replay(row, turns).right == (before < 20)
    found = outcomes(row, [wrong, "Hm?", "What?", wrong, wrong, "is it ann"])
    assert found["questions/of_fewest"] == (6, 4.5) and found["questions/unclear"] == (2 / 6, 1)
    within = {n: found[f"questions/within/{n}"] for n in (4, 5, 6, 7, 20)}
    assert within == {4: (0, 1), 5: (0, 1), 6: (1, 1), 7: (1, 1), 20: (1, 1)}
    found = outcomes(row, [wrong, wrong])  # cut off
    assert found["questions/of_fewest"] == (20, 4.5) and found["questions/within/20"] == (0, 1)


def test_an_environment_ends_with_the_name_or_after_twenty_questions():
    world = QuestionsEnvironment()
    opening = [{"role": "user", "content": "Who?"}]
    assert world.reset({"thought_of": "Ann", "prompt": opening}, 0) == opening
    assert world.step("Is it a woman?") == (({"role": "user", "content": "Yes."},), 0.0, False)
    assert world.step("Is it Ann?") == ((), 1.0, True)
    world.reset({"thought_of": "Ann", "prompt": opening}, 0)
    ends = [world.step("Is it Abel?")[1:] for _ in range(MOST)]
    assert ends == [(0.0, False)] * 19 + [(0.0, True)]


def test_dialogues_ask_what_may_be_answered_either_way_until_the_name():
    lengths = []
    for made in itertools.islice(conversations(TRAIN, 4_000), 480):
        person, left = made.meta["thought_of"], frozenset(PEOPLE)
        asked = [m.content for m in made.messages if m.role == "assistant"]
        said = [m.content for m in made.messages if m.role == "user"][1:]
        for text, answer in zip(asked, said, strict=False):
            yes = GAME.questions[text]
            assert left & yes and left - yes and answer == ("Yes." if person in yes else "No.")
            left = left & yes if person in yes else left - yes
        assert asked[-1] == GAME.names[person] and person in left
        lengths.append(len(asked))
    # With thought alone it would be 4.6 questions a game, without any 6.7.
    assert max(lengths) <= 16 and 5.1 < sum(lengths) / len(lengths) < 5.7


def test_games_are_of_all_people_and_only_openings_are_held_out():
    train, held_out = [*prompts(TRAIN, 128)], [*prompts(HELDOUT, 64)]
    for records, openings in ((train, 8), (held_out, 4)):
        people = [each.meta["thought_of"] for each in records]
        assert {people.count(name) for name in PEOPLE} == {openings}
        assert len({each.messages[0].content for each in records}) == openings
        assert len({json.dumps([m.to_json() for m in e.messages]) + e.meta["thought_of"]
                    for e in records}) == len(records)  # fmt: skip
    assert not {e.messages for e in train} & {e.messages for e in held_out}
    words = {tuple(words_of(text)) for text in GAME.questions}
    assert len(words) == len(GAME.questions)
