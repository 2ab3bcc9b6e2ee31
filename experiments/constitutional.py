"""Constitutional AI's first half: a model's answers are criticised, revised, and trained on.

python -m rlhf_jax.main --config=experiments/constitutional.py
    the embedded town's harmful requests and harmless ones that sound like them
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {"warmup_steps": 10, "schedule": "linear", "final_fraction": 0.0}
PRINCIPLES = "safe,correct"


def get_config(variant="town"):
    match variant:
        case "town":
            return written(
                init={"critic": "experiments/constitutional.py:critic"},
                data={"train": "town/harmful,town/borderline", "row_length": 192},
                batch={"rows": 8},
                optimizer={"learning_rate": 1e-3},
                feedback={"count": 300},
                train={"steps": 20},
                eval={"source": "town/harmful", "count": 64},
            )
        case "critic":
            return written(
                data={"train": "town/judged", "row_length": 320},
                batch={"rows": 16},
                optimizer={"learning_rate": 2e-3},
                feedback={"of": "critiques", "count": 2500},
                train={"steps": 80},
                eval={"count": 16},
            )
    raise defaults.no_variant("constitutional.py", variant, "town, critic")


def written(init=None, **sections):
    config = defaults.base(
        "ai_sft",
        init={"policy": "experiments/sft.py", **(init or {})},
        compute={"remat": "none"},
        optimizer=OPTIMIZER,
        feedback={"principles": PRINCIPLES},
    )
    return defaults.lay(config, sections)
