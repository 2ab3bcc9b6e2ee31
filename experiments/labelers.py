"""Reward models from the votes of people who differ: what they are biased by is taken out, or not.

python -m rlhf_jax.main --config=experiments/labelers.py
    ten people of whom three prefer what is longer (town/biased_votes); their effects are fitted
    from the votes alone and dropped at scoring; judged by the order of gold scores (town/ordered)
… --config=experiments/labelers.py:pooled, :majority, :weighted
    the same votes as they are, by majority, or by Dawid–Skene
… --config=experiments/labelers.py:pairs, :rated, :ratings
    eight people who compare replies (town/votes), or rate them from 1 to 5 at equal cost, which is
    trained on as pairs of what a person rated higher, or as labels

Accuracy against gold order on 1,630 held-out pairs, five seeds of 32 to 115 s each on a busy 2-core
CPU, with 95 % intervals:

python -m rlhf_jax.sweep --config=experiments/labelers.py --seeds=5 \\
        --grid "data.labelers=pooled,nuisance"
    pooled 0.672 (0.649 to 0.694), nuisance 0.723 (0.704 to 0.742): +0.052 (+0.029 to +0.076); on
    five fresh seeds +0.046 (+0.020 to +0.072): it is better
python -m rlhf_jax.sweep --config=experiments/labelers.py:pairs --seeds=5 \\
        --grid "data.train=town/votes,town/rated"
    comparisons 0.719, ratings as pairs 0.708: +0.011 (−0.008 to +0.031, of seeds alone), which may
    be chance
python -m rlhf_jax.sweep --config=experiments/labelers.py:ratings --seeds=5
    the same ratings as labels: 0.639 (0.596 to 0.682), worse than comparisons at the same cost
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
