"""Environments of other libraries in an interpreter of their own: stand-ins, and the real ones."""

from __future__ import annotations

import os
import sys
import venv
from pathlib import Path

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.environments.trajectories import EnvironmentOptions, Environments
from rlhf_jax.errors import UserError
from tests.environments.test_trajectories import Words, said, texts

RECORDS = [Prompt("told", (Message("user", "Be short."),)), Prompt("bare", (Message("user", ""),))]

# What the adapter uses of reasoning-gym: seeds give questions, part of an answer is worth a part.
REASONING_GYM = """
class Sums:
    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return {"question": f"What is {self.seed} + 1?", "answer": str(self.seed + 1)}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.25 * (entry["answer"] in answer)

class Broken(Sums):
    def __getitem__(self, index):
        raise RuntimeError("no such file")

def create_dataset(name, **options):
    return factory.DATASETS[name](**options)

from reasoning_gym import factory
"""
# … and of TextArena: wrappers that repeat the history, one generator for all games, rewards for
# how far a game that ended with an invalid move got.
TEXTARENA = """
import random

class SinglePlayerState:
    pass

class Env:
    def __init__(self):
        self.said, self.state = [], SinglePlayerState()

    def get_observation(self):
        said, self.said = self.said, []
        return 0, said

class Dice(Env):
    def reset(self, num_players, seed=None):
        assert num_players == 1
        self.rewards, self.invalid = None, False
        random.seed(seed)
        self.said.append((-1, "Say go.", "rules"))

    def step(self, action):
        self.said.append((0, action, "move"))
        if action == "[go]":
            self.said.append((-1, f"You rolled {random.randint(1, 10**6)}.", "board"))
            return False, {}
        self.rewards, self.invalid = {0: 0.75}, action != "[stop]"
        return True, {}

    def close(self):
        return self.rewards, {0: {"invalid_move": self.invalid}}

class Chess(Env):
    def reset(self, num_players, seed=None):
        assert num_players == 2, f"needs 2 players, not {num_players}"

class Goods(Dice):
    def __init__(self):
        self.said, self.state = [], object()

class Wrapper:
    def __init__(self, env):
        self.env, self.history = env, []

    def reset(self, num_players, seed=None):
        self.env.reset(num_players, seed)

    def get_observation(self):
        self.history += self.env.get_observation()[1]
        return 0, str(self.history)

    def step(self, action):
        return self.env.step(f"[{action}]")

    def close(self):
        return self.env.close()

def make(name):
    return Wrapper(registration.ENV_REGISTRY[name]())

from textarena.envs import registration
"""
PACKAGES = {
    "reasoning_gym/__init__.py": REASONING_GYM,
    "reasoning_gym/factory.py": "from reasoning_gym import Broken, Sums\n"
    "DATASETS = {'sums': Sums, 'broken': Broken}\n",
    "textarena/__init__.py": TEXTARENA,
    "textarena/envs/__init__.py": "",
    "textarena/envs/registration.py": "from textarena import Chess, Dice, Goods\n"
    "ENV_REGISTRY = {'Dice-v0': Dice, 'Chess-v0': Chess, 'Goods-v0': Goods}\n",
}
OWN = """
import numbers_of_theirs

class Env:
    def reset(self, row, seed):
        return row["prompt"]

    def step(self, text):
        return [], numbers_of_theirs.ONE, True
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """An interpreter with the stand-ins, and without jax, numpy and all else that this one has."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, text in {**PACKAGES, "numbers_of_theirs.py": "ONE = 1.0\n"}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return str(folder / "bin" / "python")


def opened(file, python, seeds=(3, 4)):
    environments = Environments(EnvironmentOptions(file, python=python))
    return environments, environments.open(Words(), RECORDS, 2, seeds)


def rewards(play):
    return [sum(each.rewards) for each in play.trajectories]


def test_a_question_of_reasoning_gym_follows_the_prompt_and_its_score_is_the_reward(python):
    environments, play = opened("reasoning_gym:sums", python)
    with environments:
        assert texts(play.prompts) == ["[user]Be short.\n\nWhat is 3 + 1?", "[user]What is 4 + 1?"]
        answers = [said(0, 0, " 4\n"), said(0, 1, "4 or 5"), said(1, 0, "4"), said(1, 1, "5")]
        assert texts(play.respond(answers)) == ["", "", "", ""]
        assert rewards(play) == [1.0, 0.25, 0.0, 1.0]


def test_games_of_textarena_draw_from_their_own_seeds_and_tell_what_is_new(python):
    def rolls(moves):
        environments, play = opened("textarena:Dice-v0", python, seeds=(3, 3))
        with environments:
            assert texts(play.prompts)[0] == "[user]Be short.\n\nSay go."
            return [texts(play.respond([said(*move, "go")]))[0] for move in moves]

    first, second = rolls([(0, 0), (0, 0)])
    assert first != second and first.startswith("[user]You rolled ")
    # Another game that is played between does not change what comes next.
    assert rolls([(0, 0), (1, 1), (0, 1), (0, 0)]) == [first, first, first, second]


