#!/usr/bin/env bash
# optax 0.2.8: clipping float16 gradients by their global norm sets them to zero above a norm of 256.
#
# A good engineer would expect `clip_by_global_norm(1.0)` to return gradients of norm 1, whatever they were,
# or infinities if something overflowed, which `apply_if_finite` would catch. Seen: the norm is computed in
# the gradients' dtype. In float16 the sum of squares passes 65,504 at a norm of 256, the norm is infinite,
# and every gradient divided by it is exactly 0, which is finite: the step trains nothing, Adam's moments
# decay, and no loss scaling or check of finiteness notices. Under a loss scale of 2^15 a true norm of 0.008
# is enough. `optax.global_norm` of the same gradients says inf. bfloat16 has the range and is not touched.
# Cast gradients to float32, or divide by the loss scale in float32, before the clip.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import sys

import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)
lengths = {}
for name in ("float16", "bfloat16", "float32"):
    for norm in (200.0, 300.0):
        gradients = jnp.full(100, norm / 10, name)
        clipped, _ = clip.update(gradients, clip.init(gradients))
        lengths[name, norm] = np.linalg.norm(np.asarray(clipped, np.float64))
        print(f"{name}: gradients of norm {norm:.0f}, of global_norm {optax.global_norm(gradients)},",
              f"have norm {lengths[name, norm]:.3f} after the clip")
zeroed = lengths.pop(("float16", 300.0)) == 0
sys.exit(not (zeroed and all(abs(length - 1) < 0.01 for length in lengths.values())))
PYTHON
