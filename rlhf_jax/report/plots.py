"""The kinds of figure that a stage may put into evaluation.json, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rlhf_jax.report import figure
from rlhf_jax.report.frontier import draw_best_of_n, draw_frontier, draw_oracle

MODELS = (
    figure.PURPLE,
    figure.GREEN,
    figure.SKY,
    figure.GREY,
    figure.ORANGE,
    figure.BLUE,
)  # read from the end: the run's own model is blue
BINS = 30  # of a histogram
LETTERS = 60  # that fit below an axis


def draw(spec: Mapping[str, Any]) -> figure.Plot:
    """Draws an entry of `plots` in evaluation.json.

    Args:
        spec: "kind" is one of `KINDS`, "note" the caption; but for "section" the rest are the
            arguments of that kind's function.

    Raises:
        ValueError: on an unknown kind or arguments that do not fit it.
    """
    arguments = {k: v for k, v in spec.items() if k not in ("kind", "section", "note")}
    if spec.get("kind") not in KINDS:
        raise ValueError(f"unknown plot kind {spec.get('kind')!r}; known: {', '.join(KINDS)}")
    try:
        plot = KINDS[spec["kind"]](**arguments)
    except KeyError as error:
        raise ValueError(f"plot {spec.get('title')!r}: there is no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"plot {spec.get('title')!r}: {error}") from error
    return replace(plot, note=spec.get("note", ""))


def draw_reliability(
    title: str,
    *,
    ece: float,
    edges: Sequence[float],
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    counts: Sequence[int],
) -> figure.Plot:
    """Draws accuracy against confidence per bin (the fields of `Calibration`), counts below."""
    low, high = edges[:-1], edges[1:]
    header = ("bin_low", "bin_high", "confidence", "accuracy", "count")
    rows = list(zip(low, high, confidence, accuracy, counts, strict=True))
    with figure.open_axes(title, header, rows, height=3.0, panels=(3.2, 1)) as (panels, done):
        axes, histogram = panels
        filled = [i for i, n in enumerate(counts) if n]
        start = low[filled[0]] if filled else 0.0
        axes.plot(
            [start, 1], [start, 1], color=figure.INK, alpha=0.5, linewidth=0.8, linestyle="--"
        )
        axes.plot(
            [confidence[i] for i in filled], [accuracy[i] for i in filled], "-o", color=figure.BLUE
        )  # fmt: skip
        axes.text(0.03, 0.9, f"ECE {ece:.3f}", transform=axes.transAxes)
        figure.label_axes(axes, "", "accuracy")
        histogram.stairs(counts, edges, fill=True, color=figure.GREY)
        axes.set_xlim(start - 0.02, 1.02)
        axes.tick_params(labelbottom=False)
        figure.label_axes(histogram, "predicted probability", "count")
    return done()


def draw_grouped_bars(
    title: str,
    *,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
) -> figure.Plot:
    """Draws a bar for each series (model) side by side in each group (reward component).

    Bars lie where the groups' names would not fit below standing ones.
    """
    names = list(series)
    rows = [(group, name, series[name][g]) for g, group in enumerate(groups) for name in names]
    lies = sum(len(group) + 2 for group in groups) > LETTERS
    height = 0.9 + len(groups) * (0.09 * len(names) + 0.08) if lies else figure.SIZE[1]
    with figure.open_axes(title, ("group", "series", "value"), rows, height) as (axes, done):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            places = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
            bars = axes.barh if lies else axes.bar
            color = MODELS[(i - len(names)) % len(MODELS)]
            bars(places, figure.to_floats(series[name]), width * 0.92, color=color, label=name)
        if lies:
            axes.axvline(0, color=figure.INK, linewidth=0.6)
            axes.grid(False, axis="y")
            axes.grid(True, axis="x")
            figure.label_axes(axes, ylabel, "")
            axes.set_yticks(range(len(groups)), groups)
            axes.set_ylim(len(groups) - 0.4, -0.6)  # the first one on top
        else:
            axes.axhline(0, color=figure.INK, linewidth=0.6)
            figure.label_axes(axes, "", ylabel)
            axes.set_xticks(range(len(groups)), groups)
            axes.tick_params(axis="x", length=0)
        figure.add_legend(axes)
    return done()


def draw_binned_accuracy(
    title: str,
    *,
    edges: Sequence[float],
    accuracy: Sequence[float | None],
    low: Sequence[float],
    high: Sequence[float],
    counts: Sequence[int],
    xlabel: str,
) -> figure.Plot:
    """Draws accuracy with intervals in open-ended bins (the fields of `BinnedAccuracy`)."""
    labels = _name_bins(edges)
    rows = list(zip(labels, accuracy, low, high, counts, strict=True))
    header = (xlabel, "accuracy", "low", "high", "count")
    with figure.open_axes(title, header, rows) as (axes, done):
        filled = [i for i, n in enumerate(counts) if n]
        axes.axhline(0.5, color=figure.INK, alpha=0.5, linewidth=0.8, linestyle="--")
        axes.vlines(
            filled,
            [low[i] for i in filled],
            [high[i] for i in filled],
            color=figure.BLUE,
            linewidth=1.6,
        )
        axes.plot(filled, [accuracy[i] for i in filled], "o", color=figure.BLUE, markersize=5)
        figure.label_axes(axes, xlabel, "accuracy")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(0, 1)
        ticks = [f"{label}\n{n:,}" for label, n in zip(labels, counts, strict=True)]
        axes.set_xticks(range(len(labels)), ticks, fontsize=8 if len(labels) < 6 else 6)
    return done()


def draw_histogram(
    title: str, *, values: Mapping[str, Sequence[float]], xlabel: str
) -> figure.Plot:
    """Draws a histogram of each series over common bins, e.g. rewards of chosen and rejected."""
    import numpy as np

    flat = np.concatenate([np.asarray(v, np.float64) for v in values.values()])
    edges = np.histogram_bin_edges(flat, BINS)
    counts = {name: np.histogram(v, edges)[0] for name, v in values.items()}
    rows = [
        (name, low, high, int(n))
        for name, ns in counts.items()
        for (low, high), n in zip(pairwise(edges.tolist()), ns, strict=True)
    ]
    with figure.open_axes(title, ("series", "bin_low", "bin_high", "count"), rows) as (axes, done):
        for i, (name, ns) in enumerate(counts.items()):
            color = figure.LINES[i % len(figure.LINES)]
            axes.stairs(ns, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(ns, edges, color=color, linewidth=1.2, label=name)
        figure.label_axes(axes, xlabel, "count")
        if len(counts) > 1:
            figure.add_legend(axes)
    return done()


KINDS: dict[str, Callable[..., figure.Plot]] = {
    "reliability": draw_reliability,
    "grouped_bars": draw_grouped_bars,
    "binned_accuracy": draw_binned_accuracy,
    "histogram": draw_histogram,
    "frontier": draw_frontier,
    "best_of_n": draw_best_of_n,
    "oracle": draw_oracle,
}


def _name_bins(edges: Sequence[float]) -> list[str]:
    """Names the bins (−∞, e₀), …, [e₋₁, ∞) between half-integers by the integers they hold."""
    first, last = ([figure.format_tick(edge + side) for edge in edges] for side in (0.5, -0.5))
    inner = [a if a == b else f"{a}…{b}" for a, b in zip(first[:-1], last[1:], strict=True)]
    return [f"≤{last[0]}", *inner, f"≥{first[-1]}"]
