"""A fine-tuning step of another side, compiled for TPUs that are not there, for `compiled.py`.

    python compiled_peers.py FOLDER maxtext TOPOLOGY REMAT     in an environment with MaxText
    python compiled_peers.py FOLDER before TOPOLOGY REMAT      with PYTHONPATH at a checkout of ours

Llama 3.2 1B's shape, a full row of 2048 tokens per chip, AdamW in float32, fsdp over all chips.
Writes FOLDER/step.txt, the compiled program, and FOLDER/memory.json, bytes of its temporaries.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def write(folder: Path, compiled: Any) -> None:
    """Leaves there what `compiled.py` counts."""
    (folder / "step.txt").write_text(compiled.as_text())
    (folder / "memory.json").write_text(json.dumps(compiled.memory_analysis().temp_size_in_bytes))


def maxtext(folder: Path, topology: str, remat: str) -> None:
    """MaxText's own compilation ahead of time; "dots" is nearest to its "minimal"."""
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    compile_step = train_compile.jit_and_compile

    def compile_and_write(*arguments: Any, **options: Any) -> Any:
        compiled = compile_step(*arguments, **options)
        write(folder, compiled)
        return compiled

    train_compile.jit_and_compile = compile_and_write
    name, shape = topology.split(":")
    chips = math.prod(map(int, shape.split("x")))
    cores = chips if name == "v5e" else 2 * chips  # as the names of its topologies count
    fields = {
        "compile_topology": f"{name}-{cores}", "compile_topology_num_slices": 1,
        "model_name": "default", "decoder_block": "llama2", "base_emb_dim": 2048,
        "base_num_query_heads": 32, "base_num_kv_heads": 8, "head_dim": 64, "base_mlp_dim": 8192,
        "base_num_decoder_layers": 16, "vocab_size": 128_256, "logits_via_embedding": True,
        "mlp_activations": '["silu","linear"]', "per_device_batch_size": 1,
        "max_target_length": 2048, "attention": "flash", "ici_fsdp_parallelism": chips,
        "remat_policy": "minimal" if remat == "dots" else remat, "enable_checkpointing": False,
        "dataset_type": "synthetic", "run_name": "compiled",
    }  # fmt: skip
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = [f"{name}={value}" for name, value in fields.items()]
    train_compile.main(["train_compile", str(base), *settings])


def before(folder: Path, topology: str, remat: str) -> None:
    """The step of the checkout in PYTHONPATH, with the names that it had at 645aafd."""
    import jax
    from jax.experimental import topologies

    from benchmarks.gpu import FULL, model_config
    from rlhf_jax.data.packing import Document, pack_documents
    from rlhf_jax.models import init
    from rlhf_jax.models.scoring import target_cross_entropy
    from rlhf_jax.training.mesh import batch_sharding, make_mesh, shardings
    from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
    from rlhf_jax.training.state import init_state
    from rlhf_jax.training.step import make_step

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh({"fsdp": -1}, chips)
    config = model_config(FULL, attention="xla", remat=remat)  # splash was refused on a mesh
    optimizer, _ = make_optimizer(OptimizerConfig(schedule="constant"), 1000)
    step = make_step(
        lambda params, batch, rng: target_cross_entropy(config, params, batch),
        optimizer,
        mesh=mesh,
        max_grad_norm=1.0,
    )

    def at(x: Any, place: Any, rows: int | None = None) -> Any:
        shape = x.shape if rows is None else (rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

    params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    state = jax.tree.map(at, state, shardings(mesh, state))
    full, _ = pack_documents([Document([1] * 2048, [0] + [1] * 2047)], 2048)
    batch = {name: at(x, batch_sharding(mesh), mesh.size) for name, x in full.items()}
    write(folder, step.lower(state, batch).compile())


if __name__ == "__main__":
    where, which, *options = sys.argv[1:]
    {"maxtext": maxtext, "before": before}[which](Path(where), *options)
