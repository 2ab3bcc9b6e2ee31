"""What a reader walks through does not grow: the counts of tests/house.py and their bounds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house

# Measured; a change that lowers one lowers its bound, a change that must raise one says why.
BOUNDS = {
    # Meshes took 370: `models/sharding`, and splash attention for shared prompts. Several hosts
    # took 620 more, decoding on a mesh and long rows 200; `plan/`, an annex, 1,310. The first hour
    # (help, packaging, before and after, evaluation, longer runs) took 1,240 and a loss over words
    # that are split 90; `sweep/`, an annex, 2,210. Votes by people who differ took 60 and seeds
    # trained together 45; feedback, in `label/`, `labelers/`, `filter/`, `synthesize/` and
    # `judges/`, all annexes, 5,030, what these share in the core 12, and the crowd of the town 240.
    # Turns that an environment answers took 560 in the core (the engine, rows, rewards by turn, how
    # calls are written, chat) and 680 in `environments/`; what is said of tools and of safety took
    # 370 in `evaluation/`, a cost below a limit 130, and stages that train on AI feedback 60 and
    # 650 in `judges/`; the town's tools and its safety are 1,380 of `tasks/`.
    # Results that are kept for the next run took 60, what a task measures of replies 30, and faults
    # that reading showed (locks, options, names of one lineage, directions of metrics) 250;
    # `claims/`, an annex, took 860, memory and personas 560 and sets of calls 230 in `tasks/`, a
    # judge behind an address 110. An environment in another interpreter took 30 in the core,
    # reasoning-gym, TextArena and twenty questions 360, and faults of the annexes 70. Faults that
    # four readers showed took 120 more in the core (tables' dates, a decoding loop that devices end
    # together, names of functions looked up beforehand) and 350 in the annexes; those of three more
    # (evaluations that replace others, sweeps' directories, chats with an environment, the limit of
    # a trajectory's length) 235 and 100. A short convolution took 50 in the core, a damped price 5,
    # and drills of memory 45 of `tasks/`; eight faults that had been noticed 35 and 35, and 24 more
    # (openings, costs and frozen models refused before training, streams of judges' parts, silent
    # personas, added tokens and several chat templates of the Hub) 115 and 200. What nobody used
    # gave 45 back. Models of another version, and prompts without an answer, took 35 in the core;
    # slices of a per cent and seeds of AI feedback 5, and dialogues in which much changes 22. What
    # a record of another kind lacks, and Adafactor's bound of each layer by itself, took 37 in the
    # core, tables of sums and what no model type of the Hub has 30 in the annexes.
    "lines of the core": 23_226,
    "lines with the annexes": 47_412,
    "functions over 60 lines": 1,
    "functions over 80 lines": 0,
    "functions over 8 parameters": 2,
    "functions over 10 parameters": 0,
    # train.best, the user's own loss and advantage (loss.file, advantage.file), data.labelers,
    # environment.file and environment.tools, lagrange.cost and its damping, tokenizer.digits,
    # data.trained_turns, rollout.given, reward.on_error of every scorer, and the nine of the stages
    # of AI feedback.
    "fields of all stages": 139,
    "fields of PPO": 83,
    "files that name a policy loss": 4,
    "files that name an advantage": 9,
    # Two of each, and a file, ask the ranges of losses' options; one more of the clip is the
    # `__post_init__` that policy losses share.
    "functions on the walk of beta": 19,
    "files on the walk of beta": 10,
    "functions on the walk of clip": 22,
    "files on the walk of clip": 11,
    # One is `fit.kept_before`: what a run starts from is measured once, by every stage; another is
    # `shapes.is_tie`, which every line of a file is asked. Five more are of turns that are
    # answered: which tokens of an answer it said itself, and what is said of tools. One writes what
    # a table holds and JSON does not as text, and one counts groups that score the same.
    # Two, and their file, see before training that the last evaluation can be asked.
    "functions on the walk of prompt": 90,
    "files on the walk of prompt": 33,
    "containers on the walk of prompt": 5,
}


def grown(counts: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (count, BOUNDS[name]) for name, count in counts.items() if count > BOUNDS[name]}


def test_no_size_of_the_house_grows():
    counts = house.sizes()
    assert counts.keys() == {name for name in BOUNDS if "on the walk" not in name}
    assert not grown(counts)


@pytest.mark.slow
def test_no_walk_through_the_house_grows():
    # In a process of its own: what was compiled before is not traced again.
    command = [sys.executable, "-m", "tests.house", "--json"]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts.keys() == {name for name in BOUNDS if "on the walk" in name}
    assert not grown(counts)


def test_a_count_is_of_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "set.py").write_text("NAME = 'gae'\n")
    body = "\n".join("    x = 1" for _ in range(61))
    (tmp_path / "core.py").write_text(f"def f(self, a, *b, c=1, **d):\n{body}\n")
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    assert [*house.functions()] == [house.Function("core.py", "f", 62, 4)]
    empty = dict.fromkeys(house.ANNEXES, 0)
    assert house.lines() == empty | {"core": 62, "tasks": 1}
    assert house.files_that_name({"gae"}) == {"tasks/set.py"}


def test_a_walk_is_every_function_that_runs_while_the_number_is_passed(tmp_path, monkeypatch):
    (tmp_path / "walked.py").write_text(
        "def outer():\n    through({'beta': 0.25})\n    beside(1.0)\n\n\n"
        "def through(options):\n    inner(options['beta'])\n\n\n"
        "def inner(beta):\n    beside(beta + 1)\n\n\n"
        "def beside(x):\n    pass\n"
    )
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import walked

    walk = house.walk_of_number(0.25, walked.outer)
    assert walk.functions == {("walked.py", name) for name in ("outer", "through", "inner")}
    assert walk.files == {"walked.py"}
