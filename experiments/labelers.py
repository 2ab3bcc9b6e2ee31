"""Reward models from the votes of people who differ: what they are biased by is taken out, or not.

python -m rlhf_jax.main --config=experiments/labelers.py
    ten people of whom three prefer what is longer (town/biased_votes); their effects are fitted
    from the votes alone and dropped at scoring; judged by the order of gold scores (town/ordered)
… --config=experiments/labelers.py:pooled, :majority, :weighted
    the same votes as they are, by majority, or by Dawid–Skene
… --config=experiments/labelers.py:pairs, :rated, :ratings
    eight people who compare replies (town/votes), or rate them from 1 to 5 at equal cost, which is
    trained on as pairs of what a person rated higher, or as labels
python -m rlhf_jax.labelers town/votes
    who these people are, from their votes
"""

from rlhf_jax.stages import defaults

OPTIMIZER = {
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "schedule": "linear",
    "final_fraction": 0.0,
}


def get_config(variant="nuisance"):
    match variant:
        case "nuisance" | "pooled" | "majority" | "weighted":
            return reward("town/biased_votes", {"labelers": variant})
        case "pairs":
            return reward("town/votes", {})
        case "rated":
            return reward("town/rated", {})
        case "ratings":
            return reward("town/ratings", {}, name="pointwise")
    known = "nuisance, pooled, majority, weighted, pairs, rated, ratings"
    raise defaults.no_variant("labelers.py", variant, known)


def reward(votes, data, name="bradley_terry"):
    config = defaults.base(
        "reward",
        init={"policy": "experiments/sft.py"},
        optimizer=OPTIMIZER,
        normalize={"prompts": 0},
    )
    return defaults.lay(
        config,
        {
            "data": {"train": votes, "validation": "town/ordered", "row_length": 224, **data},
            "batch": {"rows": 16},
            "loss": {"name": name},
            "train": {"steps": 40},
        },
    )
