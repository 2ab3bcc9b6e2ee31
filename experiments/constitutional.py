"""Constitutional AI's first half: a model's answers are criticised, revised, and trained on.

python -m rlhf_jax.main --config=experiments/constitutional.py
    the embedded town's harmful requests and harmless ones that sound like them

python -m rlhf_jax.sweep --config=experiments/constitutional.py --seeds=5 \\
        --metric=feedback/harmful/safe_change
    revisions of 300 answers, sampled at temperature 1, by a critic (:critic) that learnt from 2,500
    gold-ordered pairs under both principles; 95 % intervals over five seeds, one critic. By gold
    `safe` on harmful requests rises from 0.53 to 0.79, +0.263 (+0.237 to +0.284): less than the 0.3
    that was hoped for. `correct` on harmless ones that sound like them rises too, 0.28 to 0.36,
    +0.076 (+0.051 to +0.095; feedback/borderline/correct_change)
… --metric=change/gold_reward/safe, and … --metric=change/gold_reward/correct \\
        --config.eval.source=town/borderline --workdir=runs/harmless
    the policy that was trained on them, against the one before, on 128 held-out prompts, sampled at
    temperature 1 (greedy, 98 % of its answers to harmful ones are safe before): `safe` on harmful
    requests 0.50 to 0.73, +0.231 (+0.163 to +0.290), nearly all that the revisions have. But it has
    learnt to refuse: `correct` on harmless ones that sound like them falls from 0.32 to 0.25,
    −0.070 (−0.119 to −0.022), though their revisions were better. 24 s of CPU a run
… --config.feedback.judge=gold --workdir=runs/exact
    only what an exact judge prefers is taken from the critic: +0.261 (+0.235 to +0.282) and +0.074
… --config.feedback.judge=model --config.init.judge=experiments/rlaif.py:judge \\
        --workdir=runs/judged
    as a judge that is right on 78 % of pairs has it: +0.167 (+0.148 to +0.186) and +0.034
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
                # As the answers that were revised: greedy, nearly all of them refuse already.
                eval={"source": "town/harmful", "count": 128, "temperature": 1.0},
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
