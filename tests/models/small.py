"""Small models of every kind of attention, position, norm and activation."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import ModelConfig, apply, init

SMALL = ModelConfig(
    vocab_size=61,
    layers=2,
    width=16,
    heads=4,
    kv_heads=4,
    head_dim=4,
    mlp_width=24,
    max_length=96,
)
LEARNED = dataclasses.replace(
    SMALL,
    norm="layer",
    norm_bias=True,
    position="learned",
    activation="gelu_tanh",
    attention_bias=True,
    mlp_bias=True,
)
KINDS = {
    "llama": SMALL,
    "gpt2": LEARNED,
    "grouped-window": dataclasses.replace(
        SMALL, kv_heads=2, sliding_window=5, qk_norm=True, short_convolution=3
    ),
    "experts": dataclasses.replace(SMALL, mlp_width=12, experts=4),
    "multiquery-capped": dataclasses.replace(
        SMALL,
        kv_heads=1,
        attention_softcap=1.0,
        logit_softcap=2.0,
        activation="geglu",
        tied_embeddings=False,
    ),
}


@partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params, tokens: jax.Array, ids: dict | None = None) -> jax.Array:
    return apply(config, params, tokens, **ids or {}).hidden


def noisy(config: ModelConfig):
    """Random numbers for all parameters, norms and biases too, so that none can hide a mistake."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.2, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, shape), jnp.int32)
