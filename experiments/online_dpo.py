"""DPO on the policy's own answers, labelled by a reward as they come; times are of a 2-core CPU.

python -m rlhf_jax.main --config=experiments/online_dpo.py
    the embedded town, labelled by the reward model of experiments/reward.py
python -m rlhf_jax.main --config=experiments/online_dpo.py:sentiment
    continuations of film reviews, labelled by a classifier: 4 minutes; 1.4 deviations at KL 5.4
"""

from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return online_dpo(
                init={"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
            )
        case "sentiment":
            return online_dpo(
                init={"policy": "experiments/sft.py:imdb", "reward": "experiments/reward.py:imdb"},
                data={"train": "imdb/prompt", "validation": "imdb/prompt", "row_length": 384},
                rollout={"max_prompt_tokens": 48, "max_new_tokens": 64},
                eval={"source": "imdb/prompt", "count": 64},
            )
    raise defaults.no_variant("online_dpo.py", variant, "town, sentiment")


def online_dpo(**sections):
    config = defaults.online_preference(
        rollout={"prompts": 64, "samples": 4},
        data={"row_length": 320},
        batch={"rows": 4},
        optimizer={"learning_rate": 2e-4, "schedule": "linear", "warmup_steps": 5},
        train={"steps": 20, "minibatches": 2, "log_every": 1, "eval_every": 4},
    )
    return defaults.lay(config, sections)