def test_a_game_that_ends_with_an_invalid_move_is_not_paid_for_its_progress(python):
    environments, play = opened("textarena:Dice-v0", python)
    with environments:
        assert texts(play.respond([said(0, 0, "stop"), said(0, 1, "what?")])) == ["", ""]
        assert rewards(play) == [0.75, 0.0, 0, 0]


def test_a_class_of_the_users_runs_there_and_sees_nothing_of_this_interpreter(python, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "spy.py").write_text("import jax\nclass Env:\n    pass\n")
    environments, play = opened(f"{tmp_path}/own.py:Env", python)
    with environments:
        assert texts(play.respond([said(0, 0, "x")])) == [""] and rewards(play)[0] == 1.0
    with pytest.raises(UserError, match="No module named 'jax'"):
        opened(f"{tmp_path}/spy.py:Env", python)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("reasoning_gym:sum", r"^environment: reasoning_gym has no 'sum'; did you mean sums\?$"),
        ("reasoning_gym:broken", "reasoning_gym:broken can't begin: raised RuntimeError: no such"),
        ("textarena:Dice", r"textarena has no 'Dice'; did you mean Dice-v0\?"),
        ("textarena:Chess-v0", "Chess-v0 can't begin: .* needs 2 players, not 1"),
        ("textarena:Goods-v0", "Goods-v0 can't begin: .* it is played by several"),
    ],
)
def test_a_name_that_is_no_environment_is_told(python, file, why):
    with pytest.raises(UserError, match=why):
        opened(file, python)


def test_an_interpreter_without_the_library_and_one_that_is_none_are_told(tmp_path):
    with pytest.raises(UserError, match=r"can't import reasoning_gym \(No module .*: install it"):
        opened("reasoning_gym:sums", sys.executable)
    with pytest.raises(UserError, match=r"environment.python = 'gone': there is no such program"):
        opened("reasoning_gym:sums", "gone")


def interpreter_of(variable: str) -> str:
    """The interpreter that an environment variable names; skips the test if it names none."""
    if not Path(os.environ.get(variable, "")).is_file():
        pytest.skip(f"{variable} names no interpreter that has the library")
    return os.environ[variable]


@pytest.mark.slow
def test_the_real_reasoning_gym():
    python = interpreter_of("RLHF_JAX_REASONING_GYM")
    environments, play = opened("reasoning_gym:leg_counting", python, seeds=(7, 8))
    with environments:
        prompt = texts(play.prompts)[0]
        assert prompt.startswith("[user]Be short.\n\nYour task is to count how many legs there are")
        assert "15 dogs, 9 wasps, 4 flatworms, 1 leech, 2 birds, 7 beetles" in prompt
        # 60 + 54 + 0 + 0 + 4 + 42 legs, 28 of 7 sheep, and none of 2 sea slugs
        play.respond([said(0, 0, "188"), said(0, 1, "189"), said(1, 0, "")])
        assert rewards(play) == [1.0, 0.0, 0.0, 0]
    with pytest.raises(UserError, match="no 'leg_count'; did you mean leg_counting"):
        opened("reasoning_gym:leg_count", python)


@pytest.mark.slow
def test_the_real_textarena():
    python = interpreter_of("RLHF_JAX_TEXTARENA")
    environments, play = opened("textarena:GuessTheNumber-v0", python, seeds=(7, 8))
    with environments:
        assert "Guess The Number" in texts(play.prompts)[0]
        low, high, turns = 1, 20, 0
        while low < high:  # at the target the game ends
            guess, turns = (low + high) // 2, turns + 1
            answer = texts(play.respond([said(0, 0, f"[{guess}]")]))[0]
            if not answer:
                break
            low, high = (guess + 1, high) if "higher" in answer else (low, guess - 1)
        else:
            play.respond([said(0, 0, f"[{low}]")])
        assert rewards(play)[0] == 1.0 and turns <= 4
        for _ in range(3):
            play.respond([said(0, 1, "hello")])
        assert rewards(play)[1] == 0.0
    # 2048 draws its tiles in every step, whatever other games draw between.
    boards = []
    for others in (0, 2):
        environments, play = opened("textarena:2048-v0-easy", python, seeds=(7, 7))
        with environments:
            for move in ("up", "left", "down"):
                boards += texts(play.respond([said(0, 0, move)]))
                for _ in range(others):
                    play.respond([said(1, 0, "right"), said(1, 1, "up")])
    assert boards[:3] == boards[3:]
    with pytest.raises(UserError, match=r"Chess-v0 can't begin: .* players has to be 2"):
        opened("textarena:Chess-v0", python)
