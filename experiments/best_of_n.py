"""Best-of-n by a reward model, measured, and fine-tuning on the winners; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/best_of_n.py
    the embedded town
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return best_of_n()
    raise UserError(f"experiments/best_of_n.py has no variant {variant!r}; there are: town")


def best_of_n(**sections):
    return defaults.best_of_n(
        init={"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
        best_of_n={"samples": 128, "n": 16, "prompts": 800},
        batch={"rows": 8},
        optimizer={"learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 5},
        train={"steps": 40},
        **sections,
    )
