"""Twenty questions: one of 16 people of the town is to be found by questions answered yes or no.

It may be asked whether it is a woman, somebody older than so much, who lives on a lane, with a
goat, or Ann. A game ends with a yes to a name, which is a question too, or without success
after `MOST` questions. What is no such question is not understood, and counts.

Whoever plays at best needs `Game.fewest` questions on average. A game is worth 1 if the person is
found by no more than these, rounded up, less by an equal share for each further question, and 0 if
the person is not found. All games are of the same people and questions, so that only the words that
open a game are held out: what is learned is to ask well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.tasks.task import Outcome, Verdict
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import words_of
from rlhf_jax.tasks.town.phrasings import TURNS
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import TRAIN, Subject, Subjects

PEOPLE, MOST = 16, 20
RECORDS = 4_000  # of training
CARELESS = 0.5  # the share of the questions in dialogues that are asked without thought
UNCLEAR = "I do not understand."
AGES = range(30, 80, 10)
WITHIN = (4, 5, 6, 7, 8, 10, 12, 16, 20)  # questions; of each it is reported how often they suffice
Group = frozenset[str]  # names


@dataclass(frozen=True)
class Game:
    """What may be asked.

    Attributes:
      names: the question for each of the people by name.
      questions: of whom the answer to each question is yes.
    """

    names: Mapping[str, str]
    questions: Mapping[str, Group]

    @functools.cached_property
    def _by_words(self) -> dict[tuple[str, ...], Group]:
        """The questions without capitals and punctuation."""
        return {tuple(words_of(text)): yes for text, yes in self.questions.items()}

    def answer(self, text: str, person: str) -> str:
        """What is said to a turn where this person is meant."""
        yes = self._by_words.get(tuple(words_of(text)))
        return UNCLEAR if yes is None else "Yes." if person in yes else "No."

    def asked(self, turns: Sequence[str], person: str) -> int | None:
        """The questions that were asked until the person was found, None if that has not been."""
        name = words_of(self.names[person])
        found = (n for n, text in enumerate(turns[:MOST], 1) if words_of(text) == name)
        return next(found, None)

    def worth(self, asked: int | None) -> float:
        """What a game is worth in which the person was found by so many questions."""
        enough = math.ceil(self.fewest)
        return 0.0 if asked is None else min(1.0, (MOST + 1 - asked) / (MOST + 1 - enough))

    @functools.cached_property
    def fewest(self) -> float:
        """The questions that the best player needs on average.

        All ways to play are searched, until one needs no more than if there were a question for
        every split.
        """
        questions = [*dict.fromkeys(self.questions.values())]

        @functools.cache
        def all_games(left: Group) -> int:
            if not left:
                return 0
            splits = [(left & yes, left - yes) for yes in questions if left & yes and left - yes]
            splits.sort(key=lambda parts: abs(len(parts[0]) - len(parts[1])))
            named = [(Group(), left - {name}) for name in self.names if name in left]
            best = len(left) ** 2  # more than if all are asked for by name
            for yes, no in (*splits, *named):
                best = min(best, len(left) + all_games(yes) + all_games(no))
                if best == _ideal(len(left)):
                    break
            return best

        return all_games(frozenset(self.names)) / len(self.names)


@functools.cache
def _ideal(people: int) -> int:
    """The fewest questions in all, of a game for each person, if every split could be asked for."""
    if people < 2:
        return people
    halves = (_ideal(yes) + _ideal(people - yes) for yes in range(1, people))
    return people + min(_ideal(people - 1), *halves)


def make_game(people: Subjects) -> Game:
    """The game of these people, by what is true of them."""
    questions: dict[str, Group] = {}
    names: dict[str, str] = {}
    for person in people:
        for text in _true_of(person):
            questions[text] = questions.get(text, Group()) | {person.name}
        names[person.name] = text
    return Game(names, questions)


def _true_of(person: Subject) -> Iterator[str]:
    """The questions about a person that are answered with yes, the one by name last."""
    words = TURNS["questions"]
    kind = person.facts["street"].split()[-1].lower()
    texts = [words["woman"]] if person.woman else []
    texts += [words["age"].format(age=age) for age in AGES if int(person.facts["age"]) > age]
    texts += [words["street"].format(kind=kind)]
    texts += [each.format(**person.slots) for each in words["others"]]
    return map(finish, texts)


@functools.cache
def town_game() -> Game:
    """The game of the town's first people."""
    return make_game(Town().world.people[:PEOPLE])


