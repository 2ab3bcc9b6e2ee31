"""The decoder-only transformer, in Flax Linen, behind pure functions of a nested dict of arrays.

Layers are stacked on axis 0 of their parameters and scanned. Linen does not leave this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.attention import attend_cached, cached_attention_bias, write_cached
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.fused_attention import attend_by, visibility
from rlhf_jax.models.sharding import (
    Shard,
    gather,
    gather_layer,
    has_shards,
    take_rows,
    without_fsdp,
)

Params = Mapping[str, Any]
Cache = dict[str, Any]
QUERY_KEY_VALUE = ("query", "key", "value")
GATE_UP = ("gate", "up")
KeysValues = tuple[jax.Array, jax.Array]  # [B, kv_heads, slots, head_dim] each


class Output(NamedTuple):
    hidden: jax.Array  # [B, T, width], after the final norm, in the compute dtype
    cache: Cache | None


class _Context(NamedTuple):
    """What every layer of a kind reads and none changes."""

    bias: Any  # from `visibility`, or for a cache f32 [B, T, slots]
    rope: tuple[jax.Array, jax.Array] | None  # cos, sin: f32 [B or 1, T, 1, rotary_dim/2]
    positions: jax.Array  # int32 [B or 1, T]
    before: jax.Array | None = None  # [B, T, width], from `_convolve`


def rope_frequencies(config: ModelConfig, *, windowed: bool = False) -> tuple[np.ndarray, float]:
    """(radians per position [rotary_dim/2], factor of cos and sin) of RoPE: θ^(−2i/d).

    "linear" divides all by rope_factor. "llama3" divides those that turn less than rope_low times
    within rope_original_length tokens, keeps those that turn more than rope_high times, and blends
    in between, in the number of turns. "yarn" does so in the dimension's index, and stretches cos
    and sin: "YaRN", https://arxiv.org/abs/2309.00071.

    Args:
        windowed: the layer has a sliding window, and may have an unscaled θ of its own.
    """
    local = config.rope_local_theta if windowed else None
    theta, dim = local or config.rope_theta, config.rotary_dim
    plain = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if local or config.rope_scaling == "none":
        return plain, 1.0
    divided = plain / config.rope_factor
    if config.rope_scaling == "linear":
        return divided, 1.0
    length, low, high = config.rope_original_length, config.rope_low, config.rope_high
    assert length is not None  # `validate`
    if config.rope_scaling == "llama3":
        turns = length * plain / (2 * np.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        return share * plain + (1 - share) * divided, 1.0

    def index(turns: float) -> float:
        """Returns the index of the dimension that turns so often within the length."""
        return dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    first, last = max(np.floor(index(high)), 0), min(np.ceil(index(low)), dim - 1)
    ramp = (np.arange(dim // 2) - first) / ((last - first) or 1e-3)
    share = 1 - np.clip(ramp, 0, 1)
    growth = 0.1 * float(np.log(max(config.rope_factor, 1)))
    factor = config.rope_attention_factor or growth + 1
    return share * plain + (1 - share) * divided, factor


def _rope_table(
    config: ModelConfig, positions: jax.Array, length: int, windowed: bool
) -> tuple[jax.Array, jax.Array]:
    """Looks up cos and sin at positions [B or 1, T] below `length`; beyond it they are NaN.

    Without a table XLA would compute the sine of an angle again in every layer and for every head.
    """
    frequencies, factor = rope_frequencies(config, windowed=windowed)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies.astype(np.float32)
    at = partial(jnp.take, indices=positions, axis=0, mode="fill", fill_value=jnp.nan)
    cos, sin = at(factor * jnp.cos(angles)), at(factor * jnp.sin(angles))
    return cos[:, :, None], sin[:, :, None]


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of the first dimensions of heads x [B, T, H, d]; the others stay.

    "RoFormer", https://arxiv.org/abs/2104.09864.
    """
    cos, sin = rope
    left, right, rest = jnp.split(
        x.astype(jnp.float32), (cos.shape[-1], 2 * cos.shape[-1]), axis=-1
    )
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


