"""What of a model and its batches lies on which device of a mesh, and how devices compute with it.

A mesh has the axes data, fsdp and tensor. Rows of a batch are split over data and fsdp; parameters
over fsdp and tensor, by regex rules on their "/"-joined names. `by_rows` has each device compute
its own rows. What lies in parts over fsdp (`Shard`) is then gathered just before it is used,
one layer after the other, in the dtype it is used in, and its gradient is summed in float32 into
the same parts: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (stage 3),
https://arxiv.org/abs/1910.02054. The unembedding is not gathered: losses split it by words
(`split_words`). Products that are split over tensor are left to XLA.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.devices import AXES
from rlhf_jax.errors import UserError
from rlhf_jax.trees import named_leaves

Rules = Sequence[tuple[str, P]]

FSDP = "fsdp"
BATCH_AXES = ("data", FSDP)

_KERNEL = "(kernel|int8/codes|nf4/(codes|scale))$"
# Axis 0 of everything under layers/ is the layer; it is never sharded.
TRANSFORMER_RULES: Rules = (
    (r"embed(ding)?s?/embedding$", P("tensor", "fsdp")),
    (rf"(attention/(query|key|value)|mlp/(gate|up))/{_KERNEL}", P(None, "fsdp", "tensor")),
    (rf"(attention/out|mlp/down)/{_KERNEL}", P(None, "tensor", "fsdp")),
    (rf"experts/(gate|up)/{_KERNEL}", P(None, None, "fsdp", "tensor")),
    (rf"experts/down/{_KERNEL}", P(None, None, "tensor", "fsdp")),
    (r"router/kernel$", P()),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"head/kernel$", P("fsdp")),
    (r"(scale|bias)$|lora/", P()),
)


def spec_of(
    mesh: Mesh | AbstractMesh,
    name: str,
    shape: tuple[int, ...],
    rules: Rules = TRANSFORMER_RULES,
) -> P:
    """Where an array of that "/"-joined name lies; see `training.mesh.shardings`."""
    if len(shape) < 2:
        return P()
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if spec is None:
        raise UserError(f"no sharding rule matches {name} {shape}; add a (regex, PartitionSpec)")
    if len(spec) > len(shape):
        return P()
    fitted = list[str | None]()
    for axis, size in zip(spec, shape, strict=False):
        if axis is None or mesh.shape[axis] == 1:
            axis = None
        elif size % mesh.shape[axis]:
            logging.getLogger(__name__).info(
                "%s: dimension %d is not divisible by mesh axis %s=%d, so it is replicated",
                *(name, size, axis, mesh.shape[axis]),
            )
            axis = None
        fitted.append(axis)
    return _spelled(fitted)


def _spelled(axes: Iterable[str | None]) -> P:
    """Returns a spec without None at the end, as the compiler has it: a step must not recompile."""
    spec = [*axes]
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def without_fsdp(place: Sharding) -> NamedSharding | None:
    """Where an array lies that is whole but for the axis tensor; None if it is not on a mesh."""
    if not isinstance(place, NamedSharding):
        return None
    return NamedSharding(
        place.mesh, _spelled(axis if axis == "tensor" else None for axis in place.spec)
    )


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def split_over(mesh: Mesh | None, function: Callable) -> Callable:
    """The function, as `jax.jit` takes it, in whose calls `by_rows` splits rows over the mesh.

    Without a mesh it is as it was.
    """
    if mesh is None:
        return function

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return run


@functools.partial(jax.tree_util.register_dataclass, data_fields=("part",), meta_fields=("axis",))
@dataclass(frozen=True)
class Shard:
    """This device's part of an array that is split over fsdp.

    Attributes:
      part: the array.
      axis: the one that is split, counted from the end (−1 is the last), so that it is the same
        one in a layer's slice of stacked layers.
    """

    part: jax.Array
    axis: int


def gather(array: jax.Array | Shard, dtype: Any) -> jax.Array:
    """The array in that dtype; the parts of a `Shard` are rounded to it before they travel.

    The gradient of a part is the float32 sum of all devices' gradients to it, where JAX's own rule
    would sum in the dtype of the products.
    """
    if not isinstance(array, Shard):
        return array.astype(dtype)
    return _gather(array.part, array.axis, dtype)


def _all_gather(part: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=axis % part.ndim, tiled=True)


def _gather_forward(part: jax.Array, axis: int, dtype: Any):
    return _all_gather(part, axis, dtype), jnp.zeros((), part.dtype)


def _gather_backward(axis: int, dtype: Any, like: jax.Array, gradient: jax.Array):
    total = jax.lax.psum_scatter(
        gradient.astype(jnp.float32), FSDP, scatter_dimension=axis % gradient.ndim, tiled=True
    )
    return (total.astype(like.dtype),)


_gather = jax.custom_vjp(_all_gather, nondiff_argnums=(1, 2))
_gather.defvjp(_gather_forward, _gather_backward)


def gather_layer(node: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A layer's parameters with an array in place of every `Shard`.

    Kernels are rounded to dtype before they travel, as products would round them after; but not
    beside DoRA's magnitudes, whose norms are of the float32 kernel. Experts stay in parts: each is
    gathered when its turn comes.
    """
    new = {}
    exact = "magnitude" in node.get("lora", {})
    for name, child in node.items():
        if isinstance(child, Shard):
            child = gather(child, dtype if name == "kernel" and not exact else child.part.dtype)
        elif isinstance(child, Mapping) and name != "experts":
            child = gather_layer(child, dtype)
        new[name] = child
    return new


