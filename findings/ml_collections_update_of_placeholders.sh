#!/usr/bin/env bash
# ml_collections 1.1.0: update() refuses a section with a placeholder over one that has it too.
#
# A good engineer would expect two configurations made by one function to update one another, filled
# in or not. Seen: where both hold a placeholder for a field, update() raises TypeError "Cannot
# update a FieldReference from another FieldReference", even from a copy of the same values. Over a
# plain field it takes the placeholder's value. The message names the field and no way out: give
# update() other.copy_and_resolve_references(), or a plain dict of the values.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_collections==1.1.0
cd "$work"
venv/bin/python - <<'PYTHON'
import importlib.metadata
import sys

from ml_collections import ConfigDict, config_dict


def made(steps=None):
    config = ConfigDict({"train": {"steps": config_dict.placeholder(int)}})
    if steps is not None:
        config.train.steps = steps
    return config


def outcome(config, other):
    try:
        config.update(other)
    except TypeError as error:
        return f"TypeError: {error}"
    return config.train.steps


refused = "TypeError: Cannot update a FieldReference from another FieldReference: 'steps'"
print("ml_collections", importlib.metadata.version("ml_collections"))
changed = False
for name, found, wanted in (
    ("placeholder over placeholder", outcome(made(), made()), refused),
    ("filled in over filled in", outcome(made(3), made(4)), refused),
    ("filled in over a plain field", outcome(ConfigDict({"train": {"steps": 3}}), made(4)), 4),
    ("resolved over filled in", outcome(made(3), made(4).copy_and_resolve_references()), 4),
    ("a plain dict over filled in", outcome(made(3), made(4).to_dict()), 4),
):
    print(f"{name}: {found}")
    changed |= found != wanted
sys.exit(1 if changed else 0)
PYTHON
