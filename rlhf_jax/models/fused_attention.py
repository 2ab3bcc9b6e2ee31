"""Attention by kernels that never hold all scores, chosen by `ModelConfig.attention`.

    reference  plain products and a softmax: `attention.attend`
    xla        jax.nn.dot_product_attention as XLA compiles it: any platform
    cudnn      cuDNN's flash attention: NVIDIA GPUs, bfloat16
    splash     the Pallas kernel of that name: TPUs, see `splash.py`

The first two would hold all scores of a row for its backward pass: rows of more than 1,024 tokens
go through `attention.attend_long` instead. cudnn and splash are calls that the compiler can't split
over devices: under a mesh each device of its tensor axis does its own heads.

A kernel ignores a mask that it does not know, so a run that trains with one first compares it with
the reference: `check_attention`.

"FlashAttention", https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.models.attention import LONG, LongRows, attend, attend_long, attention_bias
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.splash import Rows, splash, takes_branches, visible_rows

PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
# For ‖kernel − exact‖ / ‖exact‖: rounding stays well below, a wrong mask is far above.
TOLERANCES = {"float32": 2e-3, "bfloat16": 2e-2}


def visibility(
    config: ModelConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    branch_ids: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array | LongRows | Rows | None:
    """Returns who sees whom in the form that the config's kernel takes: an argument of `attend_by`.

    Its arguments are those of `attention_bias`. The form is f32 [B or 1, T, T] for "reference"; for
    "xla" and "cudnn", which are causal by themselves, bool [B or 1, 1, T, T], in which padding sees
    padding, or None if all is visible; for "splash" its `Rows`. Of long rows "reference" and "xla"
    take `LongRows`.

    Raises:
        UserError: the kernel can't leave out what branches must not see.
    """
    if config.attention in ("reference", "xla") and positions.shape[1] > LONG:
        window = jnp.asarray(sliding_window or np.iinfo(np.int32).max)
        return LongRows(positions, segment_ids, branch_ids, window)
    if config.attention == "reference":
        return attention_bias(positions, segment_ids, branch_ids, sliding_window)
    if config.attention == "splash":
        return visible_rows(config, segment_ids, branch_ids)
    if segment_ids is None and config.sliding_window is None:
        return None
    bias = attention_bias(
        positions,
        # A row without a visible key has no softmax; nothing else sees padding.
        None if segment_ids is None else segment_ids + 1,
        branch_ids,
        sliding_window,
    )
    return (bias == 0)[:, None]


def attend_by(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Any,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Does what `attention.attend` does, with the config's kernel.

    Args:
        query: [B, kv_heads, G, T, d], scaled. key, value: [B, kv_heads, T, d].
        visible: from `visibility`.
        interpret: has "splash" run without a TPU, slowly.

    Returns:
        [B, kv_heads, G, T, d] in the dtype of `value`.
    """
    if isinstance(visible, LongRows):
        return attend_long(query, key, value, visible, softcap=config.attention_softcap)
    if config.attention == "reference":
        return attend(query, key, value, visible, softcap=config.attention_softcap)
    if config.attention == "splash":
        return _by_heads(partial(splash, config, interpret=interpret), query, key, value, visible)
    product = partial(_dot_product, config.attention)
    if config.attention == "cudnn":
        return _by_heads(product, query, key, value, visible)
    return product(query, key, value, visible)


def _dot_product(
    implementation: str, query: jax.Array, key: jax.Array, value: jax.Array, visible: Any
) -> jax.Array:
    heads = query.reshape(len(query), -1, *query.shape[3:])  # [B, heads, T, d]
    mixed = jax.nn.dot_product_attention(
        heads.swapaxes(1, 2),  # [B, T, heads, d]
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=visible,
        scale=1.0,
        is_causal=True,
        implementation=cast(Any, implementation),
    )
    return mixed.swapaxes(1, 2).reshape(query.shape)


