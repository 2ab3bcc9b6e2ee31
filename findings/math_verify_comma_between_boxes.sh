#!/usr/bin/env bash
# math-verify 0.9.0, latex2sympy2_extended 1.11.0: a comma between two \boxed{} makes them one set.
#
# A good engineer would expect the last \boxed{} of a text to be its answer. Seen: outside dollars,
# two boxes with a comma, a semicolon, "and" or "or" anywhere in the fewer than 70 characters between
# them are read as the set of both. "So \boxed{1}. Wait, that is wrong. So \boxed{2}." is {1, 2} and
# wrong for the gold answer 2. Without the comma, or with each box between dollars, it is 2 and
# right. Whoever rewards a model that corrects itself must cut out the last box and parse it alone.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
cd "$work"
venv/bin/python - <<'PYTHON'
import importlib.metadata
import sys

from math_verify import parse, verify

print("math-verify", importlib.metadata.version("math-verify"))
gold = parse("2")
changed = False
for text, wanted, right in (
    (r"So \boxed{1}. Wait, that is wrong. So \boxed{2}.", "{1, 2}", False),
    (r"So \boxed{1}. That is wrong and I start again: \boxed{2}.", "{1, 2}", False),
    (r"So \boxed{1}. That is wrong; now it is \boxed{2}.", "{1, 2}", False),
    (r"So \boxed{1}. It was this or that. So \boxed{2}.", "{1, 2}", False),
    (r"So \boxed{1}. That is wrong. So \boxed{2}.", "2", True),
    (r"So $\boxed{1}$. Wait, that is wrong. So $\boxed{2}$.", "2", True),
    (rf"So \boxed{{1}}. Wait, {'that is wrong. ' * 5}So \boxed{{2}}.", "2", True),
    (r"\boxed{2}", "2", True),
):
    parsed = parse(text)
    found = (str(parsed[0]), verify(gold, parsed))
    print(f"{text} is read as {found[0]}; gold 2: {found[1]}")
    changed |= found != (wanted, right)
sys.exit(1 if changed else 0)
PYTHON
