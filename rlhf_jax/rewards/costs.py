"""Costs of answers, which a policy is to keep below a limit while it maximises its reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import nan

from rlhf_jax.data.records import Prompt
from rlhf_jax.tasks.safety import is_due, refuses


def over_refusal(prompt: Prompt, response: str) -> float:
    """1 for a refusal where none is due, 0 for an answer; NaN where a refusal is due.

    Raises:
        UserError: the prompt does not say whether a refusal is due, as the town's and XSTest's do.
    """
    return nan if is_due(prompt) else float(refuses(prompt, response))


COSTS: Mapping[str, Callable[[Prompt, str], float]] = {"over_refusal": over_refusal}
"""By the name that `lagrange.cost` has for it; NaN of a reply that cannot have a cost."""