def has_shards(tree: Any) -> bool:
    """Whether any array of the tree lies in parts."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Shard))
    return any(isinstance(leaf, Shard) for leaf in leaves)


def take_rows(table: jax.Array | Shard, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] at ids [B, T]: [B, T, D].

    Of a table that is split by columns each device takes its columns for all rows of the batch, and
    sends every device those of its rows: the table stays where it is, and so does its gradient.
    """
    if not isinstance(table, Shard):
        return jnp.take(table, ids, axis=0)
    every = jax.lax.all_gather(ids, FSDP, axis=0, tiled=True)
    columns = jnp.take(table.part, every, axis=0)
    return jax.lax.all_to_all(columns, FSDP, split_axis=0, concat_axis=2, tiled=True)


def split_words(table: Shard, words: int, dtype: Any) -> jax.Array:
    """Of n devices the i-th's ⌈V/n⌉ words of a table [V, D] or [D, V], in their whole width.

    The table lies in parts of the width; each device sends every other its part of their words.
    After the last word there are zeros.

    Args:
      words: which axis of the table is the words, counted from the end: −2 or −1.
      dtype: in which they travel, and are returned: [⌈V/n⌉, D] or [D, ⌈V/n⌉].
    """
    part, axis = table.part.astype(dtype), words % 2
    missing = -part.shape[axis] % jax.lax.axis_size(FSDP)
    part = jnp.pad(part, [(0, missing), (0, 0)] if axis == 0 else [(0, 0), (0, missing)])
    return jax.lax.all_to_all(part, FSDP, split_axis=axis, concat_axis=1 - axis, tiled=True)


def by_rows(function: Callable, *, summed: bool = False) -> Callable:
    """Has each device of the context's mesh compute a function for its own rows.

    Outside of a mesh it is called as it is. A batch whose rows the devices do not divide is padded
    with rows of zeros, of which nothing is returned.

    Args:
      function: (config, params, …, batch, **options), of one or more trees of parameters and a
        batch of arrays [rows, …] → tree of arrays [rows, …]. In place of arrays that are split
        over fsdp it is given a `Shard`.
      summed: it returns sums over its rows instead, which are summed over the devices.
    """

    @functools.wraps(function)
    def run(config: Any, *arguments: Any, **options: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        split = set(AXES) <= set(mesh.axis_names) and batch_shards(mesh) > 1
        if not split or mesh.manual_axes:
            return function(config, *arguments, **options)
        *trees, batch = arguments
        rows = len(jax.tree.leaves(batch)[0])
        missing = -rows % batch_shards(mesh)
        if missing:
            batch = jax.tree.map(
                lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), batch
            )
        manual = BATCH_AXES + (("tensor",) if mesh.shape["tensor"] == 1 else ())
        specs = [_fsdp_specs(mesh, tree) for tree in trees]

        def local(*arguments: Any) -> Any:
            *trees, batch = arguments
            parts = [_with_shards(*each) for each in zip(trees, specs, strict=True)]
            result = function(config, *parts, batch, **options)
            return jax.lax.psum(result, BATCH_AXES) if summed else result

        result = jax.shard_map(
            local,
            in_specs=(*specs, P(BATCH_AXES)),
            out_specs=P() if summed else P(BATCH_AXES),
            axis_names=set(manual),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(*trees, batch)
        return jax.tree.map(lambda x: x[:rows], result) if missing and not summed else result

    return run


def _fsdp_specs(mesh: AbstractMesh, tree: Any) -> Any:
    """The rules' specs without the axis tensor, in the tree's structure."""
    specs = (spec_of(mesh, name, leaf.shape) for name, leaf in named_leaves(tree).items())
    fsdp = [P(*(axis if axis == FSDP else None for axis in spec)) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(tree), fsdp)


def _with_shards(tree: Any, specs: Any) -> Any:
    """The tree with a `Shard` in place of what is split over fsdp."""

    def wrap(part: jax.Array, spec: P) -> jax.Array | Shard:
        return Shard(part, spec.index(FSDP) - part.ndim) if FSDP in spec else part

    return jax.tree.map(wrap, tree, specs)
