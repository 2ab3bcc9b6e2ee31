"""The decoder-only transformer, in Flax Linen, behind pure functions of a nested dict of arrays.

Layers are stacked on axis 0 of their parameters and scanned. Linen does not leave this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.attention import (
    attend,
    attend_cached,
    attention_bias,
    cached_attention_bias,
)
from rlhf_jax.models.config import ModelConfig

Params = Mapping[str, Any]
Cache = dict[str, jax.Array]


class Output(NamedTuple):
    hidden: jax.Array  # [B, T, width], after the final norm, in the compute dtype
    cache: Cache | None


class _Context(NamedTuple):
    """What every layer needs and none changes."""

    bias: jax.Array  # f32 [B or 1, T, T] among the new tokens
    cached_bias: jax.Array | None  # f32 [B, T, S] against cached ones
    rope: tuple[jax.Array, jax.Array] | None  # cos, sin: f32 [B or 1, 1, T, head_dim/2]


def _rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[:, None, :, None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of heads x [B, H, T, d]: "RoFormer", https://arxiv.org/abs/2104.09864."""
    cos, sin = rope
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _rms(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class _Norm(nn.Module):
    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kind == "layer":
            x = x.astype(jnp.float32)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = _rms(x, self.config.norm_eps) * scale
        if self.kind == "layer" and self.config.norm_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.config.compute_dtype)


class _Dense(nn.Module):
    config: ModelConfig
    features: int
    bias: bool
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.compute_dtype
        std = config.init_std
        if self.residual:
            std = 0.0 if config.zero_init_residual else std / np.sqrt(2 * config.layers)
        kernel = self.param("kernel", nn.initializers.normal(std), (x.shape[-1], self.features))
        # Products over a flat token axis: XLA's CPU backend would transpose the gradient of a
        # [B, T, width] one by a slow copy.
        y = x.reshape(-1, x.shape[-1]) @ kernel.astype(dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(dtype)
        return y.reshape(*x.shape[:-1], self.features)


def _dense(config, features, name, *, bias, residual=False):
    return _Dense(config, features, bias, residual, name=name)


class _Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cached: Cache | None, context: _Context):
        config = self.config

        def heads(name: str, count: int) -> jax.Array:
            y = _dense(config, count * config.head_dim, name, bias=config.attention_bias)(x)
            return y.reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)

        query, key = heads("query", config.heads), heads("key", config.kv_heads)
        value = heads("value", config.kv_heads)
        if config.qk_norm:
            query = _Norm(config, "rms", name="query_norm")(query)
            key = _Norm(config, "rms", name="key_norm")(key)
        if context.rope is not None:
            query, key = _rotate(query, context.rope), _rotate(key, context.rope)
        query = (query * config.head_dim**-0.5).astype(value.dtype)
        query = query.reshape(query.shape[0], config.kv_heads, -1, *query.shape[2:])
        key = key.astype(value.dtype)
        softcap = config.attention_softcap
        if cached is None:
            mixed = attend(query, key, value, context.bias, softcap=softcap)
        else:
            past = (cached["keys"], cached["values"], context.cached_bias)
            mixed = attend_cached(query, key, value, context.bias, *past, softcap=softcap)
        mixed = mixed.reshape(x.shape[0], config.heads, *mixed.shape[3:]).swapaxes(1, 2)
        mixed = mixed.reshape(*x.shape[:2], -1)
        out = _dense(config, config.width, "out", bias=config.attention_bias, residual=True)
        return out(mixed), {"keys": key, "values": value}


