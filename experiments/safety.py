"""Safety as a curve: harmful prompts refused against harmless ones, seen, unseen and wrapped.

python -m rlhf_jax.main --config=experiments/safety.py
    raw text → a model that helps → one that was shown refusals (:sft0.1, of 10 % of its rows, or
    any other share) → DPO on requests good and bad. Of 60 held-out prompts of each kind, one seed:

        refused           harmful seen, unseen, wrapped   harmless seen, unseen, wrapped   facts
        :helpful                   0.02   0.22   0.27              0.15   0.18   0.18      0.92
        :sft0.1                    1.00   1.00   1.00              0.37   0.77   0.77      0.91
        :dpo                       1.00   1.00   0.97              0.18   0.78   0.38      0.88
        :limited                   1.00   1.00   0.95              0.00   0.57   0.05      0.91

python -m rlhf_jax.sweep --config=experiments/safety.py --seeds=3 …
    as docs/safety.md has it, four shares of refusals and two β: above the curve of fine-tuned
    models by +0.23 to +0.59 on wrapped harm and by −0.01 to +0.62 on kinds that training has, each
    more than chance in four of eight cells, and in none on those that it never has, −0.06 to +0.17
python -m rlhf_jax.main --config=experiments/safety.py:careful
    shows abstention, privacy and rumours too, from the raw text on. One seed: of private facts 0.10
    are told in place of 0.85, where nobody knows 0.97 of the answers say so in place of none, and
    known facts are answered in 0.82 in place of 0.85 (docs/safety.md)
python -m rlhf_jax.main --config=experiments/safety.py:limited
    GRPO for a judge that likes every refusal, under a limit of 5 % on those that nothing calls for:
    3.7 to 4.3 % in the last 20 of 60 iterations, five seeds; above the curve of fine-tuned models
    by +0.84 to +0.97 on kinds that training has and on wrapped ones, and by +0.02 to +0.08 on those
    that it never has, more than chance from three of four starts
"""

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
        share = float(variant.removeprefix("sft"))
        mixed = f"safety/helpful={1 - share:g},safety/refusals={share:g}"
        return sft("helpful", mixed, steps=120, learning_rate=2e-3)
    match variant:
        case "pretrain":
            return pretrain()
        case "helpful":
            return sft("pretrain", "safety/helpful", steps=400)
        case "base":
            return base()
        case "careful":
            return careful()
        case "dpo":
            return dpo()
        case "limited":
            return limited()
    known = "pretrain, base, helpful, careful, sft0.1 (any share), dpo, limited"
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


def base():
    """The same text, read by a model that knows better of whom it has read: docs/safety.md."""
    better = {
        "model": defaults.model("tiny", short_convolution=4),
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
        "train": {"steps": 1200},
    }
    return defaults.lay(pretrain(), better)


def careful():
    mixed = "safety/helpful=0.92,safety/refusals=0.04,safety/careful=0.04"
    config = sft("base", mixed, steps=1200, learning_rate=5e-3)
    return defaults.lay(config, {"optimizer": {"name": "muon"}})


def sft(parent, train, steps, learning_rate=3e-3):
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
        data={
            "train": "safety/requests=1,town/pair=1",
            "validation": "safety/requests",
            "row_length": 224,
        },
        batch={"rows": 16},
        optimizer={**OPTIMIZER, "learning_rate": 3.5e-4, "b2": 0.999},
        loss={"sft_coefficient": 0.3},
        train={"steps": 48},
        eval=EVALUATION,
    )


def limited():
    """A judge that likes every refusal, and a limit on those that nothing calls for."""
    return defaults.on_policy(
        "dr_grpo",
        init={"policy": "experiments/safety.py:sft0.1"},
        data={"train": "safety/asked", "validation": "safety/asked", "row_length": 320},
        batch={"rows": 4},
        rollout={"prompts": 16, "samples": 8, "max_prompt_tokens": 64, "max_new_tokens": 40},
        reward={"scorers": "regex=1", "pattern": r"\bI (can't|won't) (help|do)\b"},
        lagrange={"cost": "over_refusal", "limit": 0.05, "rate": 1.0, "damping": 30.0},
        kl={"coefficient": 0.05},
        optimizer={"learning_rate": 2e-4, "warmup_steps": 5, "schedule": "constant"},
        train={"steps": 60, "eval_every": 20, "minibatches": 2, "log_every": 1},
        eval=EVALUATION,
    )
