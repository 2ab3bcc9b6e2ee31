"""Chips that can be compiled for although they are not there: what they hold and how fast they are.

A device is what JAX calls one, of TPU v4 and 7x a half of a chip. Sources:
  memory     TPU: what its compiler lets a program use; GPU: OpenXLA's target_config/specs, of which
             JAX lets a program use three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION
  flops      dense bfloat16: https://jax-ml.github.io/scaling-book/tpus; NVIDIA's data sheets
  bandwidth  of the device's memory: the same, and OpenXLA's specs
  link       TPU: a link one way, by the first; its collectives over a slice use all that a chip has
             there: two along an axis, one along an axis of two. GPU: NVLink one way, among a host's
             cards; others exchange by the network (`NETWORK`)
  clock      TPU: flops / 2 / the products a cycle of its matrix units (4 x 128² a core, from v6e
             4 x 256²), in which its compiler counts cycles
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_jax.errors import UserError

ENVIRONMENT = {  # for a process that compiles for what is not there, before it imports JAX
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
NETWORK = 50e9  # B/s a card between hosts of eight: one network adapter of 400 Gb/s each
_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
      memory: bytes; of those that `devices_of` returns, what programs may use.
      flops, bandwidth, link: a second, of products in bfloat16, bytes of its memory and bytes that
        it sends to others; 0 where that is not known.
      clock: Hz of the compiler's cycles; 0: it counts none.
      example: a topology.
      target: of a GPU, what XLA's GpuTargetConfigProto differs in.
      host: cards of a host, which are linked; 0: all devices of a topology are.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    clock: float = 0.0
    example: str = ""
    target: str = ""
    host: int = 0


def _gpu(name: str, memory: int, flops: float, bandwidth: float, link: float, facts: str) -> Chip:
    target = f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      shared_memory_per_block: 49152 device_memory_size: {memory} memory_bandwidth: {bandwidth:.0f}
      {facts} }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{name}" """
    return Chip(memory, flops, bandwidth, link, example="8", target=target)


_HOPPER = """core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }"""
_AMPERE = """core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 minor: 0 }"""
_BLACKWELL = """core_count: 148 fpus_per_core: 128 clock_rate_ghz: 1.965 l2_cache_size: 132644864
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 10 minor: 0 }"""
CHIPS = {
    "v4": Chip(int(15.25 * _GIB), 137.5e12, 0.6e12, 22.5e9, 1.05e9, "2x2x1"),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 0.82e12, 45e9, 1.5e9, "4x4"),
    "v5p": Chip(int(95.73 * _GIB), 459e12, 2.8e12, 90e9, 1.75e9, "2x2x1"),
    "v6e": Chip(int(31.24 * _GIB), 918e12, 1.6e12, 90e9, 1.75e9, "2x4"),
    "tpu7x": Chip(int(94.74 * _GIB), 1153e12, 3.7e12, 45e9, 2.2e9, "2x2x1"),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 85100068864, 312e12, 2.04e12, 300e9, _AMPERE),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 84942979072, 989e12, 3.35e12, 450e9, _HOPPER),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", 151397597184, 989e12, 4.8e12, 450e9, _HOPPER),
    "b200": _gpu("NVIDIA B200", 191514411008, 2250e12, 7.67e12, 900e9, _BLACKWELL),
}


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
    """The kind and the devices of "v5e:4x4", "h100:8", or "cpu" for this machine's.

    The kind's link is then of all its links in the topology.

    Raises:
      UserError: there is no such topology, which names those there are, or its compiler is not
        installed.
    """
    if topology == "cpu":
        import jax

        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Chip(memory, 0, 0, 0), jax.devices("cpu")[:1]
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    known = ", ".join(f"{name}:{chip.example}" for name, chip in CHIPS.items())
    unknown = UserError(
        f"--topology={topology} is unknown; known are cpu and kinds with a shape or number of "
        f"devices, as {known}"
    )
    if chip is None or not re.fullmatch(r"\d+" if chip.target else r"\d+(x\d+){1,2}", shape):
        raise unknown
    sizes = [*map(int, shape.split("x"))]
    if len(sizes) > chip.example.count("x") + 1:  # v5e and v6e have no third axis
        raise unknown
    if 0 in sizes:
        raise unknown
    if not chip.target:
        links = sum(min(size - 1, 2) for size in sizes)
        chip = dataclasses.replace(chip, link=chip.link * max(links, 1))
        return chip, _described(unknown, platform="tpu", topology_name=topology)
    cards = math.gcd(sizes[0], 8) if sizes[0] > 8 else sizes[0]
    chip = dataclasses.replace(chip, memory=int(_memory_fraction() * chip.memory), host=cards)
    described = _described(
        unknown,
        platform="cuda",
        topology_name="",
        topology=f"1x{sizes[0] // cards}x{cards}",
        target_config=chip.target,
    )
    return chip, described


def _memory_fraction() -> float:
    """The share of a GPU's memory that JAX lets a program use, as its environment says."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    stated = next((os.environ[name] for name in names if os.environ.get(name)), "0.75")
    try:
        return float(stated)
    except ValueError as error:
        raise UserError(f"{' or '.join(names)} = {stated!r}: give a number") from error


def _described(unknown: UserError, **how: Any) -> list[Any]:
    """The devices that a compiler describes; UserError if it can't, or is not there."""
    from jax.experimental import topologies

    try:
        with _quiet():
            return list(topologies.get_topology_desc(**how).devices)
    except Exception as error:  # of no class of their own
        said = " ".join(str(error).split())[:160]
        if "INVALID_ARGUMENT" in said:
            raise UserError(f"{unknown} ({said})") from error
        raise UserError(
            f"no compiler for {how['platform'].upper()}s is installed here: pip install -r "
            f"requirements-plan.txt, of Python 3.12 or later ({said})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what a library says of missing devices off the console."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
