"""DPO on a model's own answers, compared by a judge that is a language model, or by people.

python -m rlhf_jax.main --config=experiments/rlaif.py
    the embedded town: the judge is the fine-tuned model after gold-labelled comparisons (:judge)
… --config=experiments/rlaif.py:people
    the same pairs, labelled by the town's labelers: RLHF at equal labels
… --config=experiments/rlaif.py:hh
    prompts of HH-RLHF, the judge a reward model of its pairs (reward.py:hh), which agrees with
    people on 0.63 of held-out ones; 3 minutes after its parents' 8. The policy learns to come to
    an end: 0.77 of its answers do, of those before 0.36 (+0.41, +0.27 to +0.55), and they have 33
    tokens in place of 49, at a KL of 6.4 nats. It orders 218 held-out pairs as people do in 0.54
    (0.47 to 0.60), which may be chance: a model of this size says little about anything
… --config=experiments/rlaif.py:own --config.init.policy=/path/to/model \\
        --config.data.train=prompts.jsonl --config.feedback.judge=https://host/v1,model=name
    your model on your prompts: the judge is a server's model, a function of yours (mine.py:better)
    or, with --config.init.judge, a model or reward model; the last 5 % of the prompts are answered
    at the end, and the last 5 % of the labels are held out

python -m rlhf_jax.sweep --config=experiments/rlaif.py --seeds=5 --metric=eval/gold_reward \\
        --grid "feedback.judge=people,model"
    400 labels and 20 steps each, 47 to 106 s a run on a busy 2-core CPU, one judge for all seeds,
    128 held-out prompts, 95 % intervals over seeds and prompts. To the same prompts the policy that
    the judge labelled for gives the better answer by gold, ties ½, in 0.754 (0.705 to 0.801); gold
    reward 0.816 and 0.781, +0.034 (+0.016 to +0.053); win rate over the model both started from
    0.794 and 0.536. It is courtesy, 0.98 and 0.69: of right answers there are −0.020 (−0.045 to
    +0.009), of safe ones −0.009 (−0.012 to −0.006). Yet the judge agrees with gold on 69 % of the
    pairs, people on 94 %: what 400 labels teach this model is manners.
    On the five fresh seeds, with which the sweep ends: 0.717 (0.658 to 0.777); 0.804 and 0.776,
    +0.028 (+0.008 to +0.044), p = 0.011. A run takes 28 to 35 s of CPU, and there are 20
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
        case "own":
            return rlaif(
                init={"policy": ""},
                data=defaults.OWN_DATA,
                batch={"rows": 8},
                optimizer={"learning_rate": 5e-7},
                feedback={"max_new_tokens": 256},
                eval=defaults.OWN_EVALUATION,
            )
    raise defaults.no_variant("rlaif.py", variant, "town, people, judge, hh, own")


def town(judge):
    return rlaif(
        init={"policy": "experiments/sft.py", "judge": "experiments/rlaif.py:judge"},
        compute={"remat": "none"},
        data={"train": "town/prompt", "validation": "town/ordered[:200]", "row_length": 224},
        batch={"rows": 16},
        optimizer={"learning_rate": 3.5e-4},
        loss={"sft_coefficient": 0.3},
        feedback={"judge": judge, "count": 400},
        train={"steps": 20},
        eval={"count": 128},
    )


def rlaif(**sections):
    return defaults.lay(defaults.base("ai_preference", optimizer=OPTIMIZER), sections)
