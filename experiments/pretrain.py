"""Pre-training from raw text, on a 2-core CPU.

    python -m rlhf_jax.main --config=experiments/pretrain.py            the embedded town
    python -m rlhf_jax.main --config=experiments/pretrain.py:fables     TinyFabulist fables
    python -m rlhf_jax.main --config=experiments/pretrain.py:shakespeare_char
        nanoGPT's CPU recipe: its data, split, tokens, model, optimizer, batch and steps
    python -m rlhf_jax.main --config=experiments/pretrain.py:shakespeare_char_best
        the same data and split, our recipe, under a million parameters
"""

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults


def get_config(variant="town"):
    match variant:
        case "town":
            return town()
        case "shakespeare_char":
            return shakespeare_char()
    raise UserError(f"experiments/pretrain.py has no variant {variant!r}")


def town():
    return defaults.base(
        "pretrain",
        model=defaults.model("tiny"),
        tokenizer={"kind": "bpe", "vocab_size": 1024},
        data={"layout": "documents", "row_length": 128, "over_long": "split"},
        batch={"rows": 64},
        optimizer={
            "name": "muon",
            "learning_rate": 1e-2,
            "warmup_steps": 10,
            "schedule": "wsd",
            "decay_fraction": 0.4,
            "final_fraction": 0.0,
        },
        train={"steps": 250},
        loss={"z_loss": 0.0},
    )


def shakespeare_char():
    return defaults.base(
        "pretrain",
        model=defaults.model("shakespeare"),
        tokenizer={"kind": "chars"},
        data={
            "train": "tiny_shakespeare",
            "validation": "tiny_shakespeare",
            "layout": "windows",
            "row_length": 64,
        },
        batch={"rows": 12},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-3,
            "b2": 0.99,
            "weight_decay": 0.1,
            "warmup_steps": 100,
            "schedule": "cosine",
            "final_fraction": 0.1,
        },
        train={"steps": 2000, "log_every": 50, "checkpoint_every": 1000, "tensorboard": False},
        loss={"z_loss": 0.0},
        eval={"batch_rows": 128},
    )
