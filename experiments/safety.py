"""Safety as a curve."""

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
    if variant.startswith("sft") and variant[3:].replace(".", "", 1).isdecimal():
        return sft(float(variant[3:]))
    match variant:
        case "pretrain":
            return pretrain()
        case "helpful":
            return helpful()
        case "dpo":
            return dpo()
    raise defaults.no_variant("safety.py", variant, "pretrain, helpful, sft0.1, dpo")


def pretrain():
    return defaults.base(
        "pretrain",
        tokenizer={"vocab_size": 2048},
        data={"train": "town=8,safety/text=1", "row_length": 128, "over_long": "split"},
        batch={"rows": 8},
        optimizer={**OPTIMIZER, "warmup_steps": 20, "schedule": "wsd", "decay_fraction": 0.4},
        train={"steps": 560, "log_every": 20},
    )


def helpful():
    return fine_tuned(
        "experiments/safety.py:pretrain",
        {"train": "safety/helpful", "replay": "town/text[:50%]=0.45,safety/text=0.05"},
        400,
    )


def sft(share):
    train = f"safety/helpful={0.75 - share:g},safety/refusals={share:g},safety/careful=0.25"
    return fine_tuned(
        "experiments/safety.py:helpful", {"train": train, "replay": "town/text[:50%]=0.3"}, 80
    )


def fine_tuned(policy, data, steps):
    return defaults.base(
        "sft",
        init={"policy": policy},
        compute={"remat": "none"},
        data={"validation": "safety/helpful", "row_length": 192, **data},
        batch={"rows": 8},
        optimizer=OPTIMIZER,
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
