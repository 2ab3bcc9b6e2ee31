"""Draws one token per row from logits, by one uniform number."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128


def uniforms(keys: jax.Array, index: jax.Array | int) -> jax.Array:
    """f32 [B] in [0, 1): that of token `index` ([B] or one for all) in each row's key [B]."""
    index = jnp.broadcast_to(index, keys.shape)
    return jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, index)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Logits [B, V] with those of the tokens seen (bool [B, V]) divided by `penalty` if positive
    and multiplied by it if not, as in "CTRL", https://arxiv.org/abs/1909.05858.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: jax.Array,
    uniform: jax.Array | None,
    temperature: jax.Array | float = 1.0,
    allowed: jax.Array | None = None,
    *,
    top_k: jax.Array | int | None = None,
    top_p: jax.Array | float | None = None,
    min_p: jax.Array | float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws from softmax(logits / T) over the tokens kept by inverting its cumulative sum.

    It takes one random number and one pass per row; the Gumbel trick takes a number per token.
    Of equal logits at the edge of what top-k or top-p keeps, the lower token ids stay.

    Args:
        logits: f32 [B, V].
        uniform: f32 [B] in [0, 1), or None for the most likely token.
        temperature: T > 0; for the most likely token it only scales the log-probs.
        allowed: bool [V] or [B, V], what may be drawn; None allows everything.
        top_k: keeps so many of the most likely tokens.
        top_p: keeps the fewest most likely of those whose probability reaches it, in (0, 1].
        min_p: drops tokens less likely than this share of the most likely one's, in [0, 1].

    Returns:
        tokens int32 [B], and their log-probs f32 [B] (nats) under the distribution drawn from:
        at temperature T and normalised over the tokens kept.
    """
    logits = logits / temperature
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    if top_k is not None:
        count = jnp.minimum(top_k, logits.shape[-1]).astype(logits.dtype)
        logits = _keep_likeliest(logits, jnp.ones_like(logits), count)
    if top_p is not None:
        logits = _keep_likeliest(logits, jax.nn.softmax(logits, axis=-1), top_p)
    if min_p is not None:
        least = logits.max(-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    highest = logits.max(-1, keepdims=True)
    masses = jnp.exp(logits - highest)
    tokens = jnp.argmax(logits, axis=-1) if uniform is None else _invert(masses, uniform)
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - highest
    return tokens, chosen[:, 0] - jnp.log(masses.sum(-1))


def _invert(masses: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32 [B]: the token at which the cumulative sum of masses [B, V] passes `uniform` of it all.

    First a block of tokens by the sums of blocks, then a token in it: XLA takes a cumulative sum
    over thousands in several passes.
    """
    blocks = jnp.pad(masses, ((0, 0), (0, -masses.shape[1] % _BLOCK)))
    blocks = blocks.reshape(len(masses), -1, _BLOCK)
    sums = blocks.sum(-1)
    # Sums in parallel may differ by a rounding where there is no mass: never stop there.
    upto = jnp.where(sums > 0, jnp.cumsum(sums, axis=-1), 0)
    target = uniform[:, None] * upto.max(-1, keepdims=True)
    block = jnp.argmax(upto > target, axis=-1)[:, None]
    before = jnp.take_along_axis(upto - sums, block, axis=-1)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    passed = (before + jnp.cumsum(inside, axis=-1) > target) & (inside > 0)
    # Summed in another order a block may fall short of its sum: then the last of it that has mass.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    within = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)
    return block[:, 0] * _BLOCK + within


def _keep_likeliest(logits: jax.Array, weights: jax.Array, target: jax.Array | float) -> jax.Array:
    """Logits [B, V] of the fewest highest whose weights reach `target`, −∞ for all others.

    The lowest to keep is found bit by bit, on the order of floats as that of whole numbers: some
    sums instead of a sort, which is many times slower on every backend.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)

    def mass(least: jax.Array) -> jax.Array:
        return jnp.sum(weights, axis=-1, where=order >= least[:, None])

    def refine(i: jax.Array, lowest: jax.Array) -> jax.Array:
        higher = lowest | (sign >> i)
        return jnp.where(mass(higher) >= target, higher, lowest)

    lowest = jnp.zeros_like(order, shape=len(order))
    lowest = jax.lax.fori_loop(0, 32, lambda i, x: refine(i.astype(jnp.uint32), x), lowest)
    equal = order == lowest[:, None]
    above = mass(lowest + 1)[:, None] + (jnp.cumsum(equal, axis=-1) - 1) * weights
    likeliest = (order > lowest[:, None]) | (equal & (above < target))
    return jnp.where(likeliest, logits, -jnp.inf)
