"""DPO on a model's own answers, compared by a judge that is a language model, or by people.

python -m rlhf_jax.main --config=experiments/rlaif.py
    the embedded town: the judge is the fine-tuned model after gold-labelled comparisons (:judge)
… --config=experiments/rlaif.py:people
    the same pairs, labelled by the town's labelers: RLHF at equal labels
… --config=experiments/rlaif.py:hh
    prompts of HH-RLHF, the judge a reward model of its pairs (reward.py:hh)
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {"warmup_steps": 10, "schedule": "linear", "final_fraction": 0.0}


def get_config(variant="town"):
    match variant:
        case "town":
            return town("model")
        case "people":
            return town("people")
        case "judge":
            return defaults.base(
                "ai_sft",
                init={"policy": "experiments/sft.py"},
                compute={"remat": "none"},
                data={"row_length": 256},
                batch={"rows": 16},
                optimizer=OPTIMIZER | {"learning_rate": 2e-3},
                train={"steps": 80},
                feedback={"of": "judging", "count": 2500},
                eval={"count": 16},
            )
        case "hh":
            pairs = "hh_rlhf/helpful"
            return rlaif(
                init={"policy": "experiments/sft.py:hh", "judge": "experiments/reward.py:hh"},
                data={"train": pairs, "validation": pairs, "row_length": 768, "over_long": "drop"},
                batch={"rows": 8},
                optimizer={"learning_rate": 5e-4},
                # Per token: a sum over long, uneven replies mostly learns their length.
                loss={"name": "sigmoid_norm", "beta": 5.0},
                feedback={"max_new_tokens": 96},
                train={"steps": 60},
                eval={"source": pairs, "count": 64},
            )
    raise defaults.no_variant("rlaif.py", variant, "town, people, judge, hh")


def town(judge):
    return rlaif(
        init={"policy": "experiments/sft.py", "judge": "experiments/rlaif.py:judge"},
        compute={"remat": "none"},
        data={"train": "town/prompt", "validation": "town/ordered[:600]", "row_length": 224},
        batch={"rows": 16},
        optimizer={"learning_rate": 3.5e-4},
        loss={"sft_coefficient": 0.3},
        feedback={"judge": judge, "count": 400},
        train={"steps": 20},
        eval={"count": 128},
    )


def rlaif(**sections):
    return defaults.lay(defaults.base("ai_preference", optimizer=OPTIMIZER), sections)
