#!/usr/bin/env bash
# TextArena 0.7.4: two games of one process draw from one random generator, whatever their seeds.
#
# `reset(num_players, seed=…)` takes a seed, and a game that is played alone gives the same dice, tiles
# or cards for the same seed and moves. A good engineer would expect that of a game beside others too, as
# rollouts play them, many in a process. Seen: seeds go to Python's `random.seed`, so a second game, with
# a seed of its own, takes from the dice of the first, and resetting it begins them anew. What happens to
# a trajectory depends on how many others there are and in what order they move. A player of several
# games has to keep `random.getstate()` of each and set it around reset and step.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check textarena==0.7.4
cd "$work"
venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import random
import sys

import textarena


def begin(name, seed):
    game = textarena.make(name)
    game.reset(num_players=int(name.startswith("PigDice")) + 1, seed=seed)
    return game


def move(game, text):
    game.get_observation()
    game.step(text)


def play(name, text, others, own_state=False):
    """What is on the table after each of six moves, while others play the same game between."""
    game = begin(name, 7)
    state = random.getstate()
    beside = [begin(name, 100 + i) for i in range(others)]
    seen = []
    for _ in range(6):
        if own_state:
            random.setstate(state)
        move(game, text)
        state = random.getstate()
        seen.append(str({key: game.state.game_state.get(key) for key in ("turn_total", "board")}))
        for other in beside:
            move(other, text)
    return seen


changed = False
for name, text in [("PigDice-v0", "[roll]"), ("2048-v0", "[up]")]:
    alone = play(name, text, others=0)
    ways = [(0, False), (1, False), (2, False), (2, True)]
    same = [alone == play(name, text, others=n, own_state=own) for n, own in ways]
    print(name, "as alone: played again, beside one, beside two, each with its own state:", *same)
    changed |= same != [True, False, False, True]
sys.exit(changed)
PYTHON
