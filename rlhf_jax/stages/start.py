"""The model that a stage starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_jax.config import Config
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.hub.chat_formats import chat_template
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.fused_attention import check_attention
from rlhf_jax.training.mesh import check_width, mesh_of
from rlhf_jax.training.saved_model import Model, as_trainable, load_model


def load_start(config: Config, directory: Path) -> Model:
    """The model a stage starts from, with the adapter it is to train if there is one."""
    model = load_model(directory, mesh=mesh_of(config), **dataclasses.asdict(config.compute))
    check_width(config, model.config.width)
    tokenizer = with_chat_template(model.tokenizer, config.data.chat_template)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    check_kernel(config, model.config)
    return as_trainable(model, config.adapter, config.seed)


def check_kernel(config: Config, shape: ModelConfig) -> None:
    """Compares a fused attention kernel with the reference on rows as the run has them.

    Raises:
        UserError: they disagree, or there is no such kernel here.
    """
    if shape.attention != "reference":
        error = check_attention(shape, config.data.row_length)
        print(f"attention: {shape.attention}, within {error:.0e} of the reference", flush=True)


def with_chat_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer under the chat template of that name or file; "": its own.

    Raises:
        UserError: there is no such template, it does not fit, or the format of chats is our own.
    """
    return tokenizer.with_template(chat_template(name)) if name else tokenizer
