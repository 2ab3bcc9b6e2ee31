"""Entry checks: a wrong argument fails here, by its name, and not three functions further down."""

from __future__ import annotations

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
