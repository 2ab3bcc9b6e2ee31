"""A reward model from preference pairs, on the body of a fine-tuned model; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/reward.py
    the embedded town's labelers
… --config=experiments/reward.py:member1, :member2
    the same with other seeds: with the first one, an ensemble
python -m rlhf_jax.main --config=experiments/reward.py:hh
    HH-RLHF, helpful: 1 minute after its parents' 8; accuracy on held-out pairs 0.63 (0.56 to 0.69)
python -m rlhf_jax.main --config=experiments/reward.py:imdb
    a classifier of a review's sentiment from its beginning, of reviews no policy has seen
python -m rlhf_jax.main --config=experiments/reward.py:own --config.init.policy=/path/to/model \\
        --config.data.train=pairs.jsonl
    from your model and your pairs, of which the last 5 % are held out; of replies with a label each
    with --config.loss.name=pointwise; LoRA, --config.adapter.rank=16, wants about ten times the
    rate: --config.optimizer.learning_rate=1e-4
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "schedule": "linear",
    "final_fraction": 0.0,
}


def get_config(variant="town"):
    match variant:
        case "town":
            return town(seed=0)
        case "member1":
            return town(seed=1)
        case "member2":
            return town(seed=2)
        case "hh":
            return reward(
                "experiments/sft.py:hh",
                data={
                    "train": "hh_rlhf/helpful",
                    "validation": "hh_rlhf/helpful",
                    "row_length": 768,
                    "over_long": "drop",
                },
                batch={"rows": 8},
                train={"steps": 60},
            )
        case "imdb":
            return reward(
                "experiments/sft.py:imdb",
                data={"train": "imdb/labelled", "validation": "imdb/labelled", "row_length": 512},
                batch={"rows": 16},
                loss={"name": "pointwise"},
                train={"steps": 50},
            )
        case "own":
            return reward(
                "",
                data=defaults.OWN_DATA,
                batch={"rows": 8},
                optimizer={"learning_rate": 1e-5},
            )
    raise defaults.no_variant("reward.py", variant, "town, member1, member2, hh, imdb, own")


def town(seed):
    config = reward(
        "experiments/sft.py",
        data={"row_length": 224},
        batch={"rows": 32},
        train={"steps": 100},
    )
    config.seed = seed
    return config


def reward(policy, **sections):
    config = defaults.base("reward", init={"policy": policy}, optimizer=OPTIMIZER)
    return defaults.lay(config, sections)