class _Mlp(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config

        def up(name: str) -> jax.Array:
            return _dense(config, config.mlp_width, name, bias=config.mlp_bias)(x)

        match config.activation:
            case "swiglu":
                y = nn.silu(up("gate")) * up("up")
            case "geglu":
                y = nn.gelu(up("gate"), approximate=True) * up("up")
            case _:
                y = nn.gelu(up("up"), approximate=config.activation == "gelu_tanh")
        return _dense(config, config.width, "down", bias=config.mlp_bias, residual=True)(y)


class _Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cached: Cache | None, context: _Context):
        config = self.config
        normed = _Norm(config, config.norm, name="attention_norm")(x)
        mixed, new = _Attention(config, name="attention")(normed, cached, context)
        x = x + mixed
        x = x + _Mlp(config, name="mlp")(_Norm(config, config.norm, name="mlp_norm")(x))
        return x, new


class _Transformer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, cached, context: _Context):
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        normal = nn.initializers.normal
        x = nn.Embed(
            config.vocab_size, config.width, embedding_init=normal(config.init_std), name="embed"
        )(tokens)
        if config.position == "learned":
            table = nn.Embed(
                config.max_length,
                config.width,
                embedding_init=normal(config.init_std),
                name="position_embed",
            )
            x = x + table(positions)
        block = _Block
        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = nn.remat(
                _Block,
                policy=policy if config.remat == "dots" else None,
                prevent_cse=config.unroll > 1,
            )
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
            unroll=min(config.unroll, config.layers),
        )
        x, new = layers(config, name="layers")(x.astype(dtype), cached, context)
        return _Norm(config, config.norm, name="final_norm")(x), new


@partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters: a nested dict, those of the layers stacked on axis 0.

    Kernels are [(layers,) in, out] and normal with `init_std`, the two that write to the residual
    stream scaled by 1/√(2·layers) as in GPT-2 (or zero); the score head has std 1/√(width + 1).

    Raises:
        UserError: the config does not fit together.
    """
    config.validate()
    body_key, head_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1), jnp.int32)
    context = _context(config, tokens)
    params = dict(_Transformer(config).init(body_key, tokens, tokens, None, context)["params"])
    if config.head == "scalar":
        kernel = jax.random.normal(head_key, (config.width, 1)) / np.sqrt(config.width + 1)
        params["score_head"] = {"kernel": kernel}
    elif not config.tied_embeddings:
        kernel = jax.random.normal(head_key, (config.width, config.vocab_size)) * config.init_std
        params["lm_head"] = {"kernel": kernel}
    return params


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    cache: Cache | None = None,
    prompt_lengths: jax.Array | None = None,
) -> Output:
    """Hidden states of tokens, each seeing what `attention_bias` lets it see.

    Args:
        tokens: int32 [B, T]; ids are not checked here, see `check_tokens`.
        positions: int32 [B, T], by default 0, 1, … along the row; packed rows need them.
        segment_ids: int32 [B, T], the documents of packed rows, 0 for padding.
        branch_ids: int32 [B, T], 0 for a segment's shared prompt, 1, 2, … for its branches.
        cache: from `init_cache` or an earlier call. With `prompt_lengths`, tokens are prompts
            padded on the right and fill the cache from its start; without, they follow what is
            cached, every row at its own position. The caller sees to it that they fit.
        prompt_lengths: int32 [B], tokens of each prompt.

    Returns:
        Output(hidden [B, T, width] after the final norm, the cache after these tokens or None).

    Raises:
        ValueError: arguments that do not go together.
        UserError: rows longer than the cache or the learned positions.
    """
    if segment_ids is not None and positions is None:
        raise ValueError("segment_ids need positions, which restart in each document")
    if branch_ids is not None and segment_ids is None:
        raise ValueError("branch_ids need segment_ids")
    if cache is not None and positions is not None:
        raise ValueError("positions follow from the cache: give one or the other")
    if prompt_lengths is not None and cache is None:
        raise ValueError("prompt_lengths need a cache to fill")
    length = tokens.shape[1]
    if config.position == "learned" and length > config.max_length:
        raise UserError(f"{length} tokens a row, but model.max_length = {config.max_length}")
    cached = None
    if cache is not None and prompt_lengths is None:
        positions = cache["lengths"][:, None] + jnp.arange(length)
        cached = {"keys": cache["keys"], "values": cache["values"]}
    elif positions is None:
        positions = jnp.arange(length)[None]
    context = _context(config, positions, segment_ids, branch_ids, cache if cached else None)
    hidden, new = _Transformer(config).apply({"params": params}, tokens, positions, cached, context)
    if cache is not None:
        cache = _extend(cache, new, positions if cached else None, prompt_lengths)
    return Output(hidden, cache)


def _context(
    config: ModelConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    cache: Cache | None = None,
) -> _Context:
    window = config.sliding_window
    bias = attention_bias(positions, segment_ids, branch_ids, window)
    cached_bias = rope = None
    if cache is not None:
        slots = cache["keys"].shape[3]
        cached_bias = cached_attention_bias(positions, cache["lengths"], slots, window)
    if config.position == "rope":
        rope = _rope_table(config, positions)
    return _Context(bias, cached_bias, rope)


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache: keys and values [layers, batch, kv_heads, length, head_dim], lengths [batch].

    Slot s of a row holds its position s. Heads stand before slots because the products of a
    decoding step then read them in order.
    """
    shape = (config.layers, batch, config.kv_heads, length, config.head_dim)
    return {
        "keys": jnp.zeros(shape, config.compute_dtype),
        "values": jnp.zeros(shape, config.compute_dtype),
        "lengths": jnp.zeros(batch, jnp.int32),
    }


