"""Direct preference optimisation of a fine-tuned model; times are of a 2-core CPU.

python -m rlhf_jax.main --config=experiments/dpo.py
    the embedded town: 1 minute after its parents' 3; gold win rate over SFT 0.81 (0.75 to 0.85)
python -m rlhf_jax.main --config=experiments/dpo.py:hh
    HH-RLHF, helpful: 11 minutes, parents and all; accuracy on held-out pairs 0.56 (0.49 to 0.62),
    of the reward model beside it 0.63 (0.56 to 0.69)
python -m rlhf_jax.main --config=experiments/dpo.py:own --config.init.policy=/path/to/model \\
        --config.data.train=pairs.jsonl
    your model on your pairs, of which the last 5 % are held out; LoRA, --config.adapter.rank=16,
    wants about ten times the rate: --config.optimizer.learning_rate=5e-6
… --config.loss.name=ipo --config.loss.beta=0.05
    another loss of the family
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {
    "learning_rate": 2e-4,
    "warmup_steps": 10,
    "schedule": "linear",
    "final_fraction": 0.0,
}


def get_config(variant="town"):
    match variant:
        case "town":
            return dpo(
                init={"policy": "experiments/sft.py"},
                compute={"remat": "none"},
                data={"row_length": 224},
                batch={"rows": 16},
                optimizer={"learning_rate": 3.5e-4},
                loss={"sft_coefficient": 0.3},
                train={"steps": 64},
            )
        case "hh":
            pairs = "hh_rlhf/helpful"
            return dpo(
                init={"policy": "experiments/sft.py:hh", "reward": "experiments/reward.py:hh"},
                data={"train": pairs, "validation": pairs, "row_length": 768, "over_long": "drop"},
                batch={"rows": 8},
                optimizer={"learning_rate": 5e-4},
                # Per token: a sum over long, uneven replies mostly learns their length.
                loss={"name": "sigmoid_norm", "beta": 5.0},
                train={"steps": 60},
                eval={"source": pairs, "count": 64},
            )
        case "own":
            return dpo(
                init={"policy": ""},
                data=defaults.OWN_DATA,
                batch={"rows": 8},
                optimizer={"learning_rate": 5e-7},
                eval=defaults.OWN_EVALUATION,
            )
    raise defaults.no_variant("dpo.py", variant, "town, hh, own")


def dpo(**sections):
    return defaults.lay(defaults.base("preference", optimizer=OPTIMIZER), sections)
