"""What a metric's name says of it. Imports no JAX: reports and sweeps read it, too."""

from __future__ import annotations

import functools

# The meaning of a metric by the end of its name; all others are means.
_MEANINGS: dict[str, tuple[str, ...]] = {
    "last": (
        *("learning_rate", "grad_norm", "param_norm", "update_norm", "train/weight"),
        *("skipped", "kl_coefficient", "objective/multiplier"),
    ),
    "count": (
        *("rollout/tokens", "rollout/blocks", "rollout/zero_std_groups"),
        *("rewards/failures", "completions/masked", "pairs/tied"),
    ),
    "largest": ("/max", "_max", "/max_length", "_deviation", "rollout/logprob_difference"),
    "least": ("/min", "_min", "/min_length"),
}


@functools.cache
def meaning(name: str) -> str:
    """The meaning of a metric: "mean", "last", "count", "largest" or "least"."""
    return next((what for what, ends in _MEANINGS.items() if name.endswith(ends)), "mean")


def is_less_better(name: str) -> bool:
    """Whether the smaller of two values of a metric is the better one, as of "eval/loss"."""
    return name.rpartition("/")[2] in (
        *("loss", "bpb", "ece", "kl"),
        *("needless_calls", "invalid_calls"),
    )
