#!/usr/bin/env bash
# jax 0.10.2: an initializer takes the stacked axis of layers or experts for inputs of the kernel.
#
# Kernels of all layers, or of all experts of a mixture, are kept as one array [layers or experts, in, out], and a
# good engineer would expect `lecun_normal()(key, (64, 128, 128))` to be 64 kernels as `lecun_normal()(key, (128,
# 128))` makes them. Seen: an axis before the last two counts as a convolution's window, so the fan-in is 64 · 128
# and the deviation is 8 times smaller, as it is for he_normal, and for glorot_normal, of both fans. Nothing fails:
# shapes and means are right, and with norms before every kernel the model trains, from another start. What makes it
# 64 such kernels is `batch_axis=0`, or jax.vmap over 64 keys; `nn.scan` and `nn.vmap` of flax do the latter, a
# parameter of one's own in that shape does not.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys

import jax
from jax.nn import initializers

EXPERTS, SIZE = 64, 128
key = jax.random.key(0)
seen = {}
for name in ("lecun_normal", "he_normal", "glorot_normal"):
    make = getattr(initializers, name)
    one = make()(key, (SIZE, SIZE)).std()
    stacked = make()(key, (EXPERTS, SIZE, SIZE)).std()
    batched = make(batch_axis=0)(key, (EXPERTS, SIZE, SIZE)).std()
    mapped = jax.vmap(lambda each: make()(each, (SIZE, SIZE)))(jax.random.split(key, EXPERTS)).std()
    seen[name] = [round(float(one / other), 1) for other in (stacked, batched, mapped)]
    print(f"{name}: one kernel's deviation over that of 64 stacked, with batch_axis=0, mapped: {seen[name]}")
sys.exit(not all(abs(a - 8) < 0.2 and abs(b - 1) < 0.05 and abs(c - 1) < 0.05 for a, b, c in seen.values()))
PYTHON
