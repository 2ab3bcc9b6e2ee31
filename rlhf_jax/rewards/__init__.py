"""Rewards: scorers of (prompt, response) texts, and ensembles of reward models.

The exports are imported when first used: the worker process lives in this package and must start
without JAX or NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.rewards.ensemble import (
        Normalization,
        combine_members,
        member_scores,
        normalization_of,
        same_config,
        stack_members,
    )
    from rlhf_jax.rewards.scorers import Scores, TextScorers, parse_rewards

__all__ = [
    "Normalization",
    "Scores",
    "TextScorers",
    "combine_members",
    "member_scores",
    "normalization_of",
    "parse_rewards",
    "same_config",
    "stack_members",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "scorers" if name in ("Scores", "TextScorers", "parse_rewards") else "ensemble"
    return getattr(import_module(f"{__name__}.{module}"), name)
