"""Twenty questions: to find one of 16 people of the town by questions answered yes or no.

python -m rlhf_jax.main --config=experiments/questions.py
    GRPO in the game, from …
python -m rlhf_jax.main --config=experiments/questions.py:sft
    … games of a player who asks half of its questions without thought, from …
python -m rlhf_jax.main --config=experiments/questions.py:chat
    … the model of sft.py with room for 512 tokens, from …
python -m rlhf_jax.main --config=experiments/questions.py:base
    … that of pretrain.py

The first two end with 64 games, each of the 16 people with 4 openings that training never has:
eval/questions/of_fewest is the questions asked over the 4.5 that the best player needs on average,
eval/questions/within/<n> how often n suffice, eval/pass^k that k sampled games take at most 5 each.
Greedily, after :sft with seeds 0, 1 and 2: 1.03, 1.04 and 1.03, everybody found, 94 % by 5
questions; after GRPO, seed 0: 1.02. Of 72 sampled games 28, 32 and 29 % take at most 5 after :sft,
50 % (23 to 77) after GRPO. A run took 1 to 2 minutes, after its parent.
"""

from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import load_config

ENVIRONMENT = {"file": "rlhf_jax/tasks/town/questions.py:QuestionsEnvironment", "max_calls": 20}
EVALUATION = {"source": "questions", "count": 64, "max_new_tokens": 384}


def get_config(variant="grpo"):
    match variant:
        case "base":
            return base()
        case "chat":
            return chat()
        case "sft":
            return sft()
        case "grpo":
            return grpo()
    raise defaults.no_variant("questions.py", variant, "base, chat, sft, grpo")


def base():
    """The recipe of pretrain.py with a longer context."""
    config = load_config("experiments/pretrain.py")
    return defaults.lay(config, {"model": {"max_length": 512}})


def chat():
    """The recipe of sft.py."""
    config = load_config("experiments/sft.py")
    return defaults.lay(config, {"init": {"policy": "experiments/questions.py:base"}})


def sft():
    return defaults.base(
        "sft",
        init={"policy": "experiments/questions.py:chat"},
        environment=ENVIRONMENT,
        compute={"remat": "none"},
        data={
            "train": "questions/dialogue",
            "validation": "questions/dialogue",
            "row_length": 384,
        },
        batch={"rows": 8},
        optimizer=defaults.TUNING | {"name": "muon", "learning_rate": 5e-3, "b2": 0.99},
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
