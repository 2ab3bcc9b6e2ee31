"""Every knob of every stage with its default; a file in experiments/ states only what differs.

A stage has the fields that it reads and no others: `checks.check` refuses the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import PRESETS
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.training.optimizer import OptimizerConfig

STAGES = (
    *("pretrain", "sft", "reward", "preference"),
    *("policy", "online_preference", "best_of_n", "oracle"),
)
SAMPLING = ("policy", "online_preference", "best_of_n")  # which sample and score answers


def module_of(stage: str) -> str:
    """The module whose `run` is the stage."""
    return "rlhf_jax.oracle.stage" if stage == "oracle" else f"rlhf_jax.stages.{stage}"


def fields_of(stage: str) -> ConfigDict:
    """A config with every field of one of `STAGES`."""
    match stage:
        case "policy":
            return on_policy("ppo")  # the one with a critic
        case "online_preference":
            return online_preference()
        case "best_of_n":
            return best_of_n()
    return base(stage)


def leaves(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def base(stage: str, **sections: dict[str, Any]) -> ConfigDict:
    """The configuration of a stage: what all stages share, with `sections` laid over it.

    A section's value updates the default's fields; a section no default has is added.
    """
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    if stage == "oracle":
        config.oracle = ConfigDict(
            {
                "rows": "",  # names of oracle/oracle_rows.py, separated by commas; none: all
                "table_steps": 350,
                "transformer_steps": 60,
                "preference_steps": 600,
                "threads": 2,  # rows at a time
            }
        )
        return _lay(config, sections)
    if stage != "pretrain":
        # What the model starts from: "experiments/sft.py[:variant]", or a finished run's directory.
        config.init = ConfigDict({"policy": ""})
    if stage in SAMPLING:
        config.init.reward = ""  # of the scorer "model"; further members are reward_1, reward_2, …
    if stage == "preference":
        config.init.reward = ""  # a model of the same pairs, whose accuracy is shown beside
    config.data = ConfigDict(
        {
            # A data set ("town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]") or a JSONL file
            # ("notes.jsonl[:1000]") or one that the package datasets loads ("hf:owner/name");
            # several are mixed by weight: "town=3,notes.jsonl=1".
            "train": "town",
            "validation": "town",  # "": the last 5 % of the files in `train`
            "row_length": 256,  # tokens a packed row
            "max_bad_fraction": 0.0,  # share of bad JSONL lines that are skipped and counted
            "columns": "",  # of files where names differ: "prompt:question,completion:answer"
        }
    )
    if stage not in SAMPLING:
        config.data.over_long = "error"  # records longer than a row: data/encode.py's policies
    if stage == "pretrain":
        config.data.layout = "documents"  # or "windows" of a stream of text
        if "model" not in sections:  # a preset's shape, which is whole
            config.model = model("tiny")
        config.tokenizer = ConfigDict({"kind": "bpe", "vocab_size": 2048})  # or "chars": all
        config.loss = ConfigDict({"z_loss": 0.0})
    else:
        # Of a Hub model: "" its own, a name in hub/chat_formats.py, or a *.jinja file.
        config.data.chat_template = ""
    if stage == "sft":
        config.data.replay = ""  # raw text to mix in, its weights beside those of `train`
        # Earlier replies that the chat template strips of their thoughts, or doesn't end: "leave"
        # them untrained, or "expand": each is the last reply of a record of its own.
        config.data.stripped_turns = "leave"
        config.loss = ConfigDict({"label_smoothing": 0.0, "z_loss": 0.0})
    if stage == "preference":
        config.loss = ConfigDict(PREFERENCE_LOSS)
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
            # Written in the background; a step waits while its state is copied to the host.
            "checkpoint_every": 200,  # steps
            "checkpoint_minutes": 5.0,  # since the one before; 0: by steps alone
            "keep_last": 2,  # checkpoints
            "max_skipped": 5,  # updates in a row that are not finite before the run stops
            "tensorboard": True,
            "wandb": "",  # project, to follow the run on Weights & Biases too
        }
    )
    if stage not in ("policy", "online_preference"):
        config.train.ema_decay = 0.0  # 0: no moving average; else it is the average that is kept
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
    config.eval = ConfigDict()
    if stage not in ("pretrain", "reward"):
        config.eval.update(chat_evaluation())
        if stage != "sft":
            config.eval.during = 128  # prompts sampled at train.eval_every
    return _lay(config, sections)


def _lay(config: ConfigDict, sections: Mapping[str, Any]) -> ConfigDict:
    for name, values in sections.items():
        if name not in config:
            config[name] = ConfigDict()
        config[name].update(values)
    return config


# name: any of losses/preference.py; options: of its own function, as "gamma=1.6,divergence=js";
# sft_coefficient: of the SFT term added to any of them (rpo, cpo, orpo have their own: leave it 0).
PREFERENCE_LOSS = {"name": "sigmoid", "beta": 0.1, "options": "", "sft_coefficient": 0.0}


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


def _sampling(stage: str) -> dict[str, dict[str, Any]]:
    """What the stages share that sample and score answers."""
    rollout: dict[str, Any] = {
        "max_prompt_tokens": 128,  # longer prompts are left out and counted
        "max_new_tokens": 48,  # of an answer, its end included
        # How answers to training prompts are drawn. The policy stage trains the whole distribution
        # and refuses all but the temperature; best_of_n's curves are of temperature 1 whatever
        # stands here, since their bounds of KL are.
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "slots": 64,  # answers decoded together
    }
    if stage != "best_of_n":  # which counts only answers that ended, and says itself how many
        rollout |= {
            "prompts": 64,  # an iteration
            "samples": 1,  # a prompt
            "missing_eos": "none",  # answers that did not end: "subtract" or "replace" by −penalty
            "missing_eos_penalty": 1.0,
            "truncated": "keep",  # "mask": such answers are not trained on
            "overlong_buffer": 0,  # tokens below max_new_tokens that are punished softly (DAPO)
            "filter_zero_std": False,  # leave out prompts whose answers all score the same
            "resample": 0,  # further batches of prompts to replace those
        }
    if stage == "policy":
        rollout["max_staleness"] = 0  # updates a sample may be old; 0: any number
    return {
        "rollout": rollout,
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
    """The configuration of the policy stage for one of `ALGORITHMS`, `sections` laid over it.

    Raises:
      UserError: there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"there is no algorithm {algorithm!r}; there are: {', '.join(ALGORITHMS)}")
    merged: dict[str, dict[str, Any]] = {
        "data": {"row_length": 256},
        "batch": {"rows": 8},  # rows of a minibatch are a multiple of this
        **_sampling("policy"),
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
            **_sampling("online_preference"),
            "loss": dict(PREFERENCE_LOSS),
            "train": {"epochs": 1, "minibatches": 1},
        },
        sections,
    )


