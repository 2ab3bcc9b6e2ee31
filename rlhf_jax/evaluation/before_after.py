"""What training changed: a number of the same records before it and after it, with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.statistics import resample


class Values(NamedTuple):
    """A metric of N records: Σ sums / Σ weights, [N] each. Weights of 1 make it a mean."""

    sums: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, sums: ArrayLike, weights: ArrayLike | None = None) -> Values:
        """Both as float64; the weights are 1 where there are none."""
        values = np.asarray(sums, np.float64)
        return cls(values, np.ones_like(values) if weights is None else np.asarray(weights, float))

    @property
    def mean(self) -> float:
        """The metric."""
        return float(self.sums.sum() / self.weights.sum())


Measured = Mapping[str, Values]  # by names without "eval/", as "loss"


class Evaluated(NamedTuple):
    """An evaluation of a model, with what of it compares with the same of another model."""

    metrics: dict[str, float]
    figures: list[dict[str, Any]]  # what `report.plots.draw` draws
    values: Measured


def changes(before: Measured, after: Measured, seed: int) -> dict[str, float]:
    """before/<name>, change/<name> with its 95 % interval, and of how many records, of each metric.

    The interval is a percentile bootstrap of the difference in which records are drawn with
    replacement, each with what it was before and after: the same records differ far less between
    two models than two samples of records do.

    Args:
        before, after: metrics of the same records in the same order.
        seed: of the resampling.

    Raises:
        ValueError: a metric is of other records before than after.
    """
    metrics: dict[str, float] = {}
    for name in [name for name in after if name in before]:
        old, new = before[name], after[name]
        if old.sums.shape != new.sums.shape:
            raise ValueError(f"{name}: {old.sums.shape} records before, {new.sums.shape} after")
        count = len(new.sums)
        low, high = np.nanquantile(_differences(old, new, seed), [0.025, 0.975])
        metrics |= {
            f"before/{name}": old.mean,
            f"change/{name}": new.mean - old.mean,
            f"change/{name}_low": float(low),
            f"change/{name}_high": float(high),
            f"change/{name}_records": float(count),
        }
    return metrics


def _differences(old: Values, new: Values, seed: int) -> np.ndarray:
    """The metric's difference for each resampling of the records, [2000]."""
    found = []
    for draws in resample(len(new.sums), seed):
        with np.errstate(invalid="ignore"):  # a draw of records without any weight
            after = (draws @ new.sums) / (draws @ new.weights)
            found.append(after - (draws @ old.sums) / (draws @ old.weights))
    return np.concatenate(found)


def to_json(measured: Measured) -> dict[str, list[list[float]]]:
    """What JSON can hold of them, exactly."""
    return {name: [each.sums.tolist(), each.weights.tolist()] for name, each in measured.items()}


def from_json(document: Mapping[str, list[list[float]]]) -> dict[str, Values]:
    """The inverse of `to_json`."""
    return {name: Values.of(*values) for name, values in document.items()}
