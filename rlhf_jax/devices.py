"""Which devices train, and which decode.

A training step keeps the cores of a CPU busy by itself: its products are large. The products of a
decoding step are over before a second core has begun, so there every core, as a device of its own,
decodes some of the rows.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from rlhf_jax import hosts

ROWS = "rows"  # the axis of a decoding mesh
_FEWEST = 32  # rows a core: with fewer, reading all weights on each core costs more than it saves
_MOST = 8  # cores: rows for more of them are rare
_cores = 1  # CPU devices that `split_cores` made


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
    devices = jax.devices()
    return devices[:1] if _are_cores(devices) else devices


def decoding_mesh(params: Any, rows: int) -> Mesh | None:
    """Devices that decode `rows` rows between them, as many each and with parameters of their own.

    Those that have the parameters now, or all cores if one has. None for a single device, and for
    parameters that are spread over several.
    """
    leaves = jax.tree.leaves(params)
    if not all(leaf.sharding.is_fully_replicated for leaf in leaves):
        return None
    devices = sorted(leaves[0].devices(), key=lambda device: device.id)
    fewest = 1
    if _are_cores(devices):
        devices, fewest = jax.devices("cpu"), _FEWEST
    counts = range(2, min(len(devices), rows // fewest) + 1)
    if hosts.count() > 1:  # each has to see the tokens
        counts = range(len(devices), len(devices) + 1)
    count = max((n for n in counts if rows % n == 0), default=1)
    if count == 1:
        return None
    return jax.make_mesh((count,), (ROWS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def _are_cores(devices: list[jax.Device]) -> bool:
    return _cores > 1 and devices[0].platform == "cpu"
