"""Fine-tuning on answers of which half are spoilt, or on the half of them that filters keep.

python -m rlhf_jax.main --config=experiments/filtering.py
    the town's demonstrations, half of them with a defect (town/spoilt), as they are
"""

from rlhf_jax.stages import defaults


def get_config(variant="all"):
    if variant != "all":
        raise defaults.no_variant("filtering.py", variant, "all")
    return defaults.base(
        "sft",
        init={"policy": "experiments/pretrain.py"},
        compute={"remat": "none"},
        data={"train": "town/spoilt", "row_length": 192, "replay": "town/text[:50%]=0.5"},
        batch={"rows": 8},
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "b2": 0.99,
            "warmup_steps": 10,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
        train={"steps": 80, "log_every": 20},
        eval={"count": 96},
    )
