"""Low-rank adapters beside frozen kernels, and frozen kernels in 16, 8 or 4 bits.

An adapter is a subtree of the parameters, `lora: {a, b, scale}` next to the kernel it changes; the
model computes with whatever stands there. So one tree of frozen arrays serves any number of models
at once, each under its own adapter, and the base itself is the tree without them:

    policy, reference = combine(adapter, base), base
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config import Only, option
from rlhf_jax.errors import UserError
from rlhf_jax.trees import named_leaves

Tree = dict[str, Any]
KINDS = ("lora", "rslora", "dora")
STORED = ("float32", "bfloat16", "int8", "nf4")
_RANK = Only("rank")
BLOCK = 64  # numbers that share an NF4 scale

# Quantiles of a normal distribution, 0 among them: "QLoRA", https://arxiv.org/abs/2305.14314.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained in place of all weights.

    Attributes:
      rank: of the change of each kernel; 0: no adapter, everything is trained.
      alpha: the change is A·B · alpha / rank, for "rslora" alpha / √rank.
      targets: regex found in the names of the kernels that get one, as "layers/attention/query".
      kind: "lora", https://arxiv.org/abs/2106.09685; "rslora", whose updates do not shrink as the
        rank grows, https://arxiv.org/abs/2312.03732; "dora", which trains each output's magnitude
        beside its direction, https://arxiv.org/abs/2402.09353.
      base: how the frozen kernels are kept: "float32", "bfloat16", "int8" (one scale per output)
        or "nf4" (4 bits, one scale per 64 inputs). Norms, biases, embeddings and routers stay
        float32.
    """

    rank: int = 0
    alpha: float = option(16.0, only=_RANK)
    targets: str = option(r"attention/(query|key|value|out)$|mlp/(gate|up|down)$", only=_RANK)
    kind: str = option("lora", only=_RANK)
    base: str = option("float32", only=_RANK)

    def validate(self) -> AdapterConfig:
        """Returns itself, or raises UserError naming the first field that is wrong."""
        for name, choices in (("kind", KINDS), ("base", STORED)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"adapter.{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.rank < 0 or not 0 < self.alpha < math.inf:
            raise UserError(
                f"adapter.rank = {self.rank} and adapter.alpha = {self.alpha} must be above 0"
            )
        if not self.rank and self.base != "float32":
            raise UserError(
                f"adapter.base = {self.base!r} is for frozen weights: set adapter.rank, or train "
                "everything in float32"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"adapter.targets = {self.targets!r} is no regex: {error}") from error
        return self

    @property
    def scale(self) -> float:
        """The factor of A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


def attach(params: Mapping[str, Any], adapter: AdapterConfig, key: jax.Array) -> Tree:
    """Returns the parameters with a fresh adapter that changes nothing yet: A is random, B is 0.

    For kernels [layers, in, out]: a [layers, in, rank], uniform within ±1/√in as PyTorch's linear
    layers are, b [layers, rank, out], scale [layers] and, for DoRA, magnitude [layers, out].
    Experts get none.

    Raises:
        UserError: no kernel has a name that matches, or the rank is above a kernel's own.
    """
    kernels = {n: node for n, node in _kernels(params) if len(kernel_shape(node)) == 3}
    targets = {name: node for name, node in kernels.items() if re.search(adapter.targets, name)}
    if not targets:
        names = ", ".join(kernels)
        raise UserError(f"adapter.targets = {adapter.targets!r} is found in none of {names}")
    added: Tree = {}
    keys = jax.random.split(key, len(targets))
    for each, (name, node) in zip(keys, targets.items(), strict=True):
        layers, inputs, outputs = kernel_shape(node)
        if adapter.rank > min(inputs, outputs):
            raise UserError(
                f"adapter.rank = {adapter.rank} is above that of {name}, {inputs} x {outputs}"
            )
        bound = 1 / math.sqrt(inputs)
        shape = (layers, inputs, adapter.rank)
        lora = {
            "a": jax.random.uniform(each, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((layers, adapter.rank, outputs), jnp.float32),
            "scale": jnp.full(layers, adapter.scale, jnp.float32),
        }
        if adapter.kind == "dora":
            lora["magnitude"] = jnp.linalg.norm(kernel_of(node), axis=-2)
        added = combine(added, _at(name, {"lora": lora}))
    return combine(added, params)


TRAINED = r"/lora/(a|b|magnitude)$|^score_head/"
OWN = r"/lora/|^score_head/"


def split(params: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """(what is trained, what is frozen); without an adapter everything is trained.

    With one, its numbers and a scalar head are trained; no base has a scalar head.
    """
    if not has_adapter(params):
        return dict(params), {}
    trained = _where(params, lambda name: bool(re.search(TRAINED, name)))
    return trained, _where(params, lambda name: not re.search(TRAINED, name))


def combine(first: Mapping[str, Any], second: Mapping[str, Any]) -> Tree:
    """Merges two trees of nested dicts without a copy; of two leaves the first's stays."""
    both: Tree = dict(second)
    for name, child in first.items():
        under = both.get(name)
        if isinstance(child, Mapping) and isinstance(under, Mapping):
            both[name] = combine(child, under)
        else:
            both[name] = child
    return both


def has_adapter(params: Mapping[str, Any]) -> bool:
    """Whether any kernel has an adapter."""
    return any("lora" in node for _, node in _kernels(params))


def without_adapter(params: Mapping[str, Any]) -> Tree:
    """Returns the base: the same arrays, no adapter."""
    return _where(params, lambda name: "/lora/" not in name)


def own(params: Mapping[str, Any]) -> Tree:
    """Returns what a model under an adapter has beside its base, which is what is saved of it."""
    return _where(params, lambda name: bool(re.search(OWN, name)))


def _where(node: Mapping[str, Any], test: Callable[[str], bool], path: str = "") -> Tree:
    """The leaves whose "/"-joined names pass the test."""
    part: Tree = {}
    for name, child in node.items():
        if not isinstance(child, Mapping):
            if test(path + name):
                part[name] = child
        elif below := _where(child, test, f"{path}{name}/"):
            part[name] = below
    return part


def merge(params: Mapping[str, Any]) -> Tree:
    """Returns float32 parameters without adapters that compute the same."""
    merged: Tree = {}
    for name, child in params.items():
        if not isinstance(child, Mapping):
            merged[name] = child
        elif "lora" in child or any(how in child for how in STORED):
            rest = {k: v for k, v in child.items() if k not in ("lora", "kernel", *STORED)}
            merged[name] = rest | {"kernel": _merged(child)}
        else:
            merged[name] = merge(child)
    return jax.tree.map(lambda x: x.astype(jnp.float32), merged)


@jax.jit
def _merged(node: Mapping[str, Any]) -> jax.Array:
    kernel = kernel_of(node)
    if "lora" not in node:
        return kernel
    lora = node["lora"]
    kernel = kernel + _change(lora)
    if "magnitude" in lora:
        norm = jnp.linalg.norm(kernel, axis=-2, keepdims=True)
        kernel = kernel * (lora["magnitude"][..., None, :] / norm)
    return kernel


def _change(lora: Mapping[str, jax.Array]) -> jax.Array:
    """scale · A·B [..., in, out]."""
    change = jnp.matmul(lora["a"], lora["b"], precision=jax.lax.Precision.HIGHEST)
    return lora["scale"][..., None, None] * change


def product(x: jax.Array, node: Mapping[str, Any], dtype: Any) -> jax.Array:
    """Multiplies x [N, in] with a layer's kernel under its adapter: [N, out] of dtype.

    DoRA's norms count as constants in the backward pass, as its paper has it (section 4.3).
    """
    kernel = node["kernel"] if "kernel" in node else kernel_of(node)  # bfloat16 stays bfloat16
    y = x @ kernel.astype(dtype)
    if "lora" not in node:
        return y
    lora = node["lora"]
    scale = lora["scale"].astype(dtype)
    y = y + scale * ((x @ lora["a"].astype(dtype)) @ lora["b"].astype(dtype))
    if "magnitude" in lora:
        changed = kernel.astype(jnp.float32) + _change(lora)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=-2))
        y = y * (lora["magnitude"] / norm).astype(dtype)
    return y


