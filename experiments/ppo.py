"""Proximal policy optimisation of a fine-tuned model against a reward model.

python -m rlhf_jax.main --config=experiments/ppo.py
    the embedded town
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return town("ppo")
    raise UserError(f"experiments/ppo.py has no variant {variant!r}; there are: town")


def town(algorithm, **sections):
    base = {
        "init": {"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
        "rollout": {"prompts": 128, "samples": 1},
        "batch": {"rows": 8},
        "optimizer": {
            "learning_rate": 2e-4,
            "schedule": "linear",
            "warmup_steps": 10,
            "final_fraction": 0.1,
        },
        "critic": {"learning_rate": 1e-3, "warmup_steps": 10},
        "train": {"steps": 60, "epochs": 2, "minibatches": 2, "log_every": 1, "eval_every": 10},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return defaults.on_policy(algorithm, **base)
