#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, tensorstore 0.1.86: equal arrays saved twice are different files.
#
# A good engineer would take a digest of a checkpoint's files for a digest of its weights. Seen: of
# five files under d/, written for equal arrays by one process, none keeps its name and two have
# other bytes. What tells models apart must be a digest of the arrays.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 tensorstore==0.1.86 flax==0.12.8
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import hashlib
import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

arrays = {"w": jnp.arange(300_000, dtype=jnp.float32).reshape(300, 1000), "b": jnp.ones(3)}
found = []
for name in ("first", "second"):
    path = pathlib.Path.cwd() / name
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)
    files = (p for p in path.rglob("*") if p.is_file() and p.parent.name == "d")
    found.append({str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
first, second = found
same = set(first.items()) & set(second.items())
print(f"orbax-checkpoint {ocp.__version__}: of {len(first)} files of arrays, {len(same)} are the same in name and bytes")
names = set(first) & set(second)
print(f"names in both: {len(names)}; bytes in both: {len(set(first.values()) & set(second.values()))}")
sys.exit(0 if len(same) < len(first) else 1)
PYTHON
