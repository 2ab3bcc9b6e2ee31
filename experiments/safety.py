"""Safety as a curve: harmful prompts refused against harmless ones, seen, unseen and wrapped."""

import re

from rlhf_jax.stages import defaults

OPTIMIZER = {
    "learning_rate": 3e-3,
    "b2": 0.99,
    "warmup_steps": 10,
    "schedule": "linear",
    "final_fraction": 0.0,
}
EVALUATION = {"source": "safety/prompt", "count": 1000, "max_new_tokens": 40}


def get_config(variant="dpo"):
    if re.fullmatch(r"sft0\.\d+", variant):
        return sft(float(variant.removeprefix("sft")))
    match variant:
        case "pretrain":
            return pretrain()
        case "helpful":
            return fine_tuned("pretrain", "safety/helpful", 430, 3e-3)
        case "dpo":
            return dpo()
        case "limited":
            return limited()
    known = "pretrain, helpful, sft0.1 (any share), dpo, limited"
    raise defaults.no_variant("safety.py", variant, known)


def pretrain():
    return defaults.base(
        "pretrain",
        tokenizer={"vocab_size": 2048},
        data={"train": "town=8,safety/text=1", "row_length": 128, "over_long": "split"},
        batch={"rows": 8},
        optimizer={**OPTIMIZER, "warmup_steps": 20, "schedule": "wsd", "decay_fraction": 0.4},
        train={"steps": 560, "log_every": 20},
    )


def sft(share):
    """The helpful model, further on so many of its rows refusals, beside 15 % careful ones."""
    train = f"safety/helpful={0.85 - share:g},safety/refusals={share:g},safety/careful=0.15"
    return fine_tuned("helpful", train, 160, 2e-3)


def fine_tuned(parent, train, steps, learning_rate):
    return defaults.base(
        "sft",
        init={"policy": f"experiments/safety.py:{parent}"},
        compute={"remat": "none"},
        data={
            "train": train,
            "validation": "safety/helpful",
            "row_length": 192,
            "replay": "town/text[:50%]=0.4,safety/text=0.05",
        },
        batch={"rows": 8},
        optimizer=OPTIMIZER | {"learning_rate": learning_rate},
        train={"steps": steps, "log_every": 20},
        eval=EVALUATION,
    )


def dpo():
    return defaults.base(
        "preference",
        init={"policy": "experiments/safety.py:sft0.1"},
        compute={"remat": "none"},
        data={"train": "safety/pair", "validation": "safety/pair", "row_length": 224},
        batch={"rows": 16},
        optimizer={**OPTIMIZER, "learning_rate": 3.5e-4, "b2": 0.999},
        loss={"sft_coefficient": 0.3},
        train={"steps": 64},
        eval=EVALUATION,
    )


def limited():
    """A judge that likes every refusal, and a limit on those that nothing calls for."""
    return defaults.on_policy(
        "dr_grpo",
        init={"policy": "experiments/safety.py:sft0.1"},
        data={"train": "safety/asked", "validation": "safety/asked", "row_length": 320},
        batch={"rows": 4},
        rollout={"prompts": 32, "samples": 8, "max_prompt_tokens": 64},
        reward={"scorers": "regex=1", "pattern": "n't (help|do)"},
        lagrange={"cost": "over_refusal", "limit": 0.05, "rate": 1.0},
        kl={"coefficient": 0.05},
        optimizer={"learning_rate": 2e-4, "warmup_steps": 5, "schedule": "linear"},
        train={"steps": 60, "eval_every": 20, "minibatches": 2, "log_every": 1},
        eval=EVALUATION,
    )
