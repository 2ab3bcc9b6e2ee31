"""Proximal policy optimisation of a fine-tuned model against a reward; times are of a 2-core CPU.

python -m rlhf_jax.main --config=experiments/ppo.py
    the embedded town, against the reward model of experiments/reward.py
python -m rlhf_jax.main --config=experiments/ppo.py:ensemble
    the same against three reward models, their mean less their standard deviation: gold win rate
    0.81 (0.76 to 0.86) at KL 1.2
python -m rlhf_jax.main --config=experiments/ppo.py:hh
    HH-RLHF, helpful, against the reward model trained on its pairs: from -0.2 to 0.4 of its
    deviations at KL 4.5, and the answers are nonsense that it likes: the models are that small
python -m rlhf_jax.main --config=experiments/ppo.py:sentiment
    the controlled sentiment task of the DPO paper: continue a film review, to a classifier's liking
    (which is right about 62 % of the beginnings it never saw, and the truth here by definition):
    7 minutes; from 0.0 to 1.7 of the classifier's deviations at KL 9.5
python -m rlhf_jax.main --config=experiments/ppo.py:own --config.init.policy=/path/to/model \\
        --config.data.train=prompts.jsonl --config.init.reward=runs/reward-own
    your model and prompts against a reward model, or with --config.reward.scorers=mine.py:score a
    function; LoRA, --config.adapter.rank=16, wants about ten times the rate:
    --config.optimizer.learning_rate=1e-5
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {
    "learning_rate": 2e-4,
    "schedule": "linear",
    "warmup_steps": 10,
    "final_fraction": 0.1,
}


def get_config(variant="town"):
    match variant:
        case "town":
            return town()
        case "ensemble":
            members = {f"reward_{i}": f"experiments/reward.py:member{i}" for i in (1, 2)}
            return town(init=members, reward={"ensemble": "mean_minus_std"})
        case "hh":
            pairs = "hh_rlhf/helpful"
            # Long answers of real text: the reward model was trained on their whole, so what is cut
            # off is not what it can judge.
            return ppo(
                init={"policy": "experiments/sft.py:hh", "reward": "experiments/reward.py:hh"},
                data={"train": pairs, "validation": pairs, "row_length": 512},
                rollout={
                    "prompts": 32,
                    "max_prompt_tokens": 256,
                    "max_new_tokens": 96,
                    "missing_eos": "subtract",
                },
                kl={"coefficient": 0.05},
                train={"steps": 16},
                eval={"source": pairs, "count": 64, "max_new_tokens": 96},
            )
        case "sentiment":
            return ppo(
                init={"policy": "experiments/sft.py:imdb", "reward": "experiments/reward.py:imdb"},
                data={"train": "imdb/prompt", "validation": "imdb/prompt", "row_length": 384},
                rollout={"prompts": 64, "max_prompt_tokens": 48, "max_new_tokens": 64},
                kl={"coefficient": 0.05},
                train={"steps": 32},
                eval={"source": "imdb/prompt", "count": 64},
            )
        case "own":
            return ppo(
                init={"policy": "", "reward": ""},
                data=defaults.OWN_PROMPTS,
                rollout=defaults.OWN_ROLLOUT | {"prompts": 64},
                optimizer=defaults.TUNING | {"learning_rate": 1e-6},
                critic={"learning_rate": 1e-5},
                train={"steps": 100, "eval_every": 20},
                eval=defaults.OWN_EVALUATION | {"max_new_tokens": 256},
            )
    raise defaults.no_variant("ppo.py", variant, "town, ensemble, hh, sentiment, own")


def town(init=None, **sections):
    parents = {"policy": "experiments/sft.py", "reward": "experiments/reward.py"}
    return ppo(
        init=parents | (init or {}),
        rollout={"prompts": 128},
        kl={"coefficient": 0.25},
        train={"steps": 20},
        **sections,
    )


def ppo(**sections):
    train = {"epochs": 2, "minibatches": 2, "log_every": 1, "eval_every": 4}
    config = defaults.on_policy("ppo", batch={"rows": 4}, optimizer=OPTIMIZER, train=train)
    return defaults.lay(config, sections)