class _Norm(nn.Module):
    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plus_one = self.config.norm_plus_one
        start = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        y = x * rms * (1 + scale if plus_one else scale)
        if self.kind == "layer" and self.config.norm_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.config.compute_dtype)


class _Dense(nn.Module):
    config: ModelConfig
    features: int
    bias: bool
    residual: bool = False  # writes to the residual stream

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.compute_dtype
        std = config.init_std
        if self.residual:
            std = std / np.sqrt(2 * config.layers)
        if self.is_initializing():
            self.param("kernel", nn.initializers.normal(std), (x.shape[-1], self.features))
        # Products over a flat token axis: XLA's CPU backend would transpose the gradient of a
        # [B, T, width] one by a slow copy.
        y = lora.product(x.reshape(-1, x.shape[-1]), self.variables["params"], dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(dtype)
        return y.reshape(*x.shape[:-1], self.features)


def _products(
    module: nn.Module, x: jax.Array, sizes: Mapping[str, int], bias: bool
) -> dict[str, jax.Array]:
    """Multiplies x with each of the module's kernels of these names: products [..., size].

    It is one product for all if `decoding_params` has laid the kernels side by side.
    """
    config = module.config
    joined = "_".join(sizes)
    if len(sizes) > 1 and joined in module.variables.get("params", {}):
        y = _Dense(config, sum(sizes.values()), bias, name=joined)(x)
        return dict(zip(sizes, jnp.split(y, np.cumsum([*sizes.values()])[:-1], -1), strict=True))
    return {name: _Dense(config, size, bias, name=name)(x) for name, size in sizes.items()}


def _of_one_input(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Groups of attention's three products whose factors are the same vectors."""
    if config.short_convolution:
        return QUERY_KEY_VALUE[:2], QUERY_KEY_VALUE[2:]
    return (QUERY_KEY_VALUE,)


class _Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, with_before: jax.Array, context: _Context, cached: KeysValues | None
    ):
        """Makes values of x, queries and keys of `with_before`, both [B, T, width]."""
        config, bias = self.config, self.config.attention_bias
        counts = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}
        products: dict[str, jax.Array] = {}
        for names in _of_one_input(config):
            sizes = {name: counts[name] * config.head_dim for name in names}
            products |= _products(self, x if "value" in names else with_before, sizes, bias)

        def heads(name: str, count: int, norm: bool = False) -> jax.Array:
            y = products[name]
            if not (norm and config.qk_norm_whole):
                y = y.reshape(*x.shape[:2], count, config.head_dim)
            if norm:
                y = _Norm(config, "rms", name=f"{name}_norm")(y)
            return y.reshape(*x.shape[:2], count, config.head_dim)

        query = heads("query", config.heads, config.qk_norm)
        key = heads("key", config.kv_heads, config.qk_norm)
        value = heads("value", config.kv_heads)
        if context.rope is not None:
            query, key = _rotate(query, context.rope), _rotate(key, context.rope)
        query = query * (config.query_scale or config.head_dim**-0.5)
        query, key, value = (y.astype(x.dtype).swapaxes(1, 2) for y in (query, key, value))
        query = query.reshape(query.shape[0], config.kv_heads, -1, *query.shape[2:])
        new = key, value
        if cached is None:
            mixed = attend_by(config, query, *new, context.bias)
        else:
            key = write_cached(cached[0], key, context.positions)
            value = write_cached(cached[1], value, context.positions)
            # Without a barrier XLA writes a row once per reader, into copies of the cache.
            new = key, value = jax.lax.optimization_barrier((key, value))
            softcap = config.attention_softcap
            mixed = attend_cached(query, key, value, context.bias, softcap=softcap)
        mixed = mixed.reshape(len(x), config.heads, -1, config.head_dim).swapaxes(1, 2)
        mixed = mixed.reshape(*x.shape[:2], -1)
        bias = bias and config.attention_out_bias
        return _Dense(config, config.width, bias, residual=True, name="out")(mixed), new


