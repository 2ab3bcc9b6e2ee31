"""DPO on the policy's own answers, labelled by a reward model as they come; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/online_dpo.py
    the embedded town
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return defaults.online_preference(
                init={"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
                rollout={"prompts": 64, "samples": 4},
                data={"row_length": 320},
                optimizer={"learning_rate": 2e-4, "schedule": "linear", "warmup_steps": 5},
                train={"steps": 30, "minibatches": 2, "log_every": 1, "eval_every": 10},
            )
    raise UserError(f"experiments/online_dpo.py has no variant {variant!r}; there are: town")
