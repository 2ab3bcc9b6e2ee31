"""What this machine can do at most: python -m benchmarks.limits jax|torch SHAPE [--bfloat16]
[--numbers=N].

A process that takes turns as the sides do, for the machine's speed drifts. A round measures the
FLOP/s of matrix products at the model's own shapes (those of one update: tokens × width × width,
× mlp_width and × vocab_size, by their share of the work), and the bytes a second of reading N
numbers, as many as the model has if not given, by a product with one row or by a sum, whichever is
faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from benchmarks import work
from benchmarks.worker import Turns

Run = Callable[[], object]


class Library(NamedTuple):
    """What is measured: `product` (m, k, n) and `total` (numbers) make something to be timed."""

    product: Callable[[int, int, int], Run]
    total: Callable[[int], Run]
    number: int  # bytes
    version: str


def seconds(run: Run, least: float = 0.15) -> float:
    """Median of repeated runs over at least so many seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times)


def products(shape: work.Shape, tokens: int) -> list[tuple[int, int, int, float]]:
    """(m, k, n, share of the work) of the products of one pass over so many tokens."""
    sizes = [
        (shape.width, shape.width, 4 * shape.layers),
        (shape.width, shape.mlp_width, 3 * shape.layers),
        (shape.width, shape.vocab_size, 1),
    ]
    whole = shape.matrix_numbers
    return [(tokens, k, n, times * k * n / whole) for k, n, times in sizes]


def with_jax(bfloat16: bool) -> Library:
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    multiply, add = jax.jit(jnp.matmul), jax.jit(jnp.sum)

    def product(m: int, k: int, n: int) -> Run:
        x, y = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        return lambda: multiply(x, y).block_until_ready()

    def total(count: int) -> Run:
        x = jnp.ones(count, dtype)
        return lambda: add(x).block_until_ready()

    return Library(product, total, dtype(0).itemsize, jax.__version__)


def with_torch(bfloat16: bool) -> Library:
    import torch

    torch.set_num_threads(2)
    if bfloat16:
        torch.set_float32_matmul_precision("medium")

    def product(m: int, k: int, n: int) -> Run:
        x, y = torch.ones(m, k), torch.ones(k, n)
        return lambda: torch.mm(x, y)

    def total(count: int) -> Run:
        x = torch.ones(count)
        return lambda: x.sum()

    return Library(product, total, 4, torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=("jax", "torch"))
    parser.add_argument("shape", choices=work.SHAPES)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--numbers", type=int)
    given = parser.parse_args()
    turns, shape = Turns(), work.SHAPES[given.shape]
    library = (with_jax if given.library == "jax" else with_torch)(given.bfloat16)
    timed = [
        (library.product(m, k, n), share / (2.0 * m * k * n))
        for m, k, n, share in products(shape, shape.rows * shape.context)
    ]
    numbers = given.numbers or shape.matrix_numbers
    numbers -= numbers % shape.width
    readers = [library.product(1, shape.width, numbers // shape.width), library.total(numbers)]
    for run in [*readers, *(run for run, _ in timed)]:
        run()
    turns.ready(version=library.version)
    while True:
        turns.wait()
        flops = 1 / sum(seconds(run) * share for run, share in timed)
        read = library.number * numbers / min(map(seconds, readers))
        turns.done(1, flops=flops, bytes=read, number=library.number)


if __name__ == "__main__":
    main()
