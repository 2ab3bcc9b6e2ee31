"""Pre-training from raw text; times are of a 2-core CPU.

python -m rlhf_jax.main --config=experiments/pretrain.py
    the embedded town: 80 seconds to 0.38 bits a byte
python -m rlhf_jax.main --config=experiments/pretrain.py:sums
    the same, and the town's sums and differences as a schoolbook states them; see sft.py:sums
python -m rlhf_jax.main --config=experiments/pretrain.py:fables
    TinyFabulist fables: 22 minutes on one slow core to 1.12 bits a byte
python -m rlhf_jax.main --config=experiments/pretrain.py:hh
    fables and HH-RLHF dialogues: 6 minutes to 1.73 bits a byte
python -m rlhf_jax.main --config=experiments/pretrain.py:imdb
    film reviews
python -m rlhf_jax.main --config=experiments/pretrain.py:shakespeare_char
    the data, split, tokens and context of nanoGPT's CPU recipe, to its loss of 1.88 in less time:
    50 seconds to 1.86 nats a character
python -m rlhf_jax.main --config=experiments/pretrain.py:shakespeare_char_best
    the same data and split, as far as we get in the time nanoGPT takes: 100 seconds to 1.68
"""

from rlhf_jax.stages import defaults

MUON = {
    "name": "muon",
    "learning_rate": 1e-2,
    "warmup_steps": 10,
    "schedule": "wsd",
    "decay_fraction": 0.4,
    "final_fraction": 0.0,
}


def get_config(variant="town"):
    match variant:
        case "town":
            return town()
        case "sums":
            return sums()
        case "fables":
            return real("tinyfabulist", "tinyfabulist", steps=400)
        case "hh":
            return real("tinyfabulist=1,hh_rlhf/helpful=2", "hh_rlhf/helpful", steps=200)
        case "imdb":
            return real("imdb", "imdb[:50%]", steps=110)
        case "shakespeare_char":
            return shakespeare_char()
        case "shakespeare_char_best":
            return shakespeare_char_best()
    raise defaults.no_variant(
        "pretrain.py",
        variant,
        "town, sums, fables, hh, imdb, shakespeare_char, shakespeare_char_best",
    )


def town():
    return defaults.base(
        "pretrain",
        tokenizer={"vocab_size": 2048},  # nearly every word of the town is a token
        data={"row_length": 128, "over_long": "split"},
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


def sums():
    """The town's raw text and, of every four rows, one of a schoolbook's sums.

    Numbers up to 99 are tokens, and queries and keys are made of the tokens before them too, so
    that a model finds the sum that it has read by both of its numbers.
    """
    learnt = {
        "model": defaults.model("tiny", short_convolution=4),
        "tokenizer": {"digits": 2},
        "data": {"train": "town=3,town/table=1"},
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
    }
    return defaults.lay(town(), learnt)


def real(train, validation, steps):
    """English text: a larger vocabulary and context."""
    return defaults.base(
        "pretrain",
        model=defaults.model("tiny", max_length=1024),
        tokenizer={"vocab_size": 4096},
        data={
            "train": train,
            "validation": validation,
            "row_length": 512,
            "over_long": "split",
        },
        batch={"rows": 16},
        optimizer=MUON,
        train={"steps": steps},
    )


def shakespeare_char():
    """nanoGPT's loss, 1.88 nats a character, from its data and context in less time."""
    return defaults.base(
        "pretrain",
        tokenizer={"kind": "chars"},
        data={
            "train": "tiny_shakespeare",
            "validation": "tiny_shakespeare",
            "layout": "windows",
            "row_length": 64,
        },
        batch={"rows": 20},
        optimizer=MUON | {"learning_rate": 2e-2},
        train={"steps": 220, "log_every": 20, "tensorboard": False},
    )


def shakespeare_char_best():
    """How far the time of nanoGPT's recipe goes: twice the context, more steps."""
    config = shakespeare_char()
    config.data.row_length = 128
    config.batch.rows = 16
    config.optimizer.decay_fraction = 0.6
    config.train.steps = 420
    return config
