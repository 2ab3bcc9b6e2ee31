"""Every knob of every stage with its default; a file in experiments/ states only what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.models.config import PRESETS
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def base(stage: str, **sections: dict[str, Any]) -> ConfigDict:
    """The configuration of a stage: what all stages share, with `sections` laid over it.

    A section's value updates the default's fields; a section no default has is added.
    """
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    # What the model starts from: "experiments/sft.py[:variant]", or a finished run's directory.
    config.init = ConfigDict({"policy": ""})
    config.data = ConfigDict(
        {
            # A data set ("town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]") or a JSONL file
            # ("notes.jsonl[:1000]") or one that the package datasets loads ("hf:owner/name");
            # several are mixed by weight: "town=3,notes.jsonl=1".
            "train": "town",
            "validation": "town",  # "": the last 5 % of the files in `train`
            "row_length": 256,  # tokens a packed row
            "over_long": "error",  # records longer than a row; the policies are in data/encode.py
            "max_bad_fraction": 0.0,  # share of bad JSONL lines that are skipped and counted
        }
    )
    if stage not in ("pretrain", "oracle"):
        # Of a Hub model: "" its own, a name in data/chat_formats.py, or a *.jinja file.
        config.data.chat_template = ""
    if stage == "sft":
        config.data.replay = ""  # raw text to mix in, its weights beside those of `train`
    if stage == "reward":
        # bradley_terry on pairs; pointwise on conversations labelled from 0 (bad) to 1 (good).
        config.loss = ConfigDict({"name": "bradley_terry", "centering": 0.0})
        # Scores of what `init.policy` answers to training prompts, kept for their mean and std.
        config.normalize = ConfigDict(
            {
                "prompts": 256,  # drawn from the training records; 0: keep none
                "max_new_tokens": 64,
            }
        )
    config.batch = ConfigDict(
        {
            "rows": 32,  # packed rows an update, over all devices
            "microbatches": 1,  # parts the rows go through one after the other, to save memory
        }
    )
    config.optimizer = fields(OptimizerConfig())
    config.train = ConfigDict(
        {
            "steps": 100,
            "log_every": 10,
            "eval_every": 0,  # steps; 0: only at the end
            "checkpoint_every": 200,  # steps
            "keep_last": 2,  # checkpoints
            "ema_decay": 0.0,  # 0: no moving average; else it is the average that is kept
            "max_skipped": 5,  # updates in a row that are not finite before the run stops
            "tensorboard": True,
            "wandb": "",  # project, to follow the run on Weights & Biases too
        }
    )
    if stage != "pretrain":  # which states its whole model
        # rank = 0 trains all weights: models/lora.py
        config.adapter = ConfigDict(dataclasses.asdict(AdapterConfig()))
        config.compute = ConfigDict(
            {
                "compute_dtype": "float32",
                "remat": "dots",
                "attention": "reference",  # the kernel: models/fused_attention.py
            }
        )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all other devices
    config.eval = ConfigDict({"batch_rows": 64})
    for name, values in sections.items():
        if name not in config:
            config[name] = ConfigDict()
        config[name].update(values)
    return config


# What an on-policy algorithm is, as changes to `on_policy`'s sections.
ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    # https://arxiv.org/abs/1707.06347, as in https://arxiv.org/abs/1909.08593
    "ppo": {
        "advantage": {"name": "gae", "whiten": True},
        "loss": {"name": "ppo", "aggregation": "token_mean"},
        "kl": {"placement": "reward", "estimator": "k1"},
    },
    # https://arxiv.org/abs/2402.03300
    "grpo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "group"},
        "loss": {"name": "ppo", "aggregation": "sequence_mean_token_mean"},
        "kl": {"placement": "loss", "estimator": "k3", "level": "token"},
    },
    # https://arxiv.org/abs/2503.20783
    "dr_grpo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "none"},
        "loss": {"name": "ppo", "aggregation": "constant"},
        "kl": {"placement": "loss", "estimator": "k3", "level": "token"},
    },
    # https://arxiv.org/abs/2503.14476
    "dapo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "group"},
        "loss": {
            "name": "ppo",
            "options": "clip_low=0.2,clip_high=0.28",
            "aggregation": "token_mean",
        },
        "kl": {"placement": "none"},
        "rollout": {"filter_zero_std": True, "resample": 2},
    },
    # https://arxiv.org/abs/2402.14740
    "rloo": {
        "advantage": {"name": "group", "baseline": "leave_one_out", "scale": "none"},
        "loss": {"name": "policy_gradient", "aggregation": "sequence_mean"},
        "kl": {"placement": "reward", "estimator": "k1"},
    },
    # https://doi.org/10.1007/BF00992696
    "reinforce": {
        "advantage": {"name": "group", "baseline": "none", "scale": "none"},
        "loss": {"name": "policy_gradient", "aggregation": "sequence_mean"},
        "kl": {"placement": "reward", "estimator": "k1"},
    },
    # https://arxiv.org/abs/2501.03262
    "reinforce_pp": {
        "advantage": {"name": "reward_to_go", "whiten": True},
        "loss": {"name": "ppo", "aggregation": "token_mean"},
        "kl": {"placement": "reward", "estimator": "k1"},
    },
    # https://arxiv.org/abs/2310.10505
    "remax": {
        "advantage": {"name": "remax"},
        "loss": {"name": "policy_gradient", "aggregation": "sequence_mean"},
        "kl": {"placement": "reward", "estimator": "k1"},
    },
    # https://arxiv.org/abs/2507.18071
    "gspo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "group"},
        "loss": {"name": "gspo", "options": "", "aggregation": "sequence_mean_token_mean"},
        "kl": {"placement": "none"},
    },
    # https://arxiv.org/abs/2506.13585
    "cispo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "group"},
        "loss": {"name": "cispo", "options": "", "aggregation": "token_mean"},
        "kl": {"placement": "none"},
    },
}


def _sampling() -> dict[str, dict[str, Any]]:
    """What all stages share that sample and score answers."""
    return {
        "rollout": {
            "prompts": 64,  # an iteration
            "samples": 1,  # a prompt
            "max_prompt_tokens": 128,  # longer prompts are left out and counted
            "max_new_tokens": 48,  # of an answer, its end included
            "temperature": 1.0,
            "top_k": 0,  # these three would sample from another distribution than is trained,
            "top_p": 1.0,  # and are refused
            "min_p": 0.0,
            "slots": 64,  # answers decoded together
            "missing_eos": "none",  # answers that did not end: "subtract" or "replace" by −penalty
            "missing_eos_penalty": 1.0,
            "truncated": "keep",  # "mask": such answers are not trained on
            "overlong_buffer": 0,  # tokens below max_new_tokens that are punished softly (DAPO)
            "filter_zero_std": False,  # leave out prompts whose answers all score the same
            "resample": 0,  # further batches of prompts to replace those
            "max_staleness": 0,  # updates a sample may be old; 0: any number
        },
        "reward": {
            "scorers": "model=1",  # see rewards/scorers.py
            "normalize": True,  # reward models, by their scores of the reference's answers
            "ensemble": "mean",  # of several init.reward…: mean, min, mean_minus_std
            "ensemble_k": 1.0,
            "pattern": "",  # of the scorer "regex"
            "on_error": "fail",  # of a reward function; "mask": the answer is left out and counted
            "timeout_seconds": 60.0,
        },
    }


def on_policy(algorithm: str, **sections: dict[str, Any]) -> ConfigDict:
    """The configuration of the policy stage for one of `ALGORITHMS`, `sections` laid over it."""
    merged: dict[str, dict[str, Any]] = {
        "data": {"row_length": 256},
        "batch": {"rows": 8},  # rows of a minibatch are a multiple of this
        **_sampling(),
        "kl": {
            "coefficient": 0.05,
            "placement": "reward",  # "reward", "loss" or "none"
            "estimator": "k1",  # k1, k2, k3: losses/shaping.py
            "level": "sequence",  # in the loss: of "sequence" or "token" log-ratios
            "importance": False,  # in the loss: times the ratio, whose gradient then counts too
            "target": 0.0,  # nats a sequence for the adaptive controller; 0: fixed coefficient
            "horizon": 10_000.0,  # sequences
            "exact_rows": 1,  # rows on which the full-vocabulary KL is measured too
        },
        "advantage": {
            "name": "gae",  # gae, reward_to_go, group, remax
            "gamma": 1.0,
            "lam": 0.95,
            "bootstrap": False,  # an answer cut off is worth its last value, not 0
            "baseline": "mean",  # of "group": none, mean, leave_one_out
            "scale": "none",  # of "group": none, group, batch
            "ddof": 1,
            "eps": 1e-4,
            "whiten": False,
        },
        "loss": {
            "name": "ppo",  # losses/policy.py
            "options": "",  # of its own function: "clip_low=0.2,clip_high=0.28"
            "aggregation": "token_mean",
            "entropy_coefficient": 0.0,
            "importance": "none",  # correct the sampler's log-probs: "token" or "sequence"
            "importance_cap": 2.0,
            "importance_mode": "truncate",  # or "mask"
            "ptx_coefficient": 0.0,  # of data.ptx's language-model loss, mixed in
        },
        "train": {"epochs": 1, "minibatches": 1},
        "eval": chat_evaluation(),
    }
    merged["data"]["ptx"] = ""  # raw text whose loss is mixed in, as in InstructGPT
    if ALGORITHMS[algorithm]["advantage"]["name"] == "gae":
        critic = dataclasses.asdict(OptimizerConfig()) | {"value_clip": 0.2}
        merged["critic"] = {k: v for k, v in critic.items() if v is not None}
    for name, values in ALGORITHMS[algorithm].items():
        merged[name] = merged.get(name, {}) | values
    return _laid("policy", merged, sections)


def online_preference(**sections: dict[str, Any]) -> ConfigDict:
    """The configuration of the online_preference stage, `sections` laid over it."""
    return _laid(
        "online_preference",
        {
            "data": {"row_length": 256},
            "batch": {"rows": 8},
            **_sampling(),
            # name: of losses/preference.py; options and sft_coefficient as in experiments/dpo.py
            "loss": {"name": "sigmoid", "beta": 0.1, "options": "", "sft_coefficient": 0.0},
            "train": {"epochs": 1, "minibatches": 1},
            "eval": chat_evaluation(),
        },
        sections,
    )


def best_of_n(**sections: dict[str, Any]) -> ConfigDict:
    """The configuration of the best_of_n stage, `sections` laid over it."""
    return _laid(
        "best_of_n",
        {
            "data": {"row_length": 512},
            **_sampling(),
            "best_of_n": {
                "samples": 64,  # to each held-out prompt, for the curves: a power of 2
                "n": 8,  # to each training prompt, of which the best is trained on
                "prompts": 1000,  # of training
            },
            "eval": chat_evaluation(),
        },
        sections,
    )


def _laid(stage: str, merged: dict[str, dict[str, Any]], sections: Mapping[str, Any]) -> ConfigDict:
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return base(stage, **merged)


def model(preset: str, **changes: Any) -> ConfigDict:
    """A preset's shape, every field open to `--config.model.…`."""
    shape = fields(dataclasses.replace(PRESETS[preset], **changes))
    del shape.unused  # follows from a tokenizer
    return shape