class _Mlp(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        names = GATE_UP if config.activation in ("swiglu", "geglu") else GATE_UP[1:]
        up = _products(self, x, dict.fromkeys(names, config.mlp_width), config.mlp_bias)
        match config.activation:
            case "swiglu":
                y = nn.silu(up["gate"]) * up["up"]
            case "geglu":
                y = nn.gelu(up["gate"], approximate=True) * up["up"]
            case _:
                y = nn.gelu(up["up"], approximate=config.activation == "gelu_tanh")
        return _Dense(config, config.width, config.mlp_bias, residual=True, name="down")(y)


class _Experts(nn.Module):
    """MLPs from which a router chooses a few for each token, in float32:

        Σ over the experts_per_token largest p_e of p_e · mlp_e(x),  p = softmax(x · router)

    With `expert_renormalize` the p_e are divided by their sum. Every expert computes every token,
    and those not chosen have weight 0: no token is dropped, and none depends on the others of its
    batch. The router is trained by the task's loss alone; no loss that balances experts is added.

    "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538; softmax before the
    choice as in "Mixtral of Experts", https://arxiv.org/abs/2401.04088.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, mlp = self.config, _Mlp(self.config, parent=None)
        tokens = x.reshape(-1, x.shape[-1])
        exact = dataclasses.replace(config, compute_dtype="float32")
        with jax.default_matmul_precision("highest"):  # a rounded product may choose another
            router = _Dense(exact, config.experts, bias=False, name="router")
            shares = nn.softmax(router(tokens.astype(jnp.float32)))
        largest, chosen = jax.lax.top_k(shares, config.experts_per_token)
        if config.expert_renormalize:
            largest = largest / largest.sum(axis=-1, keepdims=True)
        weights = (largest[..., None] * nn.one_hot(chosen, config.experts)).sum(axis=1)  # [N, E]

        def start(key: jax.Array) -> Params:
            keys = jax.random.split(key, config.experts)
            return jax.vmap(lambda key: mlp.init(key, tokens)["params"])(keys)

        def expert(params: Params, weight: jax.Array) -> jax.Array:
            params = gather_layer(params, config.compute_dtype)
            return weight[:, None] * cast(jax.Array, mlp.apply({"params": params}, tokens))

        if config.remat != "none":  # otherwise the backward pass keeps what all experts computed
            expert = jax.checkpoint(expert, prevent_cse=False)
        if self.is_initializing():
            self.param("experts", start)
        y, _ = jax.lax.scan(
            lambda y, each: (y + expert(*each), None),
            jnp.zeros(tokens.shape, jnp.float32),
            (self.variables["params"]["experts"], weights.T),
        )
        return y.astype(x.dtype).reshape(x.shape)


class _Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cached: KeysValues | None = None):
        config = self.config

        def norm(name: str, x: jax.Array, *places: str) -> jax.Array:
            return _Norm(config, config.norm, name=name)(x) if config.norm_place in places else x

        if context.before is None:
            y = with_before = norm("attention_norm", x, "before", "around")
        else:
            both = jnp.stack([x, x + context.before])
            y, with_before = norm("attention_norm", both, "before", "around")
        y, new = _Attention(config, name="attention")(y, with_before, context, cached)
        after = x + norm("attention_post_norm", y, "after", "around")
        y = norm("mlp_norm", x if config.parallel else after, "before", "around")
        y = (_Experts if config.experts else _Mlp)(config, name="mlp")(y)
        return after + norm("mlp_post_norm", y, "after", "around"), new


@partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns fresh float32 parameters: a nested dict in which layers are stacked on axis 0.

    Kernels are [(layers,) in, out], or [layers, experts, in, out], and normal with `init_std`. The
    two that write to the residual stream are scaled by 1/√(2·layers) as in GPT-2; the score head
    has std 1/√(width + 1).

    With `copy_init` attention's output kernel is the value kernel transposed, scaled so that their
    product is about the identity. From the first step on a token then passes its embedding to
    whatever attends to it, and only has to learn where to look: a small model learns facts from
    less text, and learns to use its prompt. After "Mimetic Initialization of Self-Attention
    Layers", https://arxiv.org/abs/2305.09828.

    With `short_convolution` = n every layer makes its queries and keys of its input plus a weighted
    sum of the embeddings of the n tokens before. Each dimension of each of these has a learnt
    factor, which starts at ½ or −½ by chance, so that how far back a token stands can be told.
    Attention then finds a token by what stands before it, which two small layers do not learn by
    themselves in a million tokens. After the smeared keys of "In-context Learning and Induction
    Heads", https://arxiv.org/abs/2209.11895.

    Raises:
        UserError: the config does not fit together.
    """
    # No parameter depends on the attention kernel, and some kernels refuse a row of one token.
    config = dataclasses.replace(config.validate(), attention="reference")
    keys = jax.random.split(key, 4)
    block, x = _Block(config), jnp.zeros((1, 1, config.width), config.compute_dtype)
    context = _contexts(config, jnp.zeros((1, 1), jnp.int32))[0]

    def normal(key: jax.Array, *shape: int, std: float = config.init_std) -> jax.Array:
        return std * jax.random.normal(key, shape, jnp.float32)

    params = {
        "embed": {"embedding": normal(keys[0], config.vocab_size, config.width)},
        "layers": jax.vmap(lambda key: block.init(key, x, context)["params"])(
            jax.random.split(keys[1], config.layers)
        ),
        "final_norm": _Norm(config, config.norm).init(key, x)["params"],
    }
    if config.copy_init:
        attention = params["layers"]["attention"]
        attention["out"]["kernel"] = _undo_value(config, attention["value"]["kernel"])
    if config.position == "learned":
        params["position_embed"] = {"embedding": normal(keys[2], config.max_length, config.width)}
    if config.short_convolution:
        shape = config.short_convolution, config.width
        signs = jax.random.rademacher(jax.random.fold_in(key, len(keys)), shape, jnp.float32)
        params["short_convolution"] = {"query_key": {"scale": signs / 2}}
    if config.head == "scalar":
        std = 1 / np.sqrt(config.width + 1)
        params["score_head"] = {"kernel": normal(keys[3], config.width, 1, std=std)}
    elif not config.tied_embeddings:
        params["lm_head"] = {"kernel": normal(keys[3], config.width, config.vocab_size)}
    return params


def _undo_value(config: ModelConfig, value: jax.Array) -> jax.Array:
    """Output kernels [layers, heads·d, width] that undo value kernels [layers, width, kv·d]."""
    groups = config.heads // config.kv_heads
    value = value.reshape(config.layers, config.width, config.kv_heads, config.head_dim)
    value = jnp.repeat(value, groups, axis=2).reshape(config.layers, config.width, -1)
    return value.swapaxes(1, 2) / (value.shape[-1] * config.init_std**2)


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
        positions: int32 [B, T], below T, by default 0, 1, … along the row; packed rows need them.
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
    if cache is not None and prompt_lengths is None:
        positions = cache["lengths"][:, None] + jnp.arange(length)
        contexts = _contexts(config, positions, slots=cache["keys"][0].shape[2])
        hidden, new = _decode(config, params, tokens, contexts, cache)
        return Output(hidden, {**new, "lengths": cache["lengths"] + length})
    if positions is None:
        positions = jnp.arange(length)[None]
    contexts = _contexts(config, positions, segment_ids, branch_ids)
    hidden, (keys, values) = _forward(config, params, tokens, contexts, branch_ids)
    if cache is not None and prompt_lengths is not None:
        cache = {
            "keys": _fill(cache["keys"], keys),
            "values": _fill(cache["values"], values),
            "tokens": cache["tokens"].at[:, :length].set(tokens),
            "lengths": prompt_lengths.astype(jnp.int32),
        }
    return Output(hidden, cache)


def _contexts(
    config: ModelConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    slots: int | None = None,
) -> list[_Context]:
    """Returns one context per kind of layer: first without a window, then with one."""
    contexts = []
    for windowed in sorted(set(config.windowed)):
        window = config.sliding_window if windowed else None
        if slots is None:
            bias = visibility(config, positions, segment_ids, branch_ids, window)
        else:
            bias = cached_attention_bias(positions, slots, window)
        rope = None
        if config.position == "rope":
            rope = _rope_table(config, positions, slots or positions.shape[1], windowed)
        contexts.append(_Context(bias, rope, positions))
    return contexts


def _embed(
    config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
    """Embeddings [B, T, width]."""
    x = take_rows(params["embed"]["embedding"], tokens)
    if config.embed_scale != 1:
        x = x * config.embed_scale
    if config.position == "learned":
        x = x + take_rows(params["position_embed"]["embedding"], positions)
    return x.astype(config.compute_dtype)


def _convolve(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    branch_ids: jax.Array | None = None,
    cached: jax.Array | None = None,
) -> jax.Array | None:
    """The weighted sum of the embeddings of the tokens before each, [B, T, width]; see `init`.

    It is None without a short convolution. `cached` are all tokens of a cache, these too: int32
    [B, slots].
    """
    if not config.short_convolution:
        return None
    table, total = params["embed"]["embedding"], jnp.zeros(())
    scales = gather(params["short_convolution"]["query_key"]["scale"], jnp.float32)
    before, back = take_rows(table, tokens), None if branch_ids is None else _preceding(branch_ids)
    for i, scale in enumerate(scales, start=1):
        if cached is not None:
            ids = jnp.take_along_axis(cached, jnp.maximum(positions - i, 0), axis=1)
            before = take_rows(table, ids)
        elif back is not None:
            before = jnp.take_along_axis(before, back[..., None], axis=1)
        else:
            before = jnp.pad(before, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        total = total + jnp.where((positions >= i)[..., None], before * scale, 0)
    return (config.embed_scale * total).astype(config.compute_dtype)


def _preceding(branch_ids: jax.Array) -> jax.Array:
    """The place of the token before each: int32 [B, T]. A branch follows its segment's prompt."""
    place = jnp.broadcast_to(jnp.arange(branch_ids.shape[1]), branch_ids.shape)
    before = jnp.maximum(place - 1, 0)
    prompt = jax.lax.cummax(jnp.where(branch_ids == 0, place, 0), axis=1)
    goes_on = (branch_ids == 0) | (branch_ids == jnp.take_along_axis(branch_ids, before, axis=1))
    return jnp.where(goes_on, before, prompt)


def _final_norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    return cast(jax.Array, _Norm(config, config.norm).apply({"params": params["final_norm"]}, x))


def _forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    contexts: list[_Context],
    branch_ids: jax.Array | None,
) -> tuple[jax.Array, KeysValues]:
    """Scans the layers: hidden states, and keys and values [layers, B, kv_heads, T, head_dim]."""
    mixed = len(contexts) > 1

    def block(x, layer):
        params, windowed = layer
        params = gather_layer(params, config.compute_dtype)
        context = contexts[0]
        if mixed:
            context = jax.tree.map(lambda *kinds: jnp.where(windowed, *kinds[::-1]), *contexts)
        return _Block(config).apply({"params": params}, x, context)

    if config.remat != "none" or has_shards(params["layers"]):
        block = jax.checkpoint(
            block, policy=_remat_policy(config.remat), prevent_cse=config.layers_per_turn > 1
        )
    positions = contexts[0].positions
    x = _embed(config, params, tokens, positions)
    before = _convolve(config, params, tokens, positions, branch_ids=branch_ids)
    contexts = [each._replace(before=before) for each in contexts]
    if isinstance(params["layers"], tuple):  # from `decoding_params`
        each = []
        for layer in zip(params["layers"], config.windowed, strict=True):
            x, one = block(x, layer)
            each.append(one)
        return _final_norm(config, params, x), jax.tree.map(lambda *y: jnp.stack(y), *each)
    layers = params["layers"], np.array(config.windowed) if mixed else None
    x, new = jax.lax.scan(block, x, layers, unroll=config.layers_per_turn)
    return _final_norm(config, params, x), new


def _remat_policy(remat: str) -> Callable | None:
    """Returns the `jax.checkpoint` policy that says what a layer keeps for its backward pass.

    "full" keeps what enters the layer; "dots" the products with weights too, and the sums of
    attention's softmax; "none" everything but weights that were gathered.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return lambda primitive, *_, **__: primitive.name != "all_gather"
        case "dots":
            return policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names("attention"),
            )
    return None


def _decode(
    config: ModelConfig, params: Params, tokens: jax.Array, contexts: list[_Context], cache: Cache
) -> tuple[jax.Array, Cache]:
    """Returns hidden states and the cache with the new tokens, written in place layer by layer.

    A scan over the layers would copy the whole cache at every step.
    """
    positions = contexts[0].positions
    so_far = cache["tokens"].at[jnp.arange(len(tokens))[:, None], positions].set(tokens)
    x = _embed(config, params, tokens, positions)
    before = _convolve(config, params, tokens, positions, cached=so_far)
    contexts = [each._replace(before=before) for each in contexts]
    keys, values = [], []
    for i, cached in enumerate(zip(cache["keys"], cache["values"], strict=True)):
        layer = _layer(params, i)
        context = contexts[config.windowed[i] if len(contexts) > 1 else 0]
        x, (key, value) = _Block(config).apply({"params": layer}, x, context, cached)
        keys.append(key)
        values.append(value)
    new = {"tokens": so_far, "keys": tuple(keys), "values": tuple(values)}
    return _final_norm(config, params, x), new


def _layer(params: Params, i: int) -> Params:
    layers = params["layers"]
    return layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda leaf: leaf[i], layers)


def decoding_params(config: ModelConfig, params: Params) -> Params:
    """Returns the parameters as `apply` reads them fastest token by token, with equal results.

    A step of decoding reads every weight, and does little else. So the kernels that every product
    would round to the compute dtype are rounded here once: a bfloat16 model's take half the bytes.
    "layers" becomes a tuple with arrays of its own for each layer, because a slice of a stack may
    be copied at every step. Kernels of one input (query, key and value, or gate and up) lie side by
    side, and are one product, where each device has all of them. What is split over fsdp is put
    together again: otherwise every token would wait for every weight to travel. The price is a
    second copy of the layers for as long as it is used.
    """
    places = tuple(without_fsdp(leaf.sharding) for leaf in jax.tree.leaves(params))
    return lay_out_for_decoding(config, params, places)


@partial(jax.jit, static_argnums=(0, 2))
def lay_out_for_decoding(
    config: ModelConfig, params: Params, places: tuple[NamedSharding | None, ...]
) -> Params:
    """As `decoding_params`, from shapes too: `places` says of each leaf where it will lie.

    They are in the order of `jax.tree.leaves`, all None for parameters that are not on a mesh.
    """
    join = all(place is None or place.is_fully_replicated for place in places)

    def round_kernels(node: Mapping[str, Any]) -> dict[str, Any]:
        new = {k: round_kernels(v) if isinstance(v, Mapping) else v for k, v in node.items()}
        if "kernel" in node and "magnitude" not in node.get("lora", {}):  # DoRA takes its norm
            new["kernel"] = node["kernel"].astype(config.compute_dtype)
        if "router" in node:  # computes in float32
            new["router"] = node["router"]
        for names in (*_of_one_input(config), GATE_UP) if join else ():
            kernels = [new.get(name, {}) for name in names]
            if all("kernel" in each and set(each) <= {"kernel", "bias"} for each in kernels):
                joined = jax.tree.map(lambda *x: jnp.concatenate(x, -1), *kernels)
                new = {k: v for k, v in new.items() if k not in names}
                new["_".join(names)] = joined
        return new

    new = dict(params) | {"layers": round_kernels(params["layers"])}
    new["layers"] = tuple(_layer(new, i) for i in range(config.layers))
    if "lm_head" in params:
        new["lm_head"] = round_kernels(params["lm_head"])
    changed = config.embed_scale != 1 or config.position != "rope" or config.short_convolution
    if config.tied_embeddings and not changed:  # an embedding that is changed is rounded after that
        new["embed"] = jax.tree.map(lambda x: x.astype(config.compute_dtype), params["embed"])
    if places[0] is None:
        return new
    if join:
        return jax.lax.with_sharding_constraint(new, places[0])
    laid = dict(jax.tree.unflatten(jax.tree.structure(params), places))
    layer = jax.tree.map(lambda place: place.update(spec=P(*place.spec[1:])), laid["layers"])
    laid["layers"] = (layer,) * config.layers
    return jax.lax.with_sharding_constraint(new, laid)


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Returns an empty cache for `length` positions per row.

    keys, values: for every layer an array [batch, kv_heads, length, head_dim], in which slot s of
    a row holds its position s; lengths: int32 [batch]. Heads stand before slots because the
    products of a decoding step then read them in order.
    """
    shape = (batch, config.kv_heads, length, config.head_dim)
    return {
        "tokens": jnp.zeros((batch, length), jnp.int32),
        "keys": tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.layers)),
        "values": tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.layers)),
        "lengths": jnp.zeros(batch, jnp.int32),
    }


