"""Personas that last: dialogues of 2 to 8 turns in which the user presses a persona to give up.

python -m rlhf_jax.main --config=experiments/persona.py
    GRPO: the user is a rule, which rewards each line, from …
python -m rlhf_jax.main --config=experiments/persona.py:sft
    … dialogues with right replies, from experiments/memory.py:chat
python -m rlhf_jax.main --config=experiments/persona.py:dpo
    DPO in place of GRPO, on the first line of a dialogue that is not consistent with those before
python -m rlhf_jax.main --config=experiments/persona.py:real
    Synthetic-Persona-Chat: the persona is the system turn

The first three end with 200 held-out dialogues, in which the model says every line, about personas
that no training has: eval/persona/prompt_to_line and line_to_line, …/rule/turn/<n>,
…/asked_after/<turns> and …/leak, with 95 % intervals, and eval/pass^k of eight sampled dialogues.
One seed of each, 9, 3 and 4 minutes on one core beside other work:

            prompt to line   line to line   rule   asked after 8 turns   facts   pass^8
    :sft        0.994            0.98       1.00          0.99            0.99     0.31
    GRPO        0.989            0.98       1.00          0.99            0.99     0.42
    :dpo        0.848            0.96       1.00          0.70            0.98     0.15

Nothing leaks into chats without a persona. :real, one seed, 5 minutes on one slow core after 22 of
its parent, pretrain.py:fables: of 82 held-out dialogues the loss goes from 5.25 to 2.36 nats per
token (−3.00 to −2.77), all of 64 replies come to an end (before, 0.80) and have 13 tokens. Whether
they keep to the persona is not measured: there is no exact judge of it.
"""

from rlhf_jax.stages import defaults

MUON = {"name": "muon", "b2": 0.99, "warmup_steps": 10, "schedule": "linear"}
ENVIRONMENT = {"file": "rlhf_jax/tasks/town/persona.py:PersonaEnvironment"}
EVALUATION = {"source": "persona", "count": 200, "max_new_tokens": 384}


def get_config(variant="grpo"):
    match variant:
        case "sft":
            return sft()
        case "dpo":
            return dpo()
        case "grpo":
            return grpo()
        case "real":
            return real()
    raise defaults.no_variant("persona.py", variant, "sft, dpo, grpo, real")


def sft():
    return defaults.base(
        "sft",
        init={"policy": "experiments/memory.py:chat"},
        compute={"remat": "none"},
        data={
            "train": "persona/dialogue=3,town=1",
            "validation": "persona/dialogue",
            "row_length": 384,
            "replay": "town/text[:50%]=1",
        },
        batch={"rows": 8},
        optimizer={"learning_rate": 5e-3, **MUON},
        train={"steps": 450, "log_every": 20},
        environment=ENVIRONMENT,
        eval=EVALUATION,
    )


def dpo():
    return defaults.base(
        "preference",
        init={"policy": "experiments/persona.py:sft"},
        compute={"remat": "none"},
        data={"train": "persona/pair", "validation": "persona/pair", "row_length": 384},
        batch={"rows": 8},
        optimizer={"learning_rate": 3.5e-4, "warmup_steps": 10, "schedule": "linear"},
        loss={"sft_coefficient": 0.3},
        train={"steps": 40},
        environment=ENVIRONMENT,
        eval=EVALUATION,
    )


def grpo():
    return defaults.on_policy(
        "grpo",
        init={"policy": "experiments/persona.py:sft"},
        environment=ENVIRONMENT,
        data={"train": "persona", "validation": "persona", "row_length": 512},
        rollout={"prompts": 16, "samples": 4, "max_prompt_tokens": 64, "max_new_tokens": 384},
        reward={"scorers": "environment=1"},
        kl={"placement": "none"},
        batch={"rows": 4},
        optimizer={"learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 3},
        train={"steps": 12, "minibatches": 2, "log_every": 1, "eval_every": 6},
        eval=EVALUATION,
    )


def real():
    return defaults.base(
        "sft",
        init={"policy": "experiments/pretrain.py:fables"},
        data={
            "train": "persona_chat",
            "validation": "persona_chat",
            "row_length": 768,
            "over_long": "drop",
        },
        batch={"rows": 8},
        optimizer={"learning_rate": 5e-3, **MUON},
        train={"steps": 80},
        eval={"source": "persona_chat", "count": 64},
    )
