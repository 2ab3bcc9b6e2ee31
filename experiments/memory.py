"""What a model remembers of a dialogue: facts told some turns ago, changed since, or never told.

python -m rlhf_jax.main --config=experiments/memory.py
    dialogues in which one to four facts are told, and asked for 1 to 8 turns later, from …
python -m rlhf_jax.main --config=experiments/memory.py:chat
    … a chat model with room for 512 tokens, which was drilled in answering what it was told, from …
python -m rlhf_jax.main --config=experiments/memory.py:base
    … one of the town's text and of the same drills
python -m rlhf_jax.main --config=experiments/memory.py:last
    trains the last reply of each dialogue alone

The first and the last end with 520 held-out questions: eval/memory/known/recall/distance/<turns>,
…/recall/load/<facts>, …/updated, …/resurrected, …/abstained and …/false_memory of values that are
told in training, eval/memory/new/… of values that are not, with 95 % intervals, and
eval/correct/facts, what the model knows of the town. Seeds 0 and 1 of the whole chain, 43 and
54 minutes on one core beside other work:

                   recall 1, 2, 4, 8 turns ago   updated   resurrected   abstained   false memory
    known values      1.00  0.97  0.95  0.98       1.00        0.00         1.00         0.00
                      1.00  0.97  0.98  0.98       1.00        0.00         0.98         0.02
    new values        0.70  0.72  0.61  0.58       0.76        0.04         0.88         0.12
                      0.70  0.58  0.78  0.61       0.78        0.02         0.92         0.08

What users told of themselves is recalled in 1.00 and 0.99 of known values, what they told of others
in 0.95 and 0.98. Of 150 facts of the town 148 and 150 are right, before 150 and 149. These same
questions chose the mixture of the last stage (docs/turns.md). :last has not been measured.
"""

from rlhf_jax.stages import defaults

MUON = {"name": "muon", "b2": 0.99, "warmup_steps": 10, "final_fraction": 0.0}


def get_config(variant="sft"):
    match variant:
        case "base":
            return base()
        case "chat":
            return chat()
        case "sft":
            return sft("all")
        case "last":
            return sft("last")
    raise defaults.no_variant("memory.py", variant, "base, chat, sft, last")


def base():
    return defaults.base(
        "pretrain",
        # So that a value is found by whom it was said of: docs/turns.md.
        model=defaults.model("tiny", max_length=512, short_convolution=8),
        tokenizer={"vocab_size": 2048},
        data={"train": "town/text=1,memory/drill=1", "row_length": 256, "over_long": "split"},
        batch={"rows": 4},
        optimizer=MUON
        | {"learning_rate": 1e-2, "warmup_steps": 20, "schedule": "wsd", "decay_fraction": 0.4},
        train={"steps": 2000, "log_every": 20},
    )


def chat():
    return defaults.base(
        "sft",
        init={"policy": "experiments/memory.py:base"},
        compute={"remat": "none"},
        data={"train": "town=1,memory/drill=1", "row_length": 288, "replay": "town/text[:50%]=0.5"},
        batch={"rows": 8},
        optimizer={
            **{"learning_rate": 3e-3, "b2": 0.99, "warmup_steps": 10},
            **{"schedule": "linear", "final_fraction": 0.0},
        },
        train={"steps": 430, "log_every": 20},
    )


def sft(trained_turns):
    return defaults.base(
        "sft",
        init={"policy": "experiments/memory.py:chat"},
        compute={"remat": "none"},
        data={
            "train": "memory/drill=3,memory/change=2,memory/dialogue=2,town=1",
            "validation": "memory/dialogue",
            "row_length": 384,
            "replay": "town/text[:50%]=1",
            "trained_turns": trained_turns,
        },
        batch={"rows": 4},
        optimizer=MUON | {"learning_rate": 5e-3, "schedule": "linear"},
        train={"steps": 8000, "log_every": 20},
        eval={"source": "memory", "count": 520, "max_new_tokens": 32},
    )
