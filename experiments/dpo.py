"""Direct preference optimisation of the fine-tuned model, on a 2-core CPU.

    python -m rlhf_jax.main --config=experiments/dpo.py
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    config = defaults.base(
        "preference",
        init={"policy": "experiments/sft.py"},
        data={"row_length": 192},
        batch={"rows": 32},
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
        train={"steps": 100},
        loss={"name": "sigmoid", "beta": 0.1, "options": {}},
        eval=defaults.chat_evaluation(),
    )
    match variant:
        case "town":
            return config
    raise UserError(f"experiments/dpo.py has no variant {variant!r}; there are: town, …")
