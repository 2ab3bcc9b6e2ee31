"""Supervised fine-tuning of the pre-trained model, on a 2-core CPU.

    python -m rlhf_jax.main --config=experiments/sft.py            the embedded town
    python -m rlhf_jax.main --config=experiments/sft.py:fables     prompt → fable
    python -m rlhf_jax.main --config=experiments/sft.py:gsm8k      grade-school maths
    python -m rlhf_jax.main --config=experiments/sft.py:hh         the preferred replies of HH-RLHF
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    config = defaults.base(
        "sft",
        init={"policy": "experiments/pretrain.py"},
        data={"row_length": 128},
        batch={"rows": 64},
        optimizer={
            "name": "muon",
            "learning_rate": 5e-3,
            "warmup_steps": 10,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
        train={"steps": 150},
        loss={"label_smoothing": 0.0, "z_loss": 0.0},
        eval=defaults.chat_evaluation(),
    )
    match variant:
        case "town":
            return config
    raise UserError(f"experiments/sft.py has no variant {variant!r}; there are: town, …")
