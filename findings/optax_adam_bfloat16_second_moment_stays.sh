#!/usr/bin/env bash
# optax 0.2.8: with bfloat16 parameters Adam's second moment never falls, and stops rising at half.
#
# `optax.adam` keeps its moments in the parameters' dtype. A good engineer who trains in bfloat16 would
# expect moments with an error of 0.4 %, and would set `mu_dtype=float32` to be careful. Seen: the second
# moment moves by 1 - b2 = 0.1 % a step, which is less than the distance of two bfloat16 numbers, and is
# rounded away. Under gradients of 1 it rises to 0.5 and no further; once they have become small, as they do
# after a warmup or a spike, it stays as it was for ever, and with it the step: after 20,000 steps of
# gradients of 0.001 it is still 0.5 (float32: 1e-6), so that a step is about 700 times too short.
# `mu_dtype` is of the first moment only, and there is no `nu_dtype`. Keep float32 parameters beside those
# that are computed with, or wrap the transformation to see float32 gradients and parameters.
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

import jax
import jax.numpy as jnp
import optax

adam = optax.adam(1e-3, mu_dtype=jnp.float32)


def train(name):
    """The second moment after 5,000 steps of gradients of 1 and 20,000 of 0.001, and the last step."""
    parameters = jnp.zeros((), name)

    def after(state, gradient, count):
        gradient = jnp.asarray(gradient, name)
        return jax.lax.fori_loop(0, count, lambda _, s: adam.update(gradient, s, parameters)[1], state)

    risen = after(adam.init(parameters), 1.0, 5_000)
    fallen = after(risen, 1e-3, 20_000)
    update, _ = adam.update(jnp.asarray(1e-3, name), fallen, parameters)
    return [float(x) for x in (risen[0].nu, fallen[0].nu, update)]


whole, half = (train(name) for name in ("float32", "bfloat16"))
for name, (risen, last, update) in (("float32", whole), ("bfloat16", half)):
    print(f"{name}: second moment {risen:.3g} after gradients of 1, {last:.3g} after those of 0.001;",
          f"the last step is {update:.3g}")
right = abs(whole[0] - 1) < 0.01 and whole[1] < 2e-6 and abs(whole[2] + 1e-3) < 1e-5
sys.exit(not (right and half[0] == half[1] == 0.5 and abs(half[2]) < 2e-6))
PYTHON
