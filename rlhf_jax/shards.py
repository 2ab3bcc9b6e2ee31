"""Arrays that lie in parts over the mesh axis fsdp, for code that runs on each device by itself.

That is code under `jax.shard_map`, such as `models.sharding.by_rows` makes of a model's functions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

FSDP = "fsdp"


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

    def whole(self, dtype: Any = None) -> jax.Array:
        """The parts of all devices in one array, rounded to a dtype before they travel.

        The gradient of a part is the float32 sum of all devices' gradients to it, where JAX's own
        rule would sum in the dtype of the products.
        """
        if not jnp.issubdtype(self.part.dtype, jnp.floating):  # codes, which have no gradient
            return _gather(self.part, self.axis, self.part.dtype)
        return _gather_float(self.part, self.axis, dtype or self.part.dtype)

    def sum_of(self, gradient: jax.Array) -> jax.Array:
        """This device's part of the sum of all devices' gradients to the whole array: float32."""
        return jax.lax.psum_scatter(
            gradient.astype(jnp.float32),
            FSDP,
            scatter_dimension=self.axis % gradient.ndim,
            tiled=True,
        )


def _gather(part: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=axis % part.ndim, tiled=True)


_gather_float = jax.custom_vjp(_gather, nondiff_argnums=(1, 2))
_gather_float.defvjp(
    lambda part, axis, dtype: (_gather(part, axis, dtype), jnp.zeros((), part.dtype)),
    lambda axis, dtype, like, gradient: (Shard(like, axis).sum_of(gradient).astype(like.dtype),),
)


def whole(array: jax.Array | Shard, dtype: Any) -> jax.Array:
    """The array, or all parts of it, in that dtype."""
    return array.whole(dtype) if isinstance(array, Shard) else array.astype(dtype)


def gather(node: Any, dtype: Any) -> Any:
    """A layer's parameters with an array in place of every `Shard`.

    Kernels are rounded to dtype before they travel, as products would round them after; but not
    beside DoRA's magnitudes, whose norms are of the float32 kernel. Experts stay in parts: each is
    gathered when its turn comes.
    """
    if not isinstance(node, Mapping):
        return node.whole() if isinstance(node, Shard) else node
    new = {
        name: child if name == "experts" else gather(child, dtype) for name, child in node.items()
    }
    kernel = node.get("kernel")
    if isinstance(kernel, Shard) and "magnitude" not in node.get("lora", {}):
        new["kernel"] = kernel.whole(dtype)
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
