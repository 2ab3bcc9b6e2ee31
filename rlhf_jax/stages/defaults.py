"""Every knob of every stage with its default; a file in experiments/ states only what differs."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.models.config import PRESETS
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
            # A data set ("town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]") or a JSONL file;
            # several are mixed by weight: "town=3,notes.jsonl=1".
            "train": "town",
            "validation": "town",
            "row_length": 256,  # tokens a packed row
            "over_long": "error",  # records longer than a row; the policies are in data/encode.py
            "max_bad_fraction": 0.0,  # share of bad JSONL lines that are skipped and counted
        }
    )
    if stage == "sft":
        config.data.replay = ""  # raw text to mix in, its weights beside those of `train`
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
        config.compute = ConfigDict({"compute_dtype": "float32", "remat": "dots"})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all other devices
    config.eval = ConfigDict({"batch_rows": 64})
    for name, values in sections.items():
        if name not in config:
            config[name] = ConfigDict()
        config[name].update(values)
    return config


def model(preset: str, **changes: Any) -> ConfigDict:
    """A preset's shape, every field open to `--config.model.…`."""
    return fields(dataclasses.replace(PRESETS[preset], **changes))


def chat_evaluation(**changes: Any) -> dict[str, Any]:
    """How a chat stage ends: held-out prompts are answered and judged."""
    return {
        "source": "town",  # of held-out prompts: a data set or a JSONL file
        "count": 256,  # prompts at most
        "max_new_tokens": 64,
        "temperature": 0.0,  # of the answers that are judged; 0: greedy
        "gold": True,  # judged by the town's scorer
    } | changes


def fields(value: Any) -> ConfigDict:
    """A dataclass as a ConfigDict; a field that is None can be given a number."""
    return ConfigDict(
        {
            name: config_dict.placeholder(float) if field is None else field
            for name, field in dataclasses.asdict(value).items()
        }
    )
