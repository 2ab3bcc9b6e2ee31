"""Entry checks: a wrong argument fails here, by its name, and not three functions further down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def check_rank(name: str, array: jax.Array, rank: int) -> None:
    """Raises ValueError unless `array` has exactly `rank` axes."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {tuple(array.shape)}")


def check_same_shape(**arrays: jax.Array | None) -> None:
    """Raises ValueError unless all arrays have one shape; None stands for an argument not given."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if array is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"arrays must have the same shape, got {listed}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_intervals(
    values: Mapping[str, Any], intervals: Mapping[str, Sequence[str]], prefix: str = ""
) -> None:
    """Raises ValueError unless the values named for an interval as "[0, 1)" lie in it.

    NaN lies in none; None, or a name without a value, passes. `prefix` is for the message.
    """
    for interval, names in intervals.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names:
            if (value := values.get(name)) is not None:
                above = low <= value if interval[0] == "[" else low < value
                below = value <= high if interval[-1] == "]" else value < high
                check_range(prefix + name, value, above and below, interval)


def check_range(name: str, value: float, inside: bool, interval: str) -> None:
    """Raises ValueError naming the `interval` unless `value` is `inside` it."""
    if not inside:
        raise ValueError(f"{name} must be in {interval}, got {value}")
