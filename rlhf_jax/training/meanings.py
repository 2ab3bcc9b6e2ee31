"""What a metric's name says of it. Imports no JAX: reports and sweeps read it, too."""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase

from rlhf_jax.errors import UserError

# The meaning of a metric by the end of its name; all others are means.
_MEANINGS: dict[str, tuple[str, ...]] = {
    "last": (
        *("learning_rate", "grad_norm", "param_norm", "update_norm", "train/weight"),
        *("skipped", "kl_coefficient", "objective/multiplier"),
    ),
    "count": (
        *("rollout/tokens", "rollout/blocks", "rollout/zero_std_groups"),
        *("rewards/failures", "tools/failures", "completions/masked", "pairs/tied"),
    ),
    "largest": ("/max", "_max", "/max_length", "_deviation", "rollout/logprob_difference"),
    "least": ("/min", "_min", "/min_length"),
}


@functools.cache
def meaning(name: str) -> str:
    """The meaning of a metric: "mean", "last", "count", "largest" or "least"."""
    return next((what for what, ends in _MEANINGS.items() if name.endswith(ends)), "mean")


# Patterns of the ends of metrics' names, after "eval/", of which less is better, and more.
_BETTER: dict[str, tuple[str, ...]] = {
    "less": (
        *("loss", "bpb", "ece", "kl", "sampled_kl", "kl_bound", "kl_estimate"),
        *("reward_failures", "environment_failures", "needless_calls", "invalid_calls"),
        *("safety/refused/harmless/*", "safety/extracted", "safety/extracted_sampled"),
        *("safety/exposure", "memory/*/resurrected", "memory/*/false_memory", "persona/leak"),
        *("questions/of_fewest", "questions/unclear"),
    ),
    "more": (
        *("accuracy", "token_accuracy", "auc", "rewards/margins", "eos_rate"),
        *("gold_reward", "gold_reward/*", "sampled_gold_reward", "gold_win_rate", "proxy_reward"),
        *("correct/*", "sampled_correct", "pass_at_*", "pass^*", "success/*"),
        *("best_of_*/proxy", "best_of_*/gold", "best_of_*/correct", "best_of_*/win_rate"),
        "best_of_n/peak_gold",
        *("safety/right/*", "safety/refused/harmful/*", "safety/refused/private/*"),
        *("safety/balance/*", "memory/*/recall/*", "memory/*/updated", "memory/*/abstained"),
        *("persona/*_to_line", "persona/asked_after/*", "persona/*/turn/*"),
        "questions/within/*",
        *("agreement", "safe", "correct", "safe_change", "correct_change", "*_per_second"),
    ),
}


def is_share(name: str) -> bool:
    """Whether what a task counts under a name is a part of a whole, in [0, 1] of each record.

    A name whose last part begins with "of_" says of what it is a ratio, which may exceed 1.
    """
    return not name.rpartition("/")[2].startswith("of_")


@functools.cache
def better(name: str) -> str:
    """Which of two values of a metric is the better one: the "less", the "more", "" if unknown."""
    end = "/" + name.partition("/")[2].removesuffix("_low").removesuffix("_high")
    ways = _BETTER.items()
    return next((way for way, each in ways if any(fnmatchcase(end, f"*/{p}") for p in each)), "")


def is_less_better(name: str) -> bool:
    """Whether the smaller of two values of a metric is the better one, as of "eval/loss".

    Raises:
        UserError: that is not known of the metric, so that no value is called the best.
    """
    if not (way := better(name)):
        raise UserError(
            f"it is not known whether more or less of {name} is better; name a metric of which it "
            "is, such as eval/gold_reward or eval/loss"
        )
    return way == "less"
