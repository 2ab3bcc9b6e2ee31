"""Twenty questions: to find one of 16 people of the town by questions answered yes or no.

python -m rlhf_jax.main --config=experiments/questions.py
    GRPO in the game, from …
python -m rlhf_jax.main --config=experiments/questions.py:sft
    … games of a player who asks at random what may be answered either way, from …
python -m rlhf_jax.main --config=experiments/memory.py:chat
    … the model of sft.py with room for 512 tokens
"""

from rlhf_jax.stages import defaults

ENVIRONMENT = {"file": "rlhf_jax/tasks/town/questions.py:QuestionsEnvironment", "max_calls": 20}
EVALUATION = {"source": "questions", "count": 64, "max_new_tokens": 384}


def get_config(variant="grpo"):
    match variant:
        case "sft":
            return sft()
        case "grpo":
            return grpo()
    raise defaults.no_variant("questions.py", variant, "sft, grpo")


def sft():
    return defaults.base(
        "sft",
        init={"policy": "experiments/memory.py:chat"},
        environment=ENVIRONMENT,
        compute={"remat": "none"},
        data={
            "train": "questions/dialogue",
            "validation": "questions/dialogue",
            "row_length": 384,
        },
        batch={"rows": 8},
        optimizer={
            **{"name": "muon", "learning_rate": 5e-3, "b2": 0.99, "warmup_steps": 10},
            **{"schedule": "linear", "final_fraction": 0.0},
        },
        train={"steps": 250, "log_every": 20},
        eval=EVALUATION,
    )


def grpo():
    return defaults.on_policy(
        "grpo",
        init={"policy": "experiments/questions.py:sft"},
        environment=ENVIRONMENT,
        data={"train": "questions", "validation": "questions", "row_length": 512},
        rollout={"prompts": 16, "samples": 8, "max_prompt_tokens": 32, "max_new_tokens": 384},
        kl={"placement": "none"},
        reward={"scorers": "environment=1"},
        batch={"rows": 4},
        optimizer={"learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 3},
        train={"steps": 12, "minibatches": 2, "log_every": 1, "eval_every": 12},
        eval=EVALUATION,
    )