def best_of_n(**sections: dict[str, Any]) -> ConfigDict:
    """The configuration of the best_of_n stage, `sections` laid over it."""
    return _laid(
        "best_of_n",
        {
            "data": {"row_length": 512},
            **_sampling("best_of_n"),
            "best_of_n": {
                "samples": 64,  # to each held-out prompt, for the curves: a power of 2
                "n": 8,  # to each training prompt, of which the best is trained on
                "prompts": 1000,  # of training
            },
        },
        sections,
    )


def _laid(stage: str, merged: dict[str, dict[str, Any]], sections: Mapping[str, Any]) -> ConfigDict:
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return base(stage, **merged)


def model(preset: str, **changes: Any) -> ConfigDict:
    """A preset's shape, every field open to `--config.model.…` but what the tokenizer decides."""
    shape = fields(dataclasses.replace(PRESETS[preset], **changes))
    del shape["vocab_size"], shape["unused"]
    return shape


def chat_evaluation(**changes: Any) -> dict[str, Any]:
    """How a chat stage ends: held-out prompts are answered and judged."""
    return {
        "source": "town",  # of held-out prompts: a data set or a JSONL file; "": data.validation
        "count": 256,  # prompts at most
        "max_new_tokens": 64,
        "temperature": 0.0,  # of the answers that are judged; 0: greedy
    } | changes


# Of the experiments' variants "own": a pre-trained model and the user's data.
OWN_DATA = {"train": "", "validation": "", "row_length": 1024, "over_long": "drop"}
OWN_PROMPTS = {"train": "", "validation": "", "row_length": 1024}
OWN_ROLLOUT = {"max_prompt_tokens": 512, "max_new_tokens": 256}
TUNING = {"name": "adamw", "warmup_steps": 10, "schedule": "linear", "final_fraction": 0.0}


def own_evaluation(**changes: Any) -> dict[str, Any]:
    """`chat_evaluation` on what is held out of the user's data."""
    stated = {"source": "", "count": 64} | changes
    return chat_evaluation(**stated)


def fields(value: Any) -> ConfigDict:
    """A dataclass as a ConfigDict; a field that is None can be given a number."""
    return ConfigDict(
        {
            name: config_dict.placeholder(float) if field is None else field
            for name, field in dataclasses.asdict(value).items()
        }
    )
