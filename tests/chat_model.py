"""A chat model of a few thousand parameters, as a finished run of the SFT stage leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.training.saved_model import Model, save_model


def make_chat_model(directory: Path, seed: int = 0, parent: Path | None = None) -> Model:
    """Random weights of that seed, saved into the directory; `parent` is its policy's run."""
    tokenizer = train_bpe(["How are you? Fine, thank you. Who is it? A friend."], 280)
    sizes = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=64, init_std=0.5, **sizes)
    model = Model(config, init(config, jax.random.key(seed)), tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    save_model(directory, model)
    summary = {"stage": "sft", "status": "done", "config_hash": "", "wall_seconds": 0.0}
    summary |= {"parents": {"policy": str(parent)} if parent else {}, "metrics": {}}
    (directory / "summary.json").write_text(json.dumps(summary))
    return model
