#!/usr/bin/env bash
# reasoning-gym 0.1.25: an answer that is ten times too large scores up to 0.9, a right one with
# spaces around it a third.
#
# A data set's `score_answer` is in [0, 1]. A good engineer would expect that where one whole number is
# right every other number is worth 0, and that spaces and newlines at the ends do not matter. Seen: in
# most such data sets an answer that contains the right one is worth the share of its characters that
# are right, so that "4280" scores 0.75 where 428 is right, and " 4\n" in gcd 0.33 where 4 is (in chain_sum
# 1). The mean of such scores is no accuracy. Whoever measures has to strip the text and count the scores
# that are 1; whoever trains by them pays for wrong numbers, the more the longer the right one is.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cd "$work"
venv/bin/python - <<'PYTHON'
import re
import sys

import reasoning_gym

SEEN = {  # mean score of: the number with a 0 after it, the number between a space and a newline
    "products": (0.84, 1.0),
    "chain_sum": (0.72, 1.0),
    "lcm": (0.76, 0.61),
    "leg_counting": (0.74, 0.59),
    "gcd": (0.52, 0.35),
    "gsm_symbolic": (0.01, 1.0),
    "rectangle_count": (0.0, 1.0),
}

changed = False
for name, seen in SEEN.items():
    questions = reasoning_gym.create_dataset(name, size=50, seed=0)
    right, tenfold, spaced = [], [], []
    for entry in questions:
        answer = entry["answer"]
        assert re.fullmatch(r"-?[1-9]\d*|0", answer), answer
        right.append(questions.score_answer(answer, entry))
        if answer != "0":  # ten times 0 is right
            tenfold.append(questions.score_answer(answer + "0", entry))
        spaced.append(questions.score_answer(f" {answer}\n", entry))
    means = [sum(scores) / len(scores) for scores in (tenfold, spaced)]
    print(f"{name:16}", *(f"{mean:.2f}" for mean in means), "of", len(tenfold))
    changed |= min(right) != 1 or any(abs(a - b) > 0.03 for a, b in zip(means, seen))
sys.exit(changed)
PYTHON
