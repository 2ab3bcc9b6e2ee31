"""Metrics of steps by name, and what a line says of several steps or a step of several parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.files import numbers, read_lines
from rlhf_jax.global_arrays import to_host
from rlhf_jax.training.meanings import meaning

@jax.tree_util.register_pytree_node_class
class Metrics(dict[str, Any]):
    """Scalars by name, a dict like any other, that reach the host in one transfer.

    Attributes:
      packed: f32 [2, names], all values, and the weight of those that are means (else 1).
    """

    def __init__(self, values: Mapping[str, Any], packed: Any):
        super().__init__(values)
        self.packed = packed

    @classmethod
    def of(cls, values: Mapping[str, Any], weights: Mapping[str, Any]) -> Metrics:
        """Metrics of a step on the device, from values and weights by name."""
        rows = [[*values.values()], [weights.get(name, 1) for name in values]]
        return cls(values, jnp.array(rows, jnp.float32))

    @classmethod
    def of_pairs(cls, pairs: Mapping[str, tuple[float, float]]) -> Metrics:
        """Metrics on the host, from (value, weight) by name."""
        packed = np.array([*pairs.values()], np.float32).reshape(-1, 2).T
        return cls(dict(zip(pairs, packed[0], strict=True)), packed)

    def tree_flatten(self) -> tuple[tuple[list[Any], Any], tuple[str, ...]]:
        """Takes apart for JAX: (children, names)."""
        return ([*self.values()], self.packed), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> Metrics:
        """Puts together for JAX what `tree_flatten` took apart."""
        values, packed = children
        return cls(dict(zip(names, values, strict=True)), packed)


def fetch(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(values, weights) by name, on the host."""
    if isinstance(metrics, Metrics):
        values, weights = to_host(metrics.packed).tolist()
    else:
        values = [np.asarray(value).item() for value in to_host([*metrics.values()])]
        weights = [1.0] * len(values)
    return dict(zip(metrics, values, strict=True)), dict(zip(metrics, weights, strict=True))


def weighted(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(value, weight) of each, on the host."""
    values, weights = fetch(metrics)
    return {name: (value, weights[name]) for name, value in values.items()}


def joined(*parts: Mapping[str, tuple[float, float]]) -> Metrics:
    """One step's metrics on the host from several (value, weight) by name, the last one of a name.

    A mean of nothing, whose weight is 0, is left out.
    """
    pairs = {name: pair for part in parts for name, pair in part.items()}
    return Metrics.of_pairs({name: pair for name, pair in pairs.items() if pair[1] != 0})


class Means:
    """One value per metric for the steps since the line before, by the metric's meaning.

    A mean is that of all these steps by its own weights, so that a ratio is a ratio of sums. A
    largest or least value is that of all, a count is the sum, and rate, norms, skips and the KL
    coefficient are the last step's. Sums are float64; the value for one step alone is its own, bit
    for bit.

    Args:
      state: the `state()` of another one, to go on from.
    """

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None):
        items = (state or {}).items()
        self._sums = {name: (value, weight) for name, (value, weight) in items if weight}

    def state(self) -> dict[str, tuple[float, float]]:
        """The sums that a checkpoint keeps, as JSON has them."""
        return dict(self._sums)

    def add(self, values: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """Takes the next step's metrics, as `fetch` gives them."""
        for name, value in values.items():
            if weights.get(name) == 0:
                continue
            weight, kind, before = 1.0, meaning(name), self._sums.get(name)
            if kind == "mean":
                weight = weights[name]
                value *= weight
            if before is not None:
                match kind:
                    case "mean" | "count":
                        value, weight = before[0] + value, before[1] + weight
                    case "largest":
                        value = float(np.maximum(before[0], value))
                    case "least":
                        value = float(np.minimum(before[0], value))
            self._sums[name] = value, weight

    def take(self) -> dict[str, float]:
        """Returns the values of a line, without means of nothing. The next line begins anew."""
        taken, self._sums = self._sums, {}
        return {
            name: value / weight if meaning(name) == "mean" else value
            for name, (value, weight) in taken.items()
        }


def merged(name: str, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The (total, weight) of two parts of a batch together, by the metric's meaning.

    Sums and weights of means add. A largest, a least or a count is (value, 1), or has weight 0
    where there is none.
    """
    (x, v), (y, w) = a, b
    match meaning(name):
        case "count":
            return x + y, jnp.maximum(v, w)
        case "largest" | "least" as kind:
            of_both = jnp.maximum(x, y) if kind == "largest" else jnp.minimum(x, y)
            of_one = jnp.where(v > 0, x, y)
            return jnp.where((v > 0) & (w > 0), of_both, of_one), jnp.maximum(v, w)
    return x + y, v + w


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl as numbers; damaged ones are left out, with a warning."""
    return [line for _, line in read_lines(Path(path), numbers)]
