"""Group-relative policy optimisation and its family: no critic, several answers a prompt.

python -m rlhf_jax.main --config=experiments/grpo.py
    the embedded town
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults

FAMILY = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce", "reinforce_pp", "remax", "gspo", "cispo")


def get_config(variant="grpo"):
    if variant in FAMILY:
        return town(variant)
    raise UserError(
        f"experiments/grpo.py has no variant {variant!r}; there are: {', '.join(FAMILY)}"
    )


def town(algorithm, **sections):
    base = {
        "init": {"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
        "rollout": {"prompts": 32, "samples": 8},
        "data": {"row_length": 320},
        "batch": {"rows": 8},
        "optimizer": {
            "learning_rate": 2e-4,
            "schedule": "linear",
            "warmup_steps": 10,
            "final_fraction": 0.1,
        },
        "train": {"steps": 60, "epochs": 1, "minibatches": 2, "log_every": 1, "eval_every": 10},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return defaults.on_policy(algorithm, **base)