def _by_heads(
    kernel: Callable, query: jax.Array, key: jax.Array, value: jax.Array, visible: Any
) -> jax.Array:
    """Calls the kernel on each device's part of the heads, where a mesh splits them.

    Where the tensor axis doesn't divide the key heads, each is repeated for a part of its query
    heads if those can be divided instead, and otherwise heads of zeros make up the number.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    parts = mesh.shape["tensor"] if kinds.get("tensor") == AxisType.Auto else 1
    if parts == 1:
        return kernel(query, key, value, visible)
    kv_heads, groups = query.shape[1:3]
    repeats = parts // math.gcd(parts, kv_heads)
    if groups % repeats == 0:
        query = query.reshape(len(query), -1, groups // repeats, *query.shape[3:])
        key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    else:
        missing = [(0, 0), (0, -kv_heads % parts)]
        query, key, value = (
            jnp.pad(x, missing + [(0, 0)] * (x.ndim - 2)) for x in (query, key, value)
        )
    heads = P(None, "tensor")
    mixed = jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, P()),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )(query, key, value, visible)
    if groups % repeats == 0:
        return mixed.reshape(len(mixed), kv_heads, groups, *mixed.shape[3:])
    return mixed[:, :kv_heads]


def check_attention(config: ModelConfig, length: int, *, interpret: bool = False) -> float:
    """Compares the config's kernel with the reference on random packed rows of `length` tokens.

    Two rows hold documents, shared prompts with branches where the kernel takes them, and padding;
    at most two of the model's key-value heads are used. Output and gradients are compared with
    float32 products in full precision: ‖kernel − exact‖ / ‖exact‖. "reference" is not compared.

    Returns:
        The largest of these errors.

    Raises:
        UserError: the platform lacks the kernel or the kernel refuses the shapes, or an error is
            above TOLERANCES.
    """
    if config.attention == "reference":
        return 0.0
    if not interpret:
        check_kernel(config.attention, jax.default_backend(), length)
    worst = 0.0
    for window in sorted({config.sliding_window if w else None for w in config.windowed}, key=str):
        try:
            errors = _errors(config, length, window, interpret)
        except (NotImplementedError, RuntimeError, ValueError) as refusal:
            reason = str(refusal).strip().splitlines()[0]
            raise UserError(
                f"attention = {config.attention!r} does not take rows of {length} tokens with "
                f"heads of {config.head_dim} on this platform ({reason}): choose attention = "
                "'reference' or 'xla'"
            ) from refusal
        for name, error in errors.items():
            if not error <= TOLERANCES[config.compute_dtype]:  # NaN is no agreement either
                raise UserError(
                    f"attention = {config.attention!r} disagrees with the reference on random "
                    f"packed rows: the relative error of the {name} is {error:.1e}, above "
                    f"{TOLERANCES[config.compute_dtype]:.0e}; choose attention = 'reference'"
                )
            worst = max(worst, error)
    return worst


def check_kernel(attention: str, platform: str, length: int) -> None:
    """UserError for a kernel that a platform, as "tpu", lacks, or that refuses such rows."""
    needed = PLATFORMS.get(attention)
    if needed not in (None, platform):
        own = next((name for name, other in PLATFORMS.items() if other == platform), "reference")
        raise UserError(
            f"attention = {attention!r} needs a {needed.upper()}, this is a {platform.upper()}: "
            f"choose attention = {own!r} or 'xla'"
        )
    if attention == "cudnn" and length % 2:
        raise UserError(
            f"attention = 'cudnn' does not take rows of {length} tokens, an odd number: set "
            f"data.row_length = {length + 1}, or choose attention = 'xla'"
        )


def _errors(
    config: ModelConfig, length: int, window: int | None, interpret: bool
) -> dict[str, float]:
    """Returns the relative errors of the kernel's output and gradients."""
    random = np.random.default_rng(0)
    branches = config.attention != "splash" or takes_branches(config, length)
    ids = random_rows(random, 2, length, branches=branches)
    kv_heads, groups = min(2, config.kv_heads), config.heads // config.kv_heads
    small = dataclasses.replace(
        config, kv_heads=kv_heads, heads=kv_heads * groups, window_pattern="w" if window else "g"
    )

    def normal(*heads: int) -> jax.Array:
        x = random.normal(size=(2, *heads, length, config.head_dim))
        return jnp.asarray(x, config.compute_dtype)

    query, key, value = normal(kv_heads, groups), normal(kv_heads), normal(kv_heads)
    query = query * jnp.asarray(config.query_scale or config.head_dim**-0.5, query.dtype)
    weights = normal(kv_heads, groups) * (ids["segment_ids"] > 0)[:, None, None, :, None]
    bias = attention_bias(**ids, sliding_window=window)
    if not branches:
        ids["branch_ids"] = None
    visible = visibility(small, **ids, sliding_window=window)

    def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend_by(small, query, key, value, visible, interpret=interpret)

    def exact(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return attend(query, key, value, bias, softcap=config.attention_softcap)

    @partial(jax.jit, static_argnums=0)
    def run(function: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(function, *arrays)
        return weights.astype(out.dtype) * out, *backward(weights.astype(out.dtype))

    arrays = query, key, value
    by_kernel = run(fused, *arrays)
    by_reference = run(exact, *(x.astype(jnp.float32) for x in arrays))
    names = "output", "gradient of queries", "gradient of keys", "gradient of values"
    return {
        name: float(_norm(x.astype(jnp.float32) - y) / _norm(y))
        for name, x, y in zip(names, by_kernel, by_reference, strict=True)
    }


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2))


def random_rows(
    random: np.random.Generator, rows: int, length: int, *, branches: bool
) -> dict[str, Any]:
    """Draws int32 [rows, length] positions, segment_ids and branch_ids of documents and padding.

    With `branches` every other document is a prompt with two branches.
    """
    names = ("positions", "segment_ids", "branch_ids")
    ids = {name: np.zeros((rows, length), np.int32) for name in names}
    for row in range(rows):
        cuts = np.sort(random.choice(np.arange(1, length + 1), min(6, length), replace=False))
        for i, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            place, size = np.s_[row, start:end], end - start
            ids["segment_ids"][place] = i + 1
            ids["positions"][place] = np.arange(size)
            if branches and i % 2 == row % 2:
                prompt, each = size - 2 * (size // 3), size // 3
                parts = np.repeat([0, 1, 2], [prompt, each, each])
                ids["branch_ids"][place] = parts
                restart = np.where(parts == 2, each, 0)
                ids["positions"][place] = np.arange(size) - restart
    return {name: jnp.asarray(array) for name, array in ids.items()}