def prompts(split: str, count: int) -> Iterator[Prompt]:
    """The turns that open games, of all people equally often."""
    openings = TURNS["questions"]["openings" if split == TRAIN else "heldout_openings"]
    people = [*town_game().names]
    for index in range(count):
        opening = openings[index // len(people) % len(openings)]
        person = people[index % len(people)]
        message = Message("user", finish(opening))
        yield Prompt(f"{split}-{index}", (message,), {"thought_of": person})


def conversations(split: str, count: int) -> Iterator[Conversation]:
    """Games of a player who asks what halves best or, as often, anything that tells at all."""
    game = town_game()
    for prompt in prompts(split, count):
        rng = Random(f"town questions {prompt.id}")
        person, left = prompt.meta["thought_of"], frozenset(game.names)
        turns = [*prompt.messages]
        while True:
            text = _ask(game, left, rng)
            turns.append(Message("assistant", text))
            if text == game.names[person]:
                break
            turns.append(Message("user", game.answer(text, person)))
            yes = game.questions[text]
            left = left & yes if person in yes else left - yes
        yield Conversation(prompt.id, tuple(turns), prompt.meta)


def _ask(game: Game, left: Group, rng: Random) -> str:
    """A question about those who are left to which both answers are possible, if there is one."""
    telling = [text for text, yes in game.questions.items() if left & yes and left - yes]
    if rng.random() < CARELESS and telling:
        return pick(rng, telling)
    if len(left) <= 2:
        return game.names[min(left)]
    return min(telling, key=lambda text: abs(2 * len(left & game.questions[text]) - len(left)))


class QuestionsEnvironment:
    """Who thinks of a person, see `environments.environment.Environment`."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Mapping[str, Any]]:
        """Begins with the row's turn; nothing is left to chance."""
        self._person, self._said = row["thought_of"], list[str]()
        return row["prompt"]

    def step(self, text: str) -> tuple[Sequence[Mapping[str, Any]], float, bool]:
        """The answer, or the end of the game and what it is worth."""
        game = town_game()
        self._said.append(text)
        asked = game.asked(self._said, self._person)
        if asked or len(self._said) == MOST:
            return (), game.worth(asked), True
        return ({"role": "user", "content": game.answer(text, self._person)},), 0.0, False


def replay(row: Prompt | Pair | Conversation, turns: Sequence[str]) -> Verdict:
    """The worth of a game in which these turns were said."""
    asked = town_game().asked(turns, row.meta["thought_of"])
    return Verdict(town_game().worth(asked), {"correct": float(asked is not None)})


def outcomes(row: Prompt, turns: Sequence[str]) -> dict[str, Outcome]:
    """(how many, of how many) of a game, by name; see `Task.outcomes`.

    A share of turns counts as one of a game, so that intervals are over games.

    questions/of_fewest      the questions asked (`MOST` if the person was not found) over what the
                             best player needs on average: its mean over all people is ≥ 1
    questions/within/<n>     whether the person was found by n questions
    questions/unclear        the share of the turns that were not understood
    """
    game, person = town_game(), row.meta["thought_of"]
    asked = game.asked(turns, person)
    heard = [game.answer(text, person) for text in turns[: asked or MOST]]
    return {
        "questions/of_fewest": (asked or MOST, game.fewest),
        "questions/unclear": (heard.count(UNCLEAR) / len(heard), 1),
        **{f"questions/within/{n}": (float(asked is not None and asked <= n), 1) for n in WITHIN},
    }
