"""The benchmark of compiled steps compiles for any mesh, also one of this machine's CPU devices."""

import jax

from benchmarks import compiled, gpu
from rlhf_jax.training.mesh import make_mesh


def test_a_step_is_compiled_and_counted():
    config = gpu.model_config(gpu.REDUCED, attention="reference", remat="full")
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    step = compiled.compile_update(config, mesh, rows=2, length=gpu.REDUCED.shape.context)
    cells = [line.strip("| ").split(" | ") for line in compiled.table(step, mesh.size)[2:]]
    lines = {cell[0]: cell[1] for cell in cells}
    layer = 7 * gpu.REDUCED.shape.layers
    assert lines["reduce-scatter"].startswith(f"{layer + 1} x, ")  # every kernel and the table
    assert lines["all-to-all"].startswith("2 x, ")  # the embedding's rows, and their gradient
    assert lines["cycles, estimated"] == "0"  # by a CPU's compiler
