"""The claims that RLHF is taught with, put to the test by `python -m rlhf_jax.claims`.

python -m rlhf_jax.claims experiments/claims.py
    all ten, 35 minutes on two CPU cores with their parents; docs/claims.md has what came of them
… experiments/claims.py:tuned_answers
    supported: 0.435 of a tuned model's answers are right, of the base model's 0.078, which goes on
    with the prompt in 1.000 of replies, the tuned one in 0.008; 31 to 39 s a run
… experiments/claims.py:rlhf_beats_sft
    supported: PPO's answer is the better one in 0.650 (0.592 to 0.704) at a KL of 1.2; 83 to 100 s
… experiments/claims.py:dpo_matches_rlhf
    supported: DPO's in 0.653, +0.003 (-0.029 to +0.040), at a KL of 1.2; 33 to 47 s
… experiments/claims.py:rewards_are_hacked
    supported: from the best of 8 to the best of 128 the proxy rises by 0.696 (0.621 to 0.747) and
    gold falls by 0.116 (0.096 to 0.139); 44 to 55 s
… experiments/claims.py:best_of_n_suffices
    undecided: the best of 8 wins in 0.636, PPO in 0.650, -0.014 (-0.069 to +0.029). The first runs
    of this arm failed: best_of_n.prompts was 64, too few for a batch; nothing else was changed
… experiments/claims.py:pairs_beat_scores
    undecided: 0.721 of held-out pairs right and 0.659, +0.062 (-0.032 to +0.167); 20 to 25 s
… experiments/claims.py:pretraining_pays
    supported: 0.667 gold, without pre-training 0.415 after as many steps of tuning and 0.578 after
    as many FLOPs, where 0.009 of the facts are right in place of 0.738; 31 to 94 s
… experiments/claims.py:scale_pays
    supported: gold 0.657; of a sixth of the parameters 0.421, of 2 % of the pairs 0.539, of both
    0.298; 16 to 47 s a run
… experiments/claims.py:bias_reaches_the_model
    undecided: 9.1 words an answer and 8.3, +0.76 (+0.21 to +1.38), 6.6 before; 46 to 54 s a run
… experiments/claims.py:masking_pays
    undecided: 0.948 of episodes are right either way, -0.000 (-0.008 to +0.006); 2 to 3 minutes
"""

from rlhf_jax.claims.claim import Arm, Claim, Comparison, Measure
from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import load_config

# A policy and the KL of it are of what it samples, so that is what is judged.
SAMPLED = {"eval.temperature": "1.0"}
FEWER = {"eval.count": "128"}
SHORT = FEWER | {"train.steps": "120"}  # of the 430 of experiments/sft.py
ALONE = {"init.policy": "experiments/claims.py:blank", "data.replay": ""}

SFT = Arm("sft", "experiments/sft.py", SHORT)
ALONE_STEPS = Arm("alone-steps", "experiments/sft.py", SHORT | ALONE)
# Pre-training sees 560 × 8 × 128 tokens, as many as 374 steps of 8 × 192.
ALONE_FLOPS = Arm("alone-flops", "experiments/sft.py", FEWER | ALONE | {"train.steps": "494"})
PPO = Arm("ppo", "experiments/ppo.py", SAMPLED | {"train.eval_every": "0"})
DPO = Arm("dpo", "experiments/dpo.py", SAMPLED)
BEST = Arm(
    "best-of-n",
    "experiments/best_of_n.py",
    FEWER | {"best_of_n.samples": "128", "best_of_n.prompts": "128", "train.steps": "8"},
)
PAIRS = Arm("pairs", "experiments/labelers.py:pairs")
SCORES = Arm("scores", "experiments/labelers.py:ratings")
# Of 16 answers each. The labelers' reward models keep no scale of scores, and ranks need none.
CHOSEN = FEWER | {"best_of_n.samples": "4", "best_of_n.prompts": "400", "reward.normalize": "False"}
POOLED = CHOSEN | {"init.reward": "experiments/labelers.py:pooled"}
BIASED = Arm("biased", "experiments/best_of_n.py", POOLED, seeds_from="reward")
CORRECTED = CHOSEN | {"init.reward": "experiments/labelers.py:nuisance"}
UNBIASED = Arm("unbiased", "experiments/best_of_n.py", CORRECTED, seeds_from="reward")
SHAPE = {"width": 64, "heads": 2, "kv_heads": 2, "mlp_width": 176}  # 0.2 M parameters, not 1.3
SMALL = {"init.policy": "experiments/claims.py:small_sft"}
FEW = {"data.train": "town/pair[:2%]"}
LARGE_FEW = Arm("large-few", "experiments/dpo.py", SAMPLED | FEW)
SMALL_FEW = Arm("small-few", "experiments/dpo.py", SAMPLED | SMALL | FEW)
SMALL_MANY = Arm("small-many", "experiments/dpo.py", SAMPLED | SMALL)
MASKED = Arm("masked", "experiments/tools.py")
UNMASKED = Arm("unmasked", "experiments/tools.py", {"rollout.given": "train"})

