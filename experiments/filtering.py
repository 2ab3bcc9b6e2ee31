"""Fine-tuning on answers of which half are spoilt, or on the half of them that filters keep.

python -m rlhf_jax.main --config=experiments/filtering.py
    the town's demonstrations, half of them with a defect (town/spoilt), as they are

python -m rlhf_jax.filter --data=town/spoilt --finished --repetition=0.3 --perplexity=..62% \\
        --model=runs/filtering --out=filtered
    keeps 5,493 of 12,000, by rules and by the perplexity of the model above, which was trained on
    all of them; 80 % of what is kept has no defect (`meta` of kept.jsonl), of all 50 %
python -m rlhf_jax.sweep --config=experiments/filtering.py --seeds=5 --metric=eval/gold_reward \\
        --config.train.steps=40 --grid "data.train=town/spoilt,filtered/kept.jsonl"
    40 steps each, 30 to 129 s a run on a busy 2-core CPU, 96 held-out prompts, 95 % intervals: gold
    reward 0.511 on all, 0.597 on what is kept, +0.086 (+0.046 to +0.126), p = 0.004: it is better;
    the better answer by gold to the same prompt, ties ½, in 0.610 (0.572 to 0.646); facts right
    0.42 and 0.64. On the five fresh seeds, with which the sweep ends: 0.535 and 0.591, +0.056
    (+0.034 to +0.079), p < 0.001; 0.604 (0.568 to 0.639); facts right 0.46 and 0.58. A run takes 23
    to 27 s of CPU, and there are 20
"""

from rlhf_jax.stages import defaults


def get_config(variant="all"):
    if variant != "all":
        raise defaults.no_variant("filtering.py", variant, "all")
    return defaults.base(
        "sft",
        init={"policy": "experiments/pretrain.py"},
        compute={"remat": "none"},
        data={"train": "town/spoilt", "row_length": 192, "replay": "town/text[:50%]=0.5"},
        batch={"rows": 8},
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "b2": 0.99,
            "warmup_steps": 10,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
        train={"steps": 80, "log_every": 20},
        eval={"count": 96},
    )
