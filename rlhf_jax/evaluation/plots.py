"""Figures as small SVG texts that follow the colours of the page, each with its data as CSV.

The colours are Okabe & Ito's, told apart by every common kind of colour vision; lines differ by
dash as well. Axes and text are drawn in `currentColor`, so that a figure inside a dark page is
light. The same input gives the same bytes. Matplotlib is imported at the first figure.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import isfinite, nan
from typing import Any

from rlhf_jax.evaluation.tables import format_percent

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
GREY, INK = "#999999", "#010203"  # INK stands for currentColor, which Matplotlib does not know
LINES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
MODELS = (PURPLE, GREEN, SKY, GREY, ORANGE, BLUE)  # read from the end: the run's own model is blue
SIZE = (4.4, 2.6)  # inches

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """`svg` stands alone or inside HTML; `csv` holds every plotted point; `note` is the caption."""

    title: str
    svg: str
    csv: str
    note: str = ""


def draw(spec: Mapping[str, Any]) -> Plot:
    """Draws an entry of `plots` in evaluation.json: `kind` names the function, the rest goes to it.

    Raises:
        ValueError: on an unknown kind or arguments that do not fit it.
    """
    arguments = {k: v for k, v in spec.items() if k not in ("kind", "section")}
    if spec.get("kind") not in KINDS:
        raise ValueError(f"unknown plot kind {spec.get('kind')!r}; known: {', '.join(KINDS)}")
    try:
        return KINDS[spec["kind"]](**arguments)
    except TypeError as error:
        raise ValueError(f"plot {spec.get('title')!r}: {error}") from error


def curves(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str = "step",
    ylabel: str = "",
    resumes: Sequence[float] = (),
    note: str = "",
) -> Plot:
    """Lines through the points (x, y) of each series; a non-finite y is a gap.

    Args:
        title: of the figure.
        series: name → (x, y). Points are marked where few, or where the name ends in "held-out".
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        resumes: where the run was resumed, marked by dotted lines.
        note: the caption.
    """
    rows = [(name, x, y) for name, (xs, ys) in series.items() for x, y in zip(xs, ys, strict=True)]
    with _figure(title, ("series", xlabel, "value"), rows, note) as (axes, done):
        for x in resumes:
            axes.axvline(x, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (1, 2)))
        for i, (name, (xs, ys)) in enumerate(series.items()):
            y = [_number(value) for value in ys]
            marked = len(y) <= 12 or name.endswith("held-out")
            color, dash = LINES[i % len(LINES)], DASHES[i % len(DASHES)]
            axes.plot(xs, y, dash, color=color, marker="o" if marked else "", label=name)
        _axes(axes, xlabel, ylabel)
        if len(series) > 1:
            _legend(axes)
        if resumes:
            axes.annotate(
                "resumed", (resumes[-1], 1), xycoords=("data", "axes fraction"),
                xytext=(3, -6), textcoords="offset points", fontsize=6.5, alpha=0.7,
            )  # fmt: skip
    return done()


def reliability(
    title: str,
    *,
    ece: float,
    edges: Sequence[float],
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    counts: Sequence[int],
    note: str = "",
) -> Plot:
    """Accuracy against confidence per bin (the fields of `Calibration`), with counts below."""
    low, high = edges[:-1], edges[1:]
    header = ("bin_low", "bin_high", "confidence", "accuracy", "count")
    rows = list(zip(low, high, confidence, accuracy, counts, strict=True))
    with _figure(title, header, rows, note, height=3.0, panels=(3.2, 1)) as (panels, done):
        axes, histogram = panels
        filled = [i for i, n in enumerate(counts) if n]
        start = low[filled[0]] if filled else 0.0
        axes.plot([start, 1], [start, 1], color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        axes.plot(
            [confidence[i] for i in filled], [accuracy[i] for i in filled], "-o", color=BLUE
        )  # fmt: skip
        axes.text(0.03, 0.9, f"ECE {ece:.3f}", transform=axes.transAxes)
        _axes(axes, "", "accuracy")
        histogram.stairs(counts, edges, fill=True, color=GREY)
        axes.set_xlim(start - 0.02, 1.02)
        axes.tick_params(labelbottom=False)
        _axes(histogram, "predicted probability", "count")
    return done()


def grouped_bars(
    title: str,
    *,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    low: Mapping[str, Sequence[float]] | None = None,
    high: Mapping[str, Sequence[float]] | None = None,
    ylabel: str = "",
    note: str = "",
) -> Plot:
    """Bars of each series (model) side by side in each group (reward component), with intervals."""
    names = list(series)
    lows, highs = low or {}, high or {}
    rows = [
        (group, name, series[name][g], *(s[name][g] if name in s else "" for s in (lows, highs)))
        for g, group in enumerate(groups)
        for name in names
    ]
    header = ("group", "series", "value", "low", "high")
    with _figure(title, header, rows, note) as (axes, done):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            x = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
            values = [_number(v) for v in series[name]]
            color = MODELS[(i - len(names)) % len(MODELS)]
            axes.bar(x, values, width * 0.92, color=color, label=name)
            if name in lows and name in highs:
                axes.vlines(x, lows[name], highs[name], color=INK, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=0.6)
        _axes(axes, "", ylabel)
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        _legend(axes)
    return done()


def intervals(
    title: str,
    *,
    labels: Sequence[str],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reference: float | None = None,
    xlabel: str = "",
    note: str = "",
) -> Plot:
    """Rates in [0, 1] as points with whiskers, one a line; `reference`, e.g. ½, is dashed."""
    rows = list(zip(labels, values, low, high, strict=True))
    height = 0.75 + 0.34 * len(labels)
    with _figure(title, ("label", "value", "low", "high"), rows, note, height) as (axes, done):
        if reference is not None:
            axes.axvline(reference, color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        y = range(len(labels))
        axes.hlines(y, low, high, color=BLUE, linewidth=1.6)
        axes.plot(values, y, "o", color=BLUE, markersize=5)
        for i, value in enumerate(values):
            axes.annotate(
                format_percent(value), (1, i), xycoords=("axes fraction", "data"), va="center",
                xytext=(4, 0), textcoords="offset points", annotation_clip=False,
            )  # fmt: skip
        _axes(axes, xlabel, "")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_yticks(y, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
    return done()


def binned_accuracy(
    title: str,
    *,
    edges: Sequence[float],
    accuracy: Sequence[float | None],
    low: Sequence[float],
    high: Sequence[float],
    counts: Sequence[int],
    xlabel: str = "",
    note: str = "",
) -> Plot:
    """Accuracy with intervals in open-ended bins (the fields of `BinnedAccuracy`), counts below."""
    labels = _bin_labels(edges)
    rows = list(zip(labels, accuracy, low, high, counts, strict=True))
    header = (xlabel or "bin", "accuracy", "low", "high", "count")
    with _figure(title, header, rows, note) as (axes, done):
        filled = [i for i, n in enumerate(counts) if n]
        axes.axhline(0.5, color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        axes.vlines(
            filled, [low[i] for i in filled], [high[i] for i in filled], color=BLUE, linewidth=1.6
        )
        axes.plot(filled, [accuracy[i] for i in filled], "o", color=BLUE, markersize=5)
        _axes(axes, xlabel, "accuracy")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(0, 1)
        size = 8 if len(labels) < 6 else 6
        axes.set_xticks(
            range(len(labels)),
            [f"{label}\n{n:,}" for label, n in zip(labels, counts, strict=True)],
            fontsize=size,
        )
    return done()


def histogram(
    title: str,
    *,
    values: Mapping[str, Sequence[float]],
    bins: int = 30,
    xlabel: str = "",
    note: str = "",
) -> Plot:
    """Histograms of each series over common bins, e.g. rewards of chosen and rejected."""
    import numpy as np

    flat = np.concatenate([np.asarray(v, np.float64) for v in values.values()])
    edges = np.histogram_bin_edges(flat, bins)
    counts = {name: np.histogram(v, edges)[0] for name, v in values.items()}
    rows = [
        (name, low, high, int(n))
        for name, ns in counts.items()
        for (low, high), n in zip(pairwise(edges.tolist()), ns, strict=True)
    ]
    with _figure(title, ("series", "bin_low", "bin_high", "count"), rows, note) as (axes, done):
        for i, (name, ns) in enumerate(counts.items()):
            color = LINES[i % len(LINES)]
            axes.stairs(ns, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(ns, edges, color=color, linewidth=1.2, label=name)
        _axes(axes, xlabel, "count")
        if len(counts) > 1:
            _legend(axes)
    return done()


KINDS: dict[str, Callable[..., Plot]] = {
    f.__name__: f
    for f in (curves, reliability, grouped_bars, intervals, binned_accuracy, histogram)
}

# title, unit, and names in metrics.jsonl without their train/, time/ or (held out) eval/
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "", ("loss",)),
    ("Accuracy", "", ("rewards/accuracies", "accuracy", "token_accuracy")),
    ("Reward margin", "nats", ("rewards/margins",)),
    ("Rewards", "nats", ("rewards/chosen", "rewards/rejected")),
    ("Log-probabilities", "nats a sequence", ("logps/chosen", "logps/rejected")),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Throughput", "tokens/s", ("tokens_per_second",)),
)
PREFIXES = (("", ""), ("train/", ""), ("time/", ""), ("eval/", " held-out"))


def training_curves(
    records: Sequence[Mapping[str, Any]], *, titles: Sequence[str] | None = None, suffix: str = ""
) -> list[Plot]:
    """The panels of `PANELS` that the records of a metrics.jsonl hold, in that order.

    Args:
        records: one mapping a logged step, each with `step`; the first after a restart also with a
            true `time/resumed`, which is marked.
        titles: only these panels.
        suffix: added to the titles, e.g. " · sft".
    """
    resumes = [record["step"] for record in records if record.get("time/resumed")]
    plots = []
    for title, unit, names in PANELS:
        if titles is not None and title not in titles:
            continue
        series: dict[str, Any] = {}
        for name in names:
            for prefix, label in PREFIXES:
                points = [(r["step"], r[prefix + name]) for r in records if prefix + name in r]
                if points:
                    series[name.split("/")[-1].replace("_", " ") + label] = tuple(
                        zip(*points, strict=True)
                    )
        if series:
            plots.append(curves(title + suffix, series, ylabel=unit, resumes=resumes))
    return plots


@contextmanager
def _figure(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    note: str,
    height: float = SIZE[1],
    panels: Sequence[float] = (),
) -> Iterator[tuple[Any, Callable[[], Plot]]]:
    """Axes (one, or a stack with the heights `panels`) and a function that gives the plot."""
    import matplotlib
    from matplotlib.figure import Figure

    data = _csv(header, rows)
    salt = hashlib.sha256(f"{title}\n{data}".encode()).hexdigest()
    buffer = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        ratios = {"height_ratios": panels} if panels else None
        axes = figure.subplots(len(panels) or 1, sharex=True, gridspec_kw=ratios)
        yield axes, lambda: Plot(title, _svg(buffer.getvalue(), title), data, note)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)


def _axes(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if not 1e-2 <= max(abs(low), abs(high)) < 1e4:
            axis.set_major_formatter(lambda value, _: _tick(value))


def _legend(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


def _tick(value: float) -> str:
    """Short tick labels: 0.25, 3e−5, 12k, 3M."""
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.4g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.4g}k"
    else:
        text = (
            f"{value:.4g}" if size >= 1e-4 or size < 1e-12 else f"{value:.1e}".replace(".0e", "e")
        )
        text = re.sub(r"e([+-])0*(\d)", r"e\1\2", text)
    return text.replace("-", "\u2212")


def _bin_labels(edges: Sequence[float]) -> list[str]:
    """Names of the bins (−∞, e₀), …, [e₋₁, ∞); between half-integers the integers they hold."""
    if all(edge % 1 == 0.5 for edge in edges):
        first, last = [_tick(e + 0.5) for e in edges], [_tick(e - 0.5) for e in edges]
        inner = [a if a == b else f"{a}…{b}" for a, b in zip(first[:-1], last[1:], strict=True)]
        return [f"≤{last[0]}", *inner, f"≥{first[-1]}"]
    text = [_tick(edge) for edge in edges]
    return [f"<{text[0]}", *(f"{a}…{b}" for a, b in pairwise(text)), f"≥{text[-1]}"]


def _number(value: Any) -> float:
    """`value` as a float, NaN where there is nothing to draw: None, "NaN", "Infinity"."""
    number = nan if value is None else float(value)
    return number if isfinite(number) else nan


def _svg(text: str, title: str) -> str:
    """Matplotlib's SVG without prolog, metadata and style sheet, named for screen readers."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    attributes = (
        f'<svg role="img" aria-label="{escape(title)}" '
        'style="stroke-linejoin: round; stroke-linecap: butt"'
    )
    return text.replace("<svg", attributes, 1)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, row) for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return (
        f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
    )
