#!/usr/bin/env bash
# math-verify 0.9.0, latex2sympy2_extended 1.11.0: common ways to write a number are other numbers.
#
# A good engineer would expect parse() to read "5 1/2", "1.5e-3" and a typographic minus (U+2212)
# outside LaTeX as it reads 5\frac{1}{2}, 0.0015 and -5, or to return nothing. Seen: the mixed
# number is 1, or 3 between dollars; the exponent is cut off, or e becomes Euler's number between
# dollars; "0 − 5" is 5 and "−5" alone is nothing, though between dollars it is -5. With the gold
# answer "5 1/2", verify() takes "1" for right and "11/2" for wrong. Whoever scores with it must
# rewrite such gold answers and answers first, and look at what parse() makes of every gold answer.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
cd "$work"
PYTHONIOENCODING=utf-8 venv/bin/python - <<'PYTHON'
import importlib.metadata
import sys

from math_verify import parse, verify

print("math-verify", importlib.metadata.version("math-verify"))
changed = False
for text, wanted in {
    "5 1/2": "1",
    "$5 1/2$": "3",
    r"$5\frac{1}{2}$": "11/2",
    "1.5e-3": "1.50000000000000",
    "$1.5e-3$": "-3 + 1.5*E",
    "0.0015": "0.00150000000000000",
    "The answer is \u22125": None,
    "x = 0 \u2212 5": "5",
    "$\u22125$": "-5",
}.items():
    parsed = parse(text)
    found = str(parsed[0]) if parsed else None
    print(f"{text!r} is read as {found}")
    changed |= found != wanted
for gold, answer, wanted in (
    ("5 1/2", "1", True),
    ("5 1/2", "11/2", False),
    ("0.0015", "1.5e-3", False),
    ("1.5e-3", "1.5", True),
    ("-5", "The answer is \u22125", False),
    ("-5", "$\u22125$", True),
):
    found = verify(parse(gold), parse(answer))
    print(f"gold {gold!r}, answer {answer!r}: {found}")
    changed |= found is not wanted
sys.exit(1 if changed else 0)
PYTHON