def quantize(params: Mapping[str, Any], how: str) -> Tree:
    """Returns the parameters with the layers' kernels kept as `AdapterConfig.base` says."""
    if how == "float32":
        return dict(params)
    kept = dict(params)
    for name, node in _kernels(params):
        if name.endswith("/router"):
            continue
        *way, last = name.split("/")
        parent = kept
        for step in way:
            parent[step] = dict(parent[step])
            parent = parent[step]
        rest = {k: v for k, v in node.items() if k != "kernel"}
        parent[last] = rest | _stored(name, node["kernel"], how)
    return kept


def _stored(name: str, kernel: jax.Array, how: str) -> Tree:
    if how == "bfloat16":
        return {"kernel": kernel.astype(jnp.bfloat16)}
    if how == "nf4" and kernel.shape[-2] % 2:
        raise UserError(
            f"adapter.base = 'nf4': {name} has {kernel.shape[-2]} inputs, an odd number"
        )
    return {how: (_int8 if how == "int8" else _nf4)(kernel)}


@jax.jit
def _int8(kernel: jax.Array) -> Tree:
    scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127
    codes = jnp.round(kernel / jnp.where(scale == 0, 1, scale))
    return {"codes": codes.astype(jnp.int8), "scale": scale}


@jax.jit
def _nf4(kernel: jax.Array) -> Tree:
    *layers, inputs, outputs = kernel.shape
    blocks = kernel.reshape(*layers, -1, math.gcd(inputs, BLOCK), outputs)
    scale = jnp.max(jnp.abs(blocks), axis=-2)
    levels = jnp.array(NF4)
    unit = blocks / jnp.where(scale == 0, 1, scale)[..., None, :]
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, unit).astype(jnp.uint8)
    codes = codes.reshape(*layers, inputs // 2, 2, outputs)
    return {"codes": codes[..., 0, :] << 4 | codes[..., 1, :], "scale": scale}


def kernel_of(node: Mapping[str, Any]) -> jax.Array:
    """Returns the float32 kernel [..., in, out] of a node, however it is kept."""
    if "int8" in node:
        return node["int8"]["codes"].astype(jnp.float32) * node["int8"]["scale"]
    if "nf4" in node:
        packed, scale = node["nf4"]["codes"], node["nf4"]["scale"]
        *layers, half, outputs = packed.shape
        codes = jnp.stack([packed >> 4, packed & 15], axis=-2)
        values = jnp.array(NF4)[codes].reshape(*layers, scale.shape[-2], -1, outputs)
        return (values * scale[..., None, :]).reshape(*layers, 2 * half, outputs)
    return node["kernel"].astype(jnp.float32)


def kernel_shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    """[..., in, out] of a node's kernel."""
    return jax.eval_shape(kernel_of, {k: v for k, v in node.items() if k != "lora"}).shape


def param_count(params: Mapping[str, Any]) -> int:
    """Counts the weights of a tree's base, however they are kept."""
    count = 0
    for name, leaf in named_leaves(without_adapter(params)).items():
        if not re.search("(int8|nf4)/scale$", name):
            count += leaf.size * (2 if name.endswith("nf4/codes") else 1)
    return count


def _kernels(params: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields ("layers/attention/query", its node) for each kernel [layers, (experts,) in, out]."""

    def walk(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if any(how in node for how in ("kernel", *STORED)):
            yield name, node
            return
        for child in sorted(k for k, v in node.items() if isinstance(v, Mapping)):
            yield from walk(f"{name}/{child}", node[child])

    if isinstance(layers := params.get("layers"), Mapping):
        yield from walk("layers", layers)


def _at(name: str, node: Tree) -> Tree:
    for step in reversed(name.split("/")):
        node = {step: node}
    return node
