"""Which devices train, and which decode.

A training step keeps the cores of a CPU busy by itself: its products are large. The products of a
decoding step are over before a second core has begun, so there every core, as a device of its own,
decodes some of the rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from rlhf_jax import hosts

AXES = ("data", "fsdp", "tensor")  # of every mesh; rows are split over the first two
_FEWEST = 32  # rows a core: with fewer, reading all weights on each core costs more than it saves
_MOST = 8  # cores: rows for more of them are rare
_cores = 1  # CPU devices that `split_cores` made
_planned: list[jax.Device] | None = None  # by `planning_for`


def split_cores() -> None:
    """Makes a device of every core, of the first eight; before JAX's first computation.

    Does nothing where CPU devices have been asked for by XLA_FLAGS or JAX_NUM_CPU_DEVICES.
    """
    global _cores
    flag = "xla_force_host_platform_device_count"
    asked = flag in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not asked:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        _cores = min(cores or 1, _MOST)
        jax.config.update("jax_num_cpu_devices", _cores)


def training_devices() -> list[jax.Device]:
    """All there are; of a CPU's cores the first, whose computations are spread over all of them."""
    if _planned is not None:
        return _planned
    devices = jax.devices()
    return devices[:1] if _are_cores(devices) else devices


@contextlib.contextmanager
def planning_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Within it these are the training devices; nothing need be able to run on them."""
    global _planned
    _planned = list(devices)
    try:
        yield
    finally:
        _planned = None


def decoding_mesh(params: Any, rows: int) -> Mesh | None:
    """Devices that decode `rows` rows between them, as many each.

    Those of the mesh that the parameters lie on, where the axis tensor splits every group of rows
    as it does in training, or all cores if one has the parameters. Devices of a single host are
    left out if the rows can't be split evenly over all; None for a single device.
    """
    place, fewest = jax.tree.leaves(params)[0].sharding, 1
    mesh = cast(Mesh, place.mesh) if isinstance(place, NamedSharding) else None
    if mesh is not None and hosts.count() > 1:
        return mesh
    if mesh is not None:
        devices = mesh.devices.reshape(-1, mesh.shape["tensor"])
    else:
        devices = np.array([[device] for device in place.device_set])
        if _are_cores([*place.device_set]):
            devices, fewest = np.array(jax.devices("cpu"))[:, None], _FEWEST
    counts = range(2, min(len(devices), rows // fewest) + 1)
    count = max((n for n in counts if rows % n == 0), default=1)
    if count * devices.shape[1] == 1:
        return None
    if mesh is not None and count == len(devices):
        return mesh
    return Mesh(devices[:count, None], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _are_cores(devices: list[jax.Device]) -> bool:
    return _cores > 1 and devices[0].platform == "cpu"
