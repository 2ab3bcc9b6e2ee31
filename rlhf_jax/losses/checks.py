"""Entry checks: a wrong argument fails here, by its name, and not three functions further down."""

from __future__ import annotations

import dataclasses
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


def within(interval: str, default: float | None) -> Any:
    """A field of a loss's options: a number in an interval, as "[0, 1)"; None is always allowed."""
    return dataclasses.field(default=default, metadata={"within": interval})


def check_within(name: str, value: float, interval: str) -> None:
    """Raises ValueError unless `value` is in the interval."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    if not (above and (value <= high if interval[-1] == "]" else value < high)):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check_options(options: Any) -> None:
    """Raises ValueError unless every field of a dataclass is in the interval that it states."""
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if value is not None and (interval := each.metadata.get("within")):
            check_within(each.name, value, interval)
