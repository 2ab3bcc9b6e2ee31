"""Several reward models as one: how their scores combine, and how scores are put on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import combine
from rlhf_jax.models.scoring import Batch, sequence_scores
from rlhf_jax.trees import named_leaves

Array = TypeVar("Array", np.ndarray, jax.Array)
COMBINATIONS = ("mean", "min", "mean_minus_std")

# How a model starts and how it is computed: not what it computes.
_FREE = ("init_std", "copy_init", "unroll", "remat")

# Scores that differ by less than this share of their size differ by rounding only.
_RESOLUTION = 1e-6


def combine_members(scores: Array, how: str = "mean", k: float = 1.0) -> Array:
    """One score from those of K members; the cautious ways trust no single member's high score.

    "mean"; "min" (worst case) and "mean_minus_std" (mean − k·std, the population's, over members)
    are conservative: "Reward Model Ensembles Help Mitigate Overoptimization",
    https://arxiv.org/abs/2310.02743.

    Args:
        scores: [K, N], NumPy's or JAX's.

    Returns:
        [N] of the same kind.

    Raises:
        UserError: `how` is none of `COMBINATIONS`.
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores must be [K, N] with K ≥ 1, not {scores.shape}")
    match how:
        case "mean":
            return scores.mean(axis=0)
        case "min":
            return scores.min(axis=0)
        case "mean_minus_std":
            return scores.mean(axis=0) - k * scores.std(axis=0)
    raise UserError(f"an ensemble's scores combine by {', '.join(COMBINATIONS)}, not {how!r}")


def same_config(configs: Sequence[ModelConfig], names: Sequence[str]) -> None:
    """Refuses models that one config cannot score, though their parameters may be alike in shape.

    Args:
        configs: of the models.
        names: what to call each, e.g. its run directory.

    Raises:
        UserError: two differ: names the first field that does, and both models.
    """
    for config, name in zip(configs, names, strict=True):
        for field in fields(ModelConfig):
            ours, theirs = getattr(configs[0], field.name), getattr(config, field.name)
            if ours != theirs and field.name not in _FREE:
                raise UserError(
                    f"the reward models of an ensemble must have one config: {field.name} is "
                    f"{ours!r} in {names[0]} and {theirs!r} in {name}"
                )


class Members(NamedTuple):
    """The parameters of K models: `shared` are the same arrays in all, `own` leaves are [K, …].

    A score head is always its model's own.
    """

    own: dict[str, Any]
    shared: dict[str, Any]


def stack_members(members: Sequence[Any]) -> Members:
    """The parameters of K models of one config; what they share, as adapters do, is not copied.

    Raises:
        UserError: there are none, or they are not of one config: names the first leaf that differs.
    """
    if not members:
        raise UserError("an ensemble needs at least one reward model")
    first = _leaves(members[0])
    for number, member in enumerate(members[1:], start=1):
        other = _leaves(member)
        for name in [*first, *other]:
            ours, theirs = first.get(name, "none"), other.get(name, "none")
            if ours != theirs:
                raise UserError(
                    f"the reward models of an ensemble must have one config: {name} is {ours} in "
                    f"member 0 and {theirs} in member {number}"
                )

    def part(nodes: Sequence[Any], shared: bool, same: bool = True) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, child in nodes[0].items():
            children = [node[name] for node in nodes]
            if isinstance(child, Mapping):
                if below := part(children, shared, same and name != "score_head"):
                    tree[name] = below
            elif shared == (same and all(other is child for other in children)):
                tree[name] = child if shared else jnp.stack(children)
        return tree

    return Members(part(members, False), part(members, True))


def _leaves(params: Any) -> dict[str, str]:
    """Describes each leaf of a tree by its path: {"layers/norm/scale": "float32[2, 16]"}."""
    return {name: f"{leaf.dtype}{[*leaf.shape]}" for name, leaf in named_leaves(params).items()}


def member_scores(config: ModelConfig, members: Members, batch: Batch) -> jax.Array:
    """`sequence_scores` of every member on one batch: [K, B, P, Kb] f32."""

    def score(own: Mapping[str, Any]) -> jax.Array:
        return sequence_scores(config, combine(own, members.shared), batch)

    return jax.vmap(score)(members.own)


@dataclass(frozen=True)
class Normalization:
    """Puts scores on a scale where those of the reference samples have mean 0 and std 1."""

    mean: float
    std: float

    def apply(self, scores: Array) -> Array:
        """(scores − mean) / std, of any shape."""
        return (scores - self.mean) / self.std


def normalization_of(scores: np.ndarray | jax.Array) -> Normalization:
    """The mean and population std of reference samples' scores, of any shape.

    Raises:
        UserError: the scores are none, not finite, or all the same but for rounding.
    """
    values = np.asarray(scores, np.float64)
    if not values.size or not np.isfinite(values).all():
        bad = f"{np.count_nonzero(~np.isfinite(values))} of {values.size}"
        raise UserError(
            f"the reward model's scores of the reference samples can't be normalized: {bad} are "
            "not finite; train the reward model again"
            if values.size
            else "there are no reference samples to normalize the reward model's scores by"
        )
    if np.ptp(values) <= _RESOLUTION * np.abs(values).max():
        raise UserError(
            "the reward model gives every reference sample the same score "
            f"({values.flat[0]:.6g}); it has learnt nothing, or the samples are all alike"
        )
    return Normalization(float(values.mean()), float(values.std()))
