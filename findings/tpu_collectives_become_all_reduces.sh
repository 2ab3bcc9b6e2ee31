#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.52: over all chips of a slice, a TPU's compiler makes all-reduces of
# reduce-scatters, and on a three-dimensional slice of all-gathers too.
#
# A good engineer would give FSDP all chips of a v5p:4x4x4, gather weights with all_gather, sum
# gradients with psum_scatter, and count on the bytes of these. Seen, compiled for it: both are
# all-reduces of whole arrays (the gather of one padded with zeros), twice the bytes and a whole
# gradient in memory. With the same chips as 4 x 16, and fsdp over the 16, they are what was asked
# for. On v5e:4x4, 16 chips, the reduce-scatter alone is an all-reduce; as 4 x 4 it is not.
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
cat > collectives.py <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

SIZE = 4096


def kinds(topology, data, fsdp):
    """The collectives in the compiled product of rows with a weight that is split over fsdp."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), devices=chips)

    def of_a_chip(weight, rows):
        whole = jax.lax.all_gather(weight, "fsdp", tiled=True)
        gradient = (rows.T @ jnp.sin(rows @ whole)).astype(jnp.float32)
        return jax.lax.psum_scatter(gradient, "fsdp", tiled=True)

    split, rows = PartitionSpec("fsdp"), PartitionSpec(("data", "fsdp"))
    step = jax.jit(
        jax.shard_map(
            of_a_chip, mesh=mesh, in_specs=(split, rows), out_specs=split, check_vma=False
        )
    )

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    text = step.lower(array((SIZE, SIZE), split), array((128 * len(chips), SIZE), rows)).compile()
    names = r" (all-gather|all-reduce|reduce-scatter)(?:-start)?\(|(all-reduce-scatter)[\w.]* \("
    found = {kind or "reduce-scatter" for kind, _ in re.findall(names, text.as_text())}
    print(topology, f"{data} x {fsdp}:", *sorted(found))
    return found


all_of_v5p, some_of_v5p = kinds("v5p:4x4x4", 1, 64), kinds("v5p:4x4x4", 4, 16)
all_of_v5e, some_of_v5e = kinds("v5e:4x4", 1, 16), kinds("v5e:4x4", 4, 4)
sys.exit(
    not (
        all_of_v5p == {"all-reduce"}
        and "all-gather" in some_of_v5p and "reduce-scatter" in some_of_v5p
        and all_of_v5e == {"all-gather", "all-reduce"} and "reduce-scatter" in some_of_v5e
    )
)
PYTHON
TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu \
  "$work/venv/bin/python" collectives.py 2>/dev/null