def chat_evaluation(**changes: Any) -> dict[str, Any]:
    """How a chat stage ends: held-out prompts are answered and judged."""
    return {
        "source": "town",  # of held-out prompts: a data set or a JSONL file; "": data.validation
        "count": 256,  # prompts at most
        "max_new_tokens": 64,
        "temperature": 0.0,  # of the answers that are judged; 0: greedy
        "gold": True,  # judged by the town's scorer
        "during": 128,  # prompts sampled at train.eval_every
    } | changes


# Of the experiments' variants "own": a pre-trained model and the user's data.
OWN_DATA = {"train": "", "validation": "", "row_length": 1024, "over_long": "drop"}
OWN_PROMPTS = {"train": "", "validation": "", "row_length": 1024}
OWN_ROLLOUT = {"max_prompt_tokens": 512, "max_new_tokens": 256}
TUNING = {"name": "adamw", "warmup_steps": 10, "schedule": "linear", "final_fraction": 0.0}


def own_evaluation(**changes: Any) -> dict[str, Any]:
    """`chat_evaluation` on what is held out of the user's data, which has no exact scorer."""
    stated = {"source": "", "count": 64, "gold": False} | changes
    return chat_evaluation(**stated) | {"batch_rows": 16}


def fields(value: Any) -> ConfigDict:
    """A dataclass as a ConfigDict; a field that is None can be given a number."""
    return ConfigDict(
        {
            name: config_dict.placeholder(float) if field is None else field
            for name, field in dataclasses.asdict(value).items()
        }
    )
