"""What a fine-tuning step would take on a mesh of TPUs that are not there, as their compiler says.

    python -m benchmarks.compiled --topology=v5e:2x4 [--mesh=fsdp=8] [--rows=8] [--remat=full]

Compiles the step of `gpu.py`'s Llama (1.2B parameters, full rows of 2048, AdamW in float32) and
prints memory and collectives per chip, and the compiler's estimate of cycles, which leaves out the
attention kernel and the collectives. Nothing is run. It needs `pip install "jax[tpu]"`; topologies
are named as `jax.experimental.topologies` names them.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks import gpu
from rlhf_jax.plan.compiled_text import count


def compile_update(config: Any, mesh: Any, rows: int, length: int) -> Any:
    """The compiled update of a model on `rows` full rows of `length` tokens."""
    import jax
    import jax.numpy as jnp

    from rlhf_jax.data.packing import Document, pack_documents
    from rlhf_jax.models import init
    from rlhf_jax.models.scoring import target_cross_entropy
    from rlhf_jax.training.mesh import batch_sharding, shardings
    from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
    from rlhf_jax.training.state import init_state
    from rlhf_jax.training.step import make_step

    optimizer, _ = make_optimizer(OptimizerConfig(schedule="constant"), 1000)
    step = make_step(
        lambda params, batch, rng: target_cross_entropy(config, params, batch),
        optimizer,
        mesh=mesh,
        max_grad_norm=1.0,
    )

    def at(x: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    state = jax.tree.map(at, state, shardings(mesh, state))
    # Every token is a target: an example with few would hide what the loss costs.
    full, _ = pack_documents([Document([1] * length, [0] + [1] * (length - 1))], length)
    batch = {
        name: at(jnp.broadcast_to(x, (rows, *x.shape[1:])), batch_sharding(mesh))
        for name, x in full.items()
    }
    return step.lower(state, batch).compile()


def table(compiled: Any, chips: int) -> list[str]:
    """Markdown lines of what one chip does in a step."""
    memory, counted = compiled.memory_analysis(), count(compiled.as_text(), chips)
    lines = [
        "| of a chip | |",
        "|---|---|",
        f"| arguments | {memory.argument_size_in_bytes / 2**30:.2f} GiB |",
        f"| temporaries | {memory.temp_size_in_bytes / 2**30:.2f} GiB |",
    ]
    for kind, (times, size) in counted.collectives.items():
        lines.append(f"| {kind} | {times} x, {size / 1e9:.3f} GB |")
    lines.append(f"| sent while nothing else runs | {counted.sent_bytes(overlapped=False):.3g} B |")
    lines.append(f"| cycles, estimated | {counted.cycles:.3g} |")
    if counted.unknown_loops:
        lines.append(f"| loops of unknown length, counted once | {counted.unknown_loops} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", required=True)
    parser.add_argument("--mesh", default="fsdp=-1", help="axes, as data=2,fsdp=4")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--remat", default="full", choices=("full", "dots", "none"))
    parser.add_argument("--attention", default="splash")
    given = parser.parse_args(argv)
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    from jax.experimental import topologies

    from rlhf_jax.training.mesh import make_mesh

    chips = topologies.get_topology_desc(platform="tpu", topology_name=given.topology).devices
    axes = (axis.split("=") for axis in given.mesh.split(","))
    mesh = make_mesh({name: int(size) for name, size in axes}, chips)
    config = gpu.model_config(gpu.FULL, attention=given.attention, remat=given.remat)
    compiled = compile_update(config, mesh, given.rows, gpu.FULL.shape.context)
    print("\n".join(table(compiled, mesh.size)))


if __name__ == "__main__":
    main()
