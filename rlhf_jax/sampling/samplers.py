"""One token from logits, by one uniform number a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def uniforms(keys: jax.Array, index: jax.Array | int) -> jax.Array:
    """f32 [B] in [0, 1): that of token `index` in the stream of each row's key [B]."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(keys)


def sample(
    logits: jax.Array,
    uniform: jax.Array | None,
    temperature: jax.Array | float = 1.0,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws from softmax(logits / T) over the allowed tokens by inverting its cumulative sum.

    One random number and one pass a row, where the Gumbel trick needs as many as there are tokens.

    Args:
        logits: f32 [B, V].
        uniform: f32 [B] in [0, 1), or None for the most likely token.
        temperature: T > 0; for the most likely token it only scales the log-probs.
        allowed: bool [V] or [B, V], what may be drawn; None allows everything.

    Returns:
        tokens int32 [B], and their log-probs f32 [B] (nats) under the distribution drawn from:
        at temperature T and normalised over the allowed tokens alone.
    """
    logits = logits / temperature
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    if uniform is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        probs = jnp.exp(logprobs)
        # Sums in parallel may dip by a rounding where a token has no mass: never stop there.
        below = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
        tokens = jnp.argmax(below > uniform[:, None] * below.max(-1, keepdims=True), axis=-1)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
