"""Before and after, in rows that are each of the same records, and in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from rlhf_jax.report.tables import METRICS, format_metric, with_unit
from rlhf_jax.training.meanings import is_less_better

# The metrics of which it can be said that a change is for better or worse.
JUDGED = ("gold_reward", "proxy_reward", "pass_at_1", "accuracy", "token_accuracy", "bpb", "loss")
POINTS = "\u00a0points"  # what a difference of percentages is counted in
# Five records that all changed to the same side do so by chance in 2 of 32 cases: more than 5 %.
_FEWEST = 6
Others = Mapping[str, Mapping[str, float]]  # model: metric without "eval/": value


def label_of(name: str) -> str:
    """A metric's name in words: that of `METRICS`, or what stands after "eval/"."""
    if name in METRICS:
        return METRICS[name][0]
    short = name.removeprefix("eval/")
    return short.replace("gold_reward/", "\u2003").replace("/", " ").replace("_", " ")


def format_change(name: str, value: float | None) -> str:
    """A difference of a metric, with its sign, in the metric's own format; a dash for none."""
    text = format_metric(name, value).replace("\u00a0%", POINTS)
    return f"+{text}" if value is not None and isfinite(value) and value > 0 else text


def format_interval(name: str, metrics: Mapping[str, float]) -> str:
    """The 95 % interval of a metric's change, "" where there is none."""
    ends = [metrics.get(f"change/{name.removeprefix('eval/')}_{end}") for end in ("low", "high")]
    if None in ends:
        return ""
    low, high = (format_change(name, end) for end in ends)
    return f"{low.removesuffix(POINTS)} to {high}"


def rows_of(
    metrics: Mapping[str, float], others: Others, models: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """(label, cells) of every metric of a run: models before it, itself, change, interval.

    Only what a run measured of other models itself stands beside its own: on the same records, with
    the same limits.

    Args:
        metrics: of the run's summary.json.
        others: what the run measured of other models.
        models: their names, the one it started from last.
    """
    order = list(METRICS)

    def rank(name: str) -> tuple[int, str]:
        whole = "/".join(name.split("/")[:2])
        return (order.index(whole) if whole in order else len(order), name)

    rows = []
    for name in sorted((name for name in metrics if name.startswith("eval/")), key=rank):
        if name.endswith(("_low", "_high")):
            continue
        short = name.removeprefix("eval/")
        before = [others.get(model, {}).get(short) for model in models]
        if before and f"before/{short}" in metrics:
            before[-1] = metrics[f"before/{short}"]
        change = format_change(name, metrics.get(f"change/{short}"))
        cells = [format_metric(name, value) for value in (*before, metrics[name])]
        rows.append((label_of(name), [*cells, change, format_interval(name, metrics) or "–"]))
    return rows


def judge_changes(metrics: Mapping[str, float]) -> list[str]:
    """A sentence for each change that can be for better or worse, as strong as its interval."""
    sentences = []
    for short in [n.removeprefix("before/") for n in metrics if n.startswith("before/")]:
        full, name = f"eval/{short}", f"change/{short}"
        if not (short in JUDGED or short.startswith("correct/")) or full not in metrics:
            continue
        better = -1 if is_less_better(full) else 1
        low, high = (better * metrics[f"{name}_{end}"] for end in ("low", "high"))
        verdict = "no difference that so few records could show"
        if metrics[f"{name}_records"] < _FEWEST:
            verdict = f"fewer than {_FEWEST} records can show no difference"
        elif min(low, high) > 0:
            verdict = "better"
        elif max(low, high) < 0:
            verdict = "worse"
        sentences.append(
            f"{label_of(full)} on the same {metrics[f'{name}_records']:,.0f} held-out records: "
            f"{format_metric(full, metrics[f'before/{short}'])} before, "
            f"{format_metric(full, metrics[f'before/{short}'] + metrics[name])} after, "
            f"{format_change(full, metrics[name])} (95 % interval "
            f"{format_interval(full, metrics)}): {verdict}."
        )
    return sentences


def console_rows(
    metrics: Mapping[str, float], others: Others, models: Sequence[str]
) -> list[list[Any]]:
    """The rows of `rows_of` that have a place in `METRICS`, below them the 95 % intervals.

    They are of the models before, the run's own, and the change; the label names the unit.
    """
    labels = {label_of(name): name for name in METRICS if name in metrics}
    rows: list[list[Any]] = []
    for label, (*cells, change, interval) in rows_of(metrics, others, models):
        if label not in labels:
            continue
        rows.append([with_unit(labels[label]), *cells, change])
        ends = [metrics.get(f"{labels[label]}_{end}") for end in ("low", "high")]
        own = "–" if None in ends else "–".join(format(end, ".3g") for end in ends)
        if (own, interval) != ("–", "–"):
            rows.append(["  95 % interval", *["–"] * len(models), own, interval])
    return rows