def _fill(cached: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
    """Writes [layers, B, kv_heads, T, head_dim] over the first T slots of every layer."""
    length, slots = new.shape[3], cached[0].shape[2]
    if length > slots:
        raise UserError(f"{length} tokens a row do not fit a cache of {slots}")
    return tuple(old.at[:, :, :length].set(y) for old, y in zip(cached, new, strict=True))


def unembedding(config: ModelConfig, params: Params) -> tuple[jax.Array | Shard, str]:
    """Returns the f32 matrix from hidden states to logits as it is stored, and its layout.

    That is "vd", [vocab_size, width], if it is the embedding, and otherwise "dv".
    """
    if config.tied_embeddings:
        return params["embed"]["embedding"], "vd"
    if config.head == "scalar":
        raise ValueError("a scalar model with untied embeddings has no language-model head")
    return params["lm_head"]["kernel"], "dv"


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 [..., vocab_size] logits of hidden [..., width], soft-capped if the config says so.

    The factors are in the compute dtype, the sums in float32.
    """
    table, layout = unembedding(config, params)
    values = jnp.einsum(
        f"...d,{layout}->...v",
        hidden,
        gather(table, hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    cap = config.logit_softcap
    return values if cap is None else cap * jnp.tanh(values / cap)


def scores(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 [...] scores of hidden [..., width] by the scalar head of reward and value models."""
    if config.head != "scalar":
        raise ValueError("scores need a model with head = 'scalar'")
    kernel = gather(params["score_head"]["kernel"], jnp.float32)
    return hidden.astype(jnp.float32) @ kernel[:, 0]


def check_tokens(
    config: ModelConfig, tokens: np.ndarray, positions: np.ndarray | None = None
) -> None:
    """Checks on the host for ids that compiled code would clamp silently.

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
