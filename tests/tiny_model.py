"""A model that compiles in a second, with queries in groups."""

from __future__ import annotations

from rlhf_jax.models import ModelConfig

GROUPED = ModelConfig(
    vocab_size=13,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    max_length=64,
    init_std=0.5,  # far from uniform
)
