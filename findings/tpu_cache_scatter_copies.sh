#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.52: a TPU's scatter into a cache copies the whole cache at every call.
#
# Decoding writes one token's keys in each row of a donated cache [rows, heads, slots, 64], at a place
# of its own in each: cache.at[rows, :, places].set(new), inside a while loop. A good engineer would
# expect it in place, as on a CPU. Seen, compiled for a v5e: the loop wants the cache in another
# layout, in which heads of 64 are padded to 128 numbers, so temporaries are about twice the cache and
# every call copies it there and back. One dynamic_update_slice a row, same result, needs almost none.
#
# Nothing is run on a TPU; the compiler is a pip package. Python 3.12 or later is needed (PYTHON=…).
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.52
cd "$work"
cat > cache.py <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

ROWS, HEADS, SLOTS, WIDTH = 8, 8, 1024, 64
described = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
)
place = SingleDeviceSharding(described.devices[0])


def scatter(cache, new, places):
    return cache.at[jnp.arange(ROWS), :, places].set(new)


def row_by_row(cache, new, places):
    for row in range(ROWS):
        piece = new[row][None, :, None]
        cache = jax.lax.dynamic_update_slice(cache, piece, (row, 0, places[row], 0))
    return cache


def temporaries(write):
    def decode(cache, query, places, steps):
        def step(carry):
            cache, query, places, i = carry
            cache = jax.lax.optimization_barrier(write(cache, query, places))
            scores = jnp.einsum("bhd,bhsd->bhs", query, cache)
            mixed = jnp.einsum("bhs,bhsd->bhd", jax.nn.softmax(scores), cache)
            return cache, mixed, places + 1, i + 1

        return jax.lax.while_loop(lambda c: c[3] < steps, step, (cache, query, places, 0))

    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arguments = (
        of((ROWS, HEADS, SLOTS, WIDTH), jnp.bfloat16), of((ROWS, HEADS, WIDTH), jnp.bfloat16),
        of((ROWS,), jnp.int32), of((), jnp.int32),
    )
    compiled = jax.jit(decode, donate_argnums=0).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (2 * ROWS * HEADS * SLOTS * WIDTH)


by_scatter, by_row = temporaries(scatter), temporaries(row_by_row)
print(f"temporaries, in caches: scatter {by_scatter:.2f}, dynamic_update_slice {by_row:.2f}")
sys.exit(not (by_scatter > 1 and by_row < 0.2))
PYTHON
TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu \
  "$work/venv/bin/python" cache.py 2>&1 | grep temporaries
