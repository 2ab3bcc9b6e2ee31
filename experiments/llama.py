"""Llama's shapes, for `rlhf_jax.plan`, which needs no weights.

python -m rlhf_jax.plan --config=experiments/llama.py:dpo-8b --topology=h100:8 \\
        --config.mesh.fsdp=8 --config.compute.attention=cudnn
    preference pairs of 4096 tokens; 1b and 70b, sft and grpo in place of dpo;
    --config.adapter.rank=16 --config.adapter.base=bfloat16 for LoRA
python -m benchmarks.plans
    a table of them
"""

from rlhf_jax.stages import defaults

SHAPES = ("1b", "8b", "70b")
COMPUTE = {"compute_dtype": "bfloat16", "remat": "full", "attention": "xla"}


def get_config(variant="dpo-8b"):
    stage, _, shape = variant.rpartition("-")
    shared = {
        "init": {"policy": f"experiments/llama.py:{shape}"},
        "data": {"row_length": 4096},
        "batch": {"rows": 64},
        "compute": COMPUTE,
    }
    if shape in SHAPES and stage in ("sft", "dpo"):
        return defaults.base({"sft": "sft", "dpo": "preference"}[stage], **shared)
    if shape in SHAPES and stage == "grpo":
        return defaults.on_policy(
            "grpo",
            **shared,
            train={"minibatches": 4},
            rollout={
                "prompts": 64,
                "samples": 8,
                "max_prompt_tokens": 1024,
                "max_new_tokens": 1024,
                "slots": 256,
            },
            reward={"scorers": "correct=1"},
        )
    if shape in SHAPES and not stage:
        return defaults.base(
            "pretrain", model=defaults.model(shape), tokenizer={"vocab_size": 128_256}
        )
    known = ", ".join(
        f"{kind}{shape}" for kind in ("sft-", "dpo-", "grpo-", "") for shape in SHAPES
    )
    raise defaults.no_variant("llama.py", variant, known)
