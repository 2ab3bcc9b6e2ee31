"""One decoder-only transformer as pure functions of a config and a nested dict of arrays."""

from rlhf_jax.models.config import PRESETS, ModelConfig
from rlhf_jax.models.lora import param_count
from rlhf_jax.models.transformer import (
    Output,
    apply,
    check_tokens,
    decoding_params,
    init,
    init_cache,
    logits,
    scores,
    unembedding,
)

__all__ = [
    "PRESETS",
    "ModelConfig",
    "Output",
    "apply",
    "check_tokens",
    "decoding_params",
    "init",
    "init_cache",
    "logits",
    "param_count",
    "scores",
    "unembedding",
]
