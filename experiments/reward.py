"""A reward model from preference pairs, on the body of a fine-tuned model; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/reward.py
    the embedded town's labelers
python -m rlhf_jax.main --config=experiments/reward.py:hh
    HH-RLHF, helpful: 1 minute after its parents' 8; accuracy on held-out pairs 0.67 (0.61 to 0.73)
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return reward(
                "experiments/sft.py",
                data={"row_length": 224},
                batch={"rows": 32},
                train={"steps": 100},
            )
        case "hh":
            return reward(
                "experiments/sft.py:hh",
                data={
                    "train": "hh_rlhf/helpful",
                    "validation": "hh_rlhf/helpful",
                    "row_length": 768,
                    "over_long": "drop",
                },
                batch={"rows": 8},
                train={"steps": 60},
                eval={"batch_rows": 16},
            )
    raise UserError(f"experiments/reward.py has no variant {variant!r}; there are: town, hh")


def reward(policy, **sections):
    return defaults.base(
        "reward",
        init={"policy": policy},
        optimizer={
            "learning_rate": 5e-4,
            "warmup_steps": 10,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
        loss={"centering": 0.0},
        **sections,
    )
