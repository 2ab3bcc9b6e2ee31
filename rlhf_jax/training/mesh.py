"""Device meshes of a run: made from its config, and arrays put on them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.config import Config
from rlhf_jax.devices import AXES, training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.global_arrays import put
from rlhf_jax.models.sharding import BATCH_AXES, TRANSFORMER_RULES, Rules, batch_shards, spec_of
from rlhf_jax.trees import named_leaves


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes data, fsdp and tensor (those not named have size 1).

    One size may be -1: whatever is left of the devices. Axes are Auto: the compiler propagates.

    Raises:
      UserError: unknown axis, or sizes whose product is not the number of devices.
    """
    devices = training_devices() if devices is None else list(devices)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise UserError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(AXES)}")
    sizes = {name: int(axes.get(name, 1)) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise UserError(f"mesh sizes must be positive, one of them may be -1: got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // math.prod(s for s in sizes.values() if s != -1)
    if math.prod(sizes.values()) != len(devices):
        near = _nearest(sizes, len(devices), free)
        stated = " ".join(f"{name}={size}" for name, size in axes.items())
        raise UserError(f"mesh {stated} does not fit {len(devices)} devices; {near} would")
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _nearest(sizes: Mapping[str, int], devices: int, free: Sequence[str]) -> str:
    """The sizes that do fit the devices, with the fewest changed by the least factors."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fitting = [
        chosen
        for chosen in itertools.product(divisors, repeat=len(sizes))
        if math.prod(chosen) == devices
    ]
    fixed = [i for i, name in enumerate(sizes) if name not in free]
    asked = [*sizes.values()]
    best = min(
        fitting,
        key=lambda each: (
            sum(each[i] != asked[i] for i in fixed),
            sum(abs(math.log(each[i] / max(asked[i], 1))) for i in fixed),
        ),
    )
    named = zip(sizes, best, strict=True)
    return " ".join(f"{name}={size}" for name, size in named if size > 1) or "one device"


def shardings(mesh: Mesh, tree, rules: Rules = TRANSFORMER_RULES):
    """Returns the tree of NamedShardings for a tree of arrays: params, or a whole TrainState.

    The first rule whose regex is found in a leaf's name decides, so optimizer moments, whose names
    end with their parameter's, lie where the parameter lies. Scalars and vectors, and optimizer
    statistics of lower rank than the rule's spec (Adafactor's factors), are replicated. A dimension
    that its mesh axes do not divide is replicated, and logged.

    Raises:
      UserError: an array of rank 2 or more that no rule matches.
    """
    places = [sharding(mesh, n, leaf.shape, rules) for n, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), places)


def sharding(
    mesh: Mesh, name: str, shape: tuple[int, ...], rules: Rules = TRANSFORMER_RULES
) -> NamedSharding:
    """The sharding of one array by its "/"-joined name; see `shardings`."""
    return NamedSharding(mesh, spec_of(mesh, name, shape, rules))


def placed(mesh: Mesh | None, tree, rules: Rules = TRANSFORMER_RULES):
    """The tree's arrays where the rules put them; an array that is in it twice stays one.

    Without a mesh they are as they were. Of a `ShapeDtypeStruct` it is said where it would lie.
    """
    if mesh is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    there: dict[int, Any] = {}
    for leaf, place in zip(leaves, jax.tree.leaves(shardings(mesh, tree, rules)), strict=True):
        if id(leaf) not in there:
            shaped = isinstance(leaf, jax.ShapeDtypeStruct)
            there[id(leaf)] = shaped_at(leaf, place) if shaped else put(leaf, place)
    return jax.tree.unflatten(structure, [there[id(leaf)] for leaf in leaves])


def shaped_at(leaf: Any, place: Sharding) -> jax.ShapeDtypeStruct:
    """What there is to know of an array that lies in that place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def overlapping(mesh: Mesh | None) -> dict[str, bool]:
    """Compiler options under which GPUs compute while their collectives are under way.

    Not XLA's defaults. With the second a layer's weights are gathered during the layer before,
    although the layers are one loop. TPUs do both by themselves.
    """
    if mesh is None or mesh.devices.flat[0].platform != "gpu" or mesh.size == 1:
        return {}
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
    }


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def shard_batch(mesh: Mesh | None, batch):
    """Puts a host batch on the devices, rows over (data, fsdp).

    Every process has the whole batch, and puts the rows of its own devices.

    Raises:
      UserError: the rows do not divide evenly over the devices.
    """
    shards = batch_shards(mesh)
    for name, array in batch.items():
        if array.shape[0] % shards:
            raise UserError(
                f"batch[{name!r}] has {array.shape[0]} rows, not a multiple of the {shards} parts "
                "(data x fsdp) of the mesh"
            )
    return jax.device_put(batch) if mesh is None else put(batch, batch_sharding(mesh))


def mesh_of(config: Config) -> Mesh | None:
    """The mesh the config describes, which must fit the devices; None on one device."""
    devices = training_devices()
    mesh = make_mesh({"data": -1, **dataclasses.asdict(config.mesh)}, devices)
    return mesh if len(devices) > 1 else None


def check_width(config: Config, width: int) -> None:
    """UserError for a mesh whose axis fsdp splits no parameter of a model of that width."""
    size = config.mesh.fsdp
    if width % size:
        raise UserError(
            f"config: mesh.fsdp = {size} does not divide the model's width of {width}, so every "
            f"device would hold all parameters; the nearest that does is {math.gcd(width, size)}"
        )


def mesh_under(params) -> Mesh | None:
    """The training mesh that parameters lie on; None if they lie on one device or elsewhere."""
    place = next((getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)), None)
    if isinstance(place, NamedSharding) and place.mesh.axis_names == AXES:
        return cast(Mesh, place.mesh)
    return None


def step_tokens(config: Config) -> int:
    """Tokens that a training step works on at a time on one device.

    A pass without a backward one over as many takes less memory.
    """
    parts = config.batch.microbatches * batch_shards(mesh_of(config))
    return max(1, config.batch.rows // parts) * config.data.row_length
