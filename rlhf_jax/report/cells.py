"""Figures of a sweep: its cells beside each other, each with the runs that it was measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.report import figure
from rlhf_jax.report.curves import DASHES
from rlhf_jax.report.frontier import MARKERS, MINUS

TALLEST = 9.0  # inches
LETTERS = 34  # of a cell's name beside its row


def draw_intervals(
    title: str,
    *,
    cells: Sequence[str],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    inner: Sequence[tuple[float, float]],
    runs: Sequence[Sequence[float]],
    xlabel: str,
) -> figure.Plot:
    """Draws a row for each cell: its mean, its interval, a narrower one inside, and its runs.

    Args:
        title: of the figure.
        cells: names. mean, low, high: of each; NaN where there is none.
        inner: the interval of prompts alone.
        runs: a value for each seed.
    """
    header = (
        "cell",
        "mean",
        "low",
        "high",
        "low of prompts alone",
        "high of prompts alone",
        "runs",
    )
    rows = [
        (name, m, a, b, *c, " ".join(map(repr, r)))
        for name, m, a, b, c, r in zip(cells, mean, low, high, inner, runs, strict=True)
    ]
    height = min(TALLEST, 1.1 + 0.42 * len(cells))
    with figure.open_axes(title, header, rows, height) as (axes, done):
        for y, (_, m, a, b, *c, _) in enumerate(rows):
            axes.plot([a, b], [y, y], color=figure.BLUE, linewidth=1.2, solid_capstyle="butt")
            axes.plot(c, [y, y], color=figure.BLUE, linewidth=4, alpha=0.35, solid_capstyle="butt")
            axes.plot([m], [y], "o", color=figure.BLUE, markersize=5)
            axes.plot(
                runs[y], [y + 0.24] * len(runs[y]), "|", color=figure.INK, alpha=0.5, markersize=4
            )
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set_yticks(range(len(cells)), [_fold(name) for name in cells], fontsize=7)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        figure.label_axes(axes, xlabel, "")
    return done()


def draw_bands(
    title: str,
    *,
    cells: Mapping[str, Mapping[str, Sequence[Any]]],
    xlabel: str = "step",
    ylabel: str = "",
) -> figure.Plot:
    """Draws the mean over seeds of a curve for each cell, its 95 % band, and every run underneath.

    Args:
        title: of the figure.
        cells: name → {"steps": […], "mean": […], "low": […], "high": […], "runs": [[…], …]}, a
            number for each step; NaN where there is none.
        xlabel: what the steps are. ylabel: of the vertical axis.
    """
    keys = ("steps", "mean", "low", "high")
    rows: list[tuple[Any, ...]] = []
    for name, cell in cells.items():
        rows += [
            (name, *each, " ".join(repr(run[i]) for run in cell["runs"]))
            for i, each in enumerate(zip(*(cell[key] for key in keys), strict=True))
        ]
    height = figure.SIZE[1] + 0.16 * len(cells)
    with figure.open_axes(title, ("cell", *keys, "runs"), rows, height) as (axes, done):
        for i, (name, cell) in enumerate(cells.items()):
            color, steps = figure.LINES[i % len(figure.LINES)], cell["steps"]
            for run in cell["runs"]:
                axes.plot(steps, figure.to_floats(run), color=color, alpha=0.3, linewidth=0.5)
            axes.fill_between(
                steps, cell["low"], cell["high"], color=color, alpha=0.13, linewidth=0
            )
            axes.plot(
                steps, figure.to_floats(cell["mean"]), color=color, label=name,
                linestyle=DASHES[i // len(figure.LINES) % len(DASHES)],
                marker="o" if len(steps) <= 12 else "",
            )  # fmt: skip
        figure.label_axes(axes, xlabel, ylabel)
        figure.add_legend(axes)
    return done()


def draw_parallel(
    title: str, *, axes: Mapping[str, Sequence[str]], cells: Sequence[Mapping[str, Any]], value: str
) -> figure.Plot:
    """Draws parallel coordinates: a line for each cell through its fields' values to its mean.

    Args:
        title: of the figure.
        axes: field → its values in their order, evenly spaced.
        cells: {field: value, "mean": number}; the higher a mean, the darker the line.
        value: name of the last axis.
    """
    from matplotlib import colormaps

    rows = [(*(cell[field] for field in axes), cell["mean"]) for cell in cells]
    means = [cell["mean"] for cell in cells]
    low, high = min(means), max(means)
    reach = high - low or 1.0
    paper = {"facecolor": figure.PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    label: dict[str, Any] = {"fontsize": 7, "va": "bottom", "bbox": paper, "zorder": 3}
    with figure.open_axes(title, (*axes, value), rows, 3.0) as (drawing, done):
        last = len(axes)
        for cell in sorted(cells, key=lambda cell: cell["mean"]):
            share = (cell["mean"] - low) / reach
            heights = [
                values.index(cell[field]) / (len(values) - 1 or 1) for field, values in axes.items()
            ]
            color = colormaps["viridis"](0.85 - 0.85 * share)
            drawing.plot(range(last + 1), [*heights, share], color=color, linewidth=1 + share)
        for x, values in enumerate(axes.values()):
            drawing.axvline(x, color=figure.INK, linewidth=0.6)
            for i, text in enumerate(values):
                height = i / (len(values) - 1 or 1)
                drawing.text(x + 0.03, height + 0.03, _fold(text, 16), **label)
        drawing.axvline(last, color=figure.INK, linewidth=0.6)
        for share in (0.0, 1.0):
            text = f"{low + share * (high - low):.3g}".translate(MINUS)
            drawing.text(last - 0.03, share + 0.03, text, ha="right", **label)
        drawing.set_xticks(range(last + 1), [*(_fold(field, 18) for field in axes), value])
        drawing.set_yticks([])
        drawing.spines[:].set_visible(False)
        drawing.tick_params(axis="x", length=0)
        drawing.set_xlim(-0.05, last + 0.05)
        drawing.set_ylim(-0.05, 1.12)
    return done()


def draw_clouds(
    title: str, *, cells: Mapping[str, Sequence[tuple[float, float]]], ylabel: str
) -> figure.Plot:
    """Draws each run's reward against √KL, a cloud for each cell, its mean the large marker.

    Args:
        title: of the figure.
        cells: name → (KL in nats per sequence, reward) of each seed.
        ylabel: of the vertical axis.
    """
    rows = [(name, *point) for name, points in cells.items() for point in points]
    height = 3.0 + 0.16 * len(cells)
    with figure.open_axes(title, ("cell", "kl", "reward"), rows, height) as (axes, done):
        for i, (name, points) in enumerate(cells.items()):
            x = [max(0.0, kl) ** 0.5 for kl, _ in points]
            y = [reward for _, reward in points]
            color = figure.LINES[i % len(figure.LINES)]
            marker = MARKERS[(i + i // len(figure.LINES)) % len(MARKERS)]
            middle = sum(x) / len(x), sum(y) / len(y)
            for a, b in zip(x, y, strict=True):
                axes.plot([middle[0], a], [middle[1], b], color=color, linewidth=0.5, alpha=0.5)
            axes.plot(x, y, marker, color=color, alpha=0.5, linestyle="")
            axes.plot(
                *([each] for each in middle), marker, color=color, markersize=8, linestyle="",
                markeredgecolor=figure.INK, markeredgewidth=0.5, label=name,
            )  # fmt: skip
        figure.label_axes(axes, "√KL to the reference, KL in nats per sequence", ylabel)
        axes.margins(0.08, 0.1)
        figure.add_legend(axes)
    return done()


def _fold(text: str, letters: int = LETTERS) -> str:
    """A name on several lines, broken after commas where it is longer than so many letters."""
    lines = [""]
    for part in text.replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > letters:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
