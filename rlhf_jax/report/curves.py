"""The curves of a training run: which of its metrics share a figure, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from math import isfinite
from typing import Any

from rlhf_jax.report.figure import LINES, Plot, add_legend, label_axes, open_axes, to_floats

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
# Title, unit, and names in metrics.jsonl without their train/, time/ or (held out) eval/. Metrics
# of another scale have a figure of their own; a * stands for any text, which then names the curve.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "", ("loss",)),
    ("Gold and proxy reward", "", ("gold_reward", "proxy_reward")),
    ("Scores", "", ("objective/scores", "objective/shaped_scores", "objective/rlhf_reward")),
    (
        "KL to the reference",
        "nats",
        ("objective/kl", "kl", "objective/kl_exact", "objective/kl_k2", "objective/kl_k3", "kl/*"),
    ),
    ("KL coefficient", "", ("objective/kl_coefficient",)),
    ("Cost and its price", "", ("objective/cost", "objective/multiplier")),
    ("Reward components", "", ("rewards/*/mean",)),
    ("Groups", "", ("frac_reward_zero_std", "reward_std")),
    ("Entropy", "nats per sequence", ("objective/entropy",)),
    ("Policy entropy", "nats per token", ("policy/entropy",)),
    ("Policy update", "nats", ("policy/approxkl", "policy/approxkl_k3")),
    ("Clipped share", "", ("policy/clipfrac", "policy/clipfrac_low", "policy/clipfrac_high")),
    ("Ratio", "new to old policy", ("policy/ratio", "policy/ratio_max")),
    ("Ratio spread", "", ("policy/ratio_var", "policy/ratio_deviation")),
    ("Value", "explained variance", ("val/explained_variance",)),
    ("Value loss", "", ("loss/value_avg",)),
    ("Lengths", "tokens", ("completions/mean_length", "completions/mean_terminated_length")),
    ("Ends of answers", "share", ("completions/eos_rate", "completions/clipped_ratio")),
    ("Rollout mismatch", "nats", ("rollout/logprob_difference",)),
    ("Rollout ratio", "trainer to sampler", ("rollout/ratio_max",)),
    ("Accuracy", "", ("rewards/accuracies", "accuracy", "token_accuracy")),
    ("Reward margin", "nats", ("rewards/margins",)),
    ("Rewards", "nats", ("rewards/chosen", "rewards/rejected")),
    ("Log-probabilities", "nats per sequence", ("logps/chosen", "logps/rejected")),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Throughput", "tokens/s", ("tokens_per_second",)),
)
PREFIXES = (("", ""), ("train/", ""), ("time/", ""), ("eval/", " held-out"))


def draw_training_curves(
    records: Sequence[Mapping[str, Any]], *, titles: Sequence[str] = (), suffix: str = ""
) -> list[Plot]:
    """Draws the panels of `PANELS` that the records of a metrics.jsonl hold, in that order.

    Args:
        records: one mapping per logged step, each with `step`.
        titles: only these panels; all if empty.
        suffix: added to the titles, e.g. " · sft".
    """
    logged = list(dict.fromkeys(key for record in records for key in record))
    plots = []
    for title, unit, names in PANELS:
        if titles and title not in titles:
            continue
        keys = _match_keys(logged, names)
        counts = Counter(short for short, _ in keys.values())
        series: dict[str, Any] = {
            full if counts[short] > 1 else short: tuple(
                zip(*((r["step"], r[key]) for r in records if key in r), strict=True)
            )
            for key, (short, full) in keys.items()
        }
        if series:
            plots.append(draw_curves(title + suffix, series, ylabel=unit))
    return plots


def draw_curves(
    title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str = ""
) -> Plot:
    """Draws lines through the points of each series; a non-finite value is a gap.

    Where points scatter the line is their running mean, and they are drawn beneath it.

    Args:
        title: of the figure.
        series: name → (steps, values). Points are marked where they are few, or where the name ends
            in "held-out".
        ylabel: of the vertical axis.
    """
    rows = [(name, x, y) for name, (xs, ys) in series.items() for x, y in zip(xs, ys, strict=True)]
    with open_axes(title, ("series", "step", "value"), rows) as (axes, done):
        for i, (name, (xs, ys)) in enumerate(series.items()):
            color, raw = LINES[i % len(LINES)], to_floats(ys)
            if (mean := running_mean(raw)) is not raw:
                axes.plot(xs, raw, "o", color=color, alpha=0.3, markersize=1.8, markeredgewidth=0)
            axes.plot(
                xs, mean, linestyle=DASHES[i % len(DASHES)], color=color,
                marker="o" if len(ys) <= 12 or name.endswith("held-out") else "", label=name,
            )  # fmt: skip
        label_axes(axes, "step", ylabel)
        if len(series) > 1:
            add_legend(axes)
    return done()


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, a twentieth of all, where values go up and down.

    Up and down they go if at least a quarter of their steps turn; a smooth curve, or one of a dozen
    points, is returned as it is. NaN stays NaN, and is in no mean.
    """
    steps = [b - a for a, b in pairwise(v for v in values if isfinite(v))]
    turns = sum(a * b < 0 for a, b in pairwise(steps))
    if len(values) <= 12 or 4 * turns < len(steps):
        return values
    reach = max(1, len(values) // 40)
    means = []
    for i, value in enumerate(values):
        side = min(reach, i, len(values) - 1 - i)  # as many on either side, so ends are not bent
        near = [v for v in values[i - side : i + side + 1] if isfinite(v)]
        means.append(sum(near) / len(near) if isfinite(value) else value)
    return means


def _match_keys(logged: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns logged key → (its last part, the whole name), as labels, in the order of `names`."""
    labels: dict[str, tuple[str, str]] = {}
    for name in names:
        before, star, after = name.partition("*")
        for prefix, ending in PREFIXES:
            for key in logged:
                if fnmatchcase(key, prefix + name):
                    full = key[len(prefix + before) : len(key) - len(after)] if star else name
                    short = (full if star else full.split("/")[-1]).replace("_", " ")
                    full = full.replace("_", " ").replace("/", " ")
                    labels[key] = (short + ending, full + ending)
    return labels
