#!/usr/bin/env bash
# scikit-learn 1.9.1: a weighted kappa of ratings in words takes the alphabet for their scale.
#
# cohen_kappa_score(a, b, weights="linear") is for ordered ratings: to be a step apart weighs less than
# four. A good engineer would expect words to be refused without an order, or the order of labels= to
# hold and words that it lacks to be refused. Seen: words are sorted, so that "fair" stands between
# "excellent" and "good", and a judge who is always a step beside the other has a kappa of -0.51 where
# the same ratings as numbers have 0.32. labels= sets the order, but a rating that it lacks is left out
# without a word: of a judge who disagrees in every second rating, by a word of his own, it says 1.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import sklearn
from sklearn.metrics import cohen_kappa_score

print("scikit-learn", sklearn.__version__)
SCALE = ["poor", "fair", "good", "very good", "excellent"]
one = [0, 1, 2, 3, 4] * 20
other = [1, 2, 3, 4, 3] * 20  # always a step beside it
words = [SCALE[i] for i in one], [SCALE[i] for i in other]
numbers = cohen_kappa_score(one, other, weights="linear")
sorted_words = cohen_kappa_score(*words, weights="linear")
in_order = cohen_kappa_score(*words, weights="linear", labels=SCALE)
print(f"as numbers {numbers:.3f}, as words {sorted_words:.3f}, with labels= {in_order:.3f}")

verdicts = ["first", "first", "second", "second"] * 20
judge = ["first", "tie", "second", "tie"] * 20
without = cohen_kappa_score(verdicts, judge, labels=["first", "second"])
whole = cohen_kappa_score(verdicts, judge)
print(f"half of the ratings are a word that labels= lacks: {without:.3f}, with it {whole:.3f}")
same = abs(numbers - in_order) < 1e-12 and sorted_words < numbers - 0.2 and without == 1 and whole < 0.6
sys.exit(not same)
PYTHON
