from rlhf_jax.stages import defaults

ADAMW = {
    "name": "adamw",
    "learning_rate": 3e-3,
    "b2": 0.99,
    "warmup_steps": 10,
    "schedule": "linear",
    "final_fraction": 0.0,
}


def get_config(variant="sft"):
    match variant:
        case "base":
            return base()
        case "sft":
            return sft("town_tools/dialogue")
        case "direct":
            return sft("town_tools/direct")
    raise defaults.no_variant("tools.py", variant, "base, sft, direct")


def base():
    return defaults.base(
        "pretrain",
        tokenizer={"vocab_size": 2048},
        data={
            "train": "town/text=3,town_tools/dialogue=1",
            "row_length": 128,
            "over_long": "split",
        },
        batch={"rows": 8},
        optimizer={
            "learning_rate": 3e-3,
            "b2": 0.99,
            "warmup_steps": 20,
            "schedule": "wsd",
            "decay_fraction": 0.4,
            "final_fraction": 0.0,
        },
        train={"steps": 560, "log_every": 20},
    )


def sft(data):
    return defaults.base(
        "sft",
        init={"policy": "experiments/tools.py:base"},
        compute={"remat": "none"},
        data={"train": data, "validation": data, "row_length": 192},
        batch={"rows": 8},
        optimizer=ADAMW,
        train={"steps": 430, "log_every": 20},
        eval={"source": "town_tools"},
    )