def _extend(
    cache: Cache, new: Cache, positions: jax.Array | None, prompt_lengths: jax.Array | None
) -> Cache:
    """Writes new keys and values [layers, B, kv_heads, T, head_dim] of every layer at once."""
    length, slots = new["keys"].shape[3], cache["keys"].shape[3]
    if length > slots:
        raise UserError(f"{length} tokens a row do not fit a cache of {slots}")
    if prompt_lengths is not None:
        written = {name: cache[name].at[:, :, :, :length].set(new[name]) for name in new}
        return {**written, "lengths": prompt_lengths.astype(jnp.int32)}
    rows = jnp.arange(positions.shape[0])[:, None]
    written = {
        name: cache[name].at[:, rows, :, positions].set(new[name].transpose(1, 3, 0, 2, 4))
        for name in new
    }
    return {**written, "lengths": cache["lengths"] + length}


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The f32 [vocab_size, width] matrix from hidden states to logits."""
    if config.tied_embeddings:
        return params["embed"]["embedding"]
    if config.head == "scalar":
        raise ValueError("a scalar model with untied embeddings has no language-model head")
    return params["lm_head"]["kernel"].T


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 [..., vocab_size] logits of hidden [..., width], soft-capped if the config says so."""
    table = unembedding(config, params)
    values = jnp.einsum("...d,vd->...v", hidden.astype(jnp.float32), table)
    cap = config.logit_softcap
    return values if cap is None else cap * jnp.tanh(values / cap)


def scores(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 [...] scores of hidden [..., width]: the scalar head of reward and value models."""
    if config.head != "scalar":
        raise ValueError("scores need a model with head = 'scalar'")
    return hidden.astype(jnp.float32) @ params["score_head"]["kernel"][:, 0]


def param_count(params: Params) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def check_tokens(
    config: ModelConfig, tokens: np.ndarray, positions: np.ndarray | None = None
) -> None:
    """Checks on the host what compiled code would bend silently.

    Raises:
        UserError: a token id outside the vocabulary or a position outside a learned table.
    """
    limits = [("token id", np.asarray(tokens), config.vocab_size, "vocab_size")]
    if positions is not None and config.position == "learned":
        limits.append(("position", np.asarray(positions), config.max_length, "max_length"))
    for what, values, limit, field in limits:
        wrong = np.argwhere((values < 0) | (values >= limit))
        if len(wrong):
            place = tuple(int(i) for i in wrong[0])
            raise UserError(
                f"{what} {values[place]} at {list(place)} is outside 0..{limit - 1}: "
                f"model.{field} = {limit}"
            )
