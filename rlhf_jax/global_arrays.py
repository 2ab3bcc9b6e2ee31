"""Arrays that lie in parts on the devices of several processes: put there, and read back.

With one process they are as any others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_PIECE = 2**28  # bytes of an array that every device holds at a time


def put(tree: Any, place: NamedSharding) -> Any:
    """`jax.device_put`, also onto devices of several processes, each of which has the whole tree.

    Each process puts the parts that its own devices hold.
    """
    if place.is_fully_addressable:
        return jax.device_put(tree, place)
    return jax.tree.map(lambda leaf: _put(leaf, place), tree)


def _put(value: Any, place: NamedSharding) -> jax.Array:
    if not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, place)
    parts = place.addressable_devices_indices_map(np.shape(value))
    arrays = [jax.device_put(value[index], device) for device, index in parts.items()]
    return jax.make_array_from_single_device_arrays(np.shape(value), place, arrays)


def to_host(tree: Any) -> Any:
    """`jax.device_get`, also of arrays in parts; every process reads the whole, and calls this."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [i for i, leaf in enumerate(leaves) if _is_apart(leaf)]
    if apart:
        whole = _gather(leaves[apart[0]].sharding.mesh)([leaves[i] for i in apart])
        for i, leaf in zip(apart, whole, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, jax.device_get(leaves))


def pieces(array: Any) -> Iterator[np.ndarray]:
    """The array on the host, one after the other some of its rows, if it lies in parts.

    So every device holds a piece of it beside its own part, and never the whole.
    """
    if not _is_apart(array):
        yield np.asarray(array)
        return
    rows = max(1, _PIECE * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield to_host(array[start : start + rows])


def _is_apart(leaf: Any) -> bool:
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return not (is_here or leaf.is_fully_replicated)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Returns the function that has every device of a mesh hold the whole of some arrays."""
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))