CLAIMS = (
    Claim(
        "tuned_answers",
        "A base model completes, a tuned one answers.",
        tests=(
            Comparison(Measure(SFT, "right"), Measure(SFT, "right", True), "superior", 0.2),
            Comparison(Measure(SFT, "continues", True), Measure(SFT, "continues"), "superior", 0.2),
        ),
    ),
    Claim(
        "pretraining_pays",
        "Pre-training and tuning beat instructions alone at equal steps of tuning and at equal "
        "FLOPs, and know facts that are in no instruction.",
        tests=(
            Comparison(Measure(SFT, "gold"), Measure(ALONE_STEPS, "gold"), "superior", 0.02),
            Comparison(Measure(SFT, "gold"), Measure(ALONE_FLOPS, "gold"), "superior", 0.02),
            Comparison(
                Measure(SFT, "eval/correct/facts"),
                Measure(ALONE_FLOPS, "eval/correct/facts"),
                "superior",
                0.1,
            ),
        ),
        beside=(Measure(ALONE_STEPS, "eval/correct/facts"),),
    ),
    Claim(
        "rlhf_beats_sft",
        "Reinforcement learning from human feedback beats supervised fine-tuning.",
        tests=(Comparison(Measure(PPO, "wins"), 0.5, "superior", 0.05),),
        beside=(Measure(PPO, "eval/kl"), Measure(PPO, "right"), Measure(PPO, "right", True)),
    ),
    Claim(
        "dpo_matches_rlhf",
        "DPO matches RLHF, more simply.",
        tests=(Comparison(Measure(DPO, "wins"), Measure(PPO, "wins"), "equivalent", 0.05),),
        conditions=(
            Comparison(Measure(DPO, "eval/kl"), Measure(PPO, "eval/kl"), "equivalent", 0.5),
        ),
        beside=tuple(
            Measure(arm, metric) for metric in ("lines", "seconds", "memory") for arm in (DPO, PPO)
        ),
    ),
    Claim(
        "best_of_n_suffices",
        "The best of 8 samples, at a KL of at most 1.2, comes close to RLHF without training.",
        tests=(
            Comparison(
                Measure(BEST, "eval/best_of_8/win_rate"), Measure(PPO, "wins"), "not inferior", 0.05
            ),
        ),
        beside=(
            Measure(PPO, "eval/kl"),
            *(
                Measure(BEST, f"eval/best_of_{n}/{what}")
                for n in (2, 4, 8, 16, 32, 64)
                for what in ("kl_bound", "win_rate")
            ),
        ),
    ),
    Claim(
        "rewards_are_hacked",
        "From 8 samples to 128 the reward model likes the best one more, and it is worse.",
        tests=(
            Comparison(
                Measure(BEST, "eval/best_of_128/proxy"),
                Measure(BEST, "eval/best_of_8/proxy"),
                "superior",
            ),
            Comparison(
                Measure(BEST, "eval/best_of_8/gold"),
                Measure(BEST, "eval/best_of_128/gold"),
                "superior",
                0.02,
            ),
        ),
        beside=(Measure(BEST, "eval/best_of_n/peak_n"), Measure(BEST, "eval/best_of_n/peak_gold")),
    ),
    Claim(
        "pairs_beat_scores",
        "A reward model learns more from comparisons than from as costly ratings.",
        tests=(
            Comparison(
                Measure(PAIRS, "eval/accuracy"), Measure(SCORES, "eval/accuracy"), "superior", 0.02
            ),
        ),
    ),
    Claim(
        "bias_reaches_the_model",
        "Where three of ten labelers prefer what is longer, a model tuned to a reward model of "
        "their votes answers at greater length than if their bias is taken out of the same votes.",
        tests=(Comparison(Measure(BIASED, "words"), Measure(UNBIASED, "words"), "superior", 0.5),),
        beside=(Measure(BIASED, "words", True), Measure(BIASED, "gold"), Measure(UNBIASED, "gold")),
    ),
    Claim(
        "scale_pays",
        "A larger model and more labels each give a better aligned model.",
        tests=(
            Comparison(Measure(DPO, "gold"), Measure(SMALL_MANY, "gold"), "superior", 0.02),
            Comparison(Measure(DPO, "gold"), Measure(LARGE_FEW, "gold"), "superior", 0.02),
        ),
        beside=(
            Measure(SMALL_FEW, "gold"),
            *(Measure(arm, "seconds") for arm in (SMALL_FEW, SMALL_MANY, LARGE_FEW, DPO)),
        ),
    ),
    Claim(
        "masking_pays",
        "Tool calling is learnt better where what the tools answered has weight 0 than where it is "
        "trained like what the policy drew.",
        tests=(Comparison(Measure(MASKED, "gold"), Measure(UNMASKED, "gold"), "superior"),),
        beside=(
            *(Measure(MASKED, metric) for metric in ("eval/pass^8", "eval/kl")),
            *(Measure(UNMASKED, metric) for metric in ("eval/pass^8", "eval/kl")),
        ),
    ),
)


def get_config(variant="all"):
    """Models that arms start from; the claims themselves are no config."""
    match variant:
        case "blank":  # a model of random weights, with the tokenizer of pretrain.py
            config = load_config("experiments/pretrain.py")
            untrained = {"learning_rate": 1e-12, "warmup_steps": 0}
            return defaults.lay(config, {"train": {"steps": 1}, "optimizer": untrained})
        case "small":
            config = load_config("experiments/pretrain.py")
            return defaults.lay(config, {"model": SHAPE})
        case "small_sft":
            config = load_config("experiments/sft.py")
            return defaults.lay(config, {"init": {"policy": "experiments/claims.py:small"}})
    if variant == "all" or variant in {claim.name for claim in CLAIMS}:
        raise UserError(
            f"claims are many runs: python -m rlhf_jax.claims experiments/claims.py:{variant}"
        )
    raise defaults.no_variant("claims.py", variant, "blank, small, small_sft")
