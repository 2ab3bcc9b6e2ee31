"""Best-of-n by a reward, measured, and fine-tuning on the winners; times are of a 2-core CPU.

python -m rlhf_jax.main --config=experiments/best_of_n.py
    the embedded town, by the reward model of experiments/reward.py
python -m rlhf_jax.main --config=experiments/best_of_n.py:sentiment
    the continuations of film reviews that a classifier likes best: 4 minutes; the best of 64 has
    2.1 deviations at KL ≤ 3.2. On one plot with ppo.py:sentiment and online_dpo.py:sentiment:
    python -m rlhf_jax.compare runs/ppo-sentiment runs/online_dpo-sentiment runs/best_of_n-sentiment
"""

from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return best_of_n(
                init={"policy": "experiments/sft.py", "reward": "experiments/reward.py"},
                best_of_n={"samples": 128, "n": 16, "prompts": 800},
            )
        case "sentiment":
            return best_of_n(
                init={"policy": "experiments/sft.py:imdb", "reward": "experiments/reward.py:imdb"},
                data={"train": "imdb/prompt", "validation": "imdb/prompt"},
                rollout={"max_prompt_tokens": 48, "max_new_tokens": 64},
                best_of_n={"samples": 64, "n": 16, "prompts": 400},
                eval={"source": "imdb/prompt", "count": 64, "during": 96},
            )
    raise defaults.no_variant("best_of_n.py", variant, "town, sentiment")


def best_of_n(**sections):
    return defaults.best_of_n(
        batch={"rows": 8},
        optimizer={"learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 5},
        train={"steps": 40},
        **sections,
    )
