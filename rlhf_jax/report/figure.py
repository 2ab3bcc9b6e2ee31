"""Drawing: the palette, the style, and how axes become SVG and their points CSV.

The colours are Okabe & Ito's, told apart by every common kind of colour vision; lines differ by
dash as well. Axes and text are drawn in `currentColor`, so that a figure inside a dark page is
light. The same input gives the same bytes. Matplotlib is imported at the first figure.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from math import isfinite, nan
from typing import Any

from rlhf_jax.stopping import stop_point

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
GREY = "#999999"
INK, PAPER = "#010203", "#030201"  # stand for currentColor and for the page's background
LINES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
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


@contextmanager
def open_axes(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    height: float = SIZE[1],
    panels: Sequence[float] = (),
    width: float = SIZE[0],
) -> Iterator[tuple[Any, Callable[[], Plot]]]:
    """Gives axes to draw on and, for after the `with`, a function that returns the plot.

    Opening a figure is a `stop_point`.

    Args:
        title: also names the figure for screen readers.
        header: the column names of the CSV.
        rows: the plotted points, as rows of the CSV.
        height: inches.
        panels: heights relative to each other; two or more give a stack of axes, not one.
        width: inches.
    """
    stop_point()
    import matplotlib
    from matplotlib.figure import Figure

    data = csv_text(header, rows)
    salt = hashlib.sha256(f"{title}\n{data}".encode()).hexdigest()
    buffer = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(width, height), layout="constrained")
        ratios = {"height_ratios": panels} if panels else None
        axes = drawing.subplots(len(panels) or 1, sharex=True, gridspec_kw=ratios)
        yield axes, lambda: Plot(title, _clean_svg(buffer.getvalue(), title), data)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(buffer, format="svg", transparent=True, metadata=metadata)


def label_axes(axes: Any, xlabel: str, ylabel: str) -> None:
    """Names both axes, and shortens the numbers along one that has very large or small ones."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if not 1e-2 <= max(abs(low), abs(high)) < 1e4:
            axis.set_major_formatter(lambda value, _: format_tick(value))


def add_legend(axes: Any, *entries: Any) -> None:
    """Adds a legend above the axes, of `entries` (handles, labels) or of all that has a label."""
    labels = (entries or axes.get_legend_handles_labels())[1]
    longest = max(map(len, labels), default=0) + 5  # with its handle
    columns = min(3, int(axes.figure.get_figwidth() * 16 // longest))  # 16 letters per inch
    axes.legend(
        *entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=max(1, columns), borderaxespad=0.2
    )


def format_tick(value: float) -> str:
    """Returns a short tick label: 0.25, 3e−5, 12k, 3M."""
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


def to_float(value: Any) -> float:
    """Returns `value` as a float, NaN where there is no number: None, "NaN", "Infinity"."""
    result = nan if value is None else float(value)
    return result if isfinite(result) else nan


def to_floats(values: Sequence[Any]) -> list[float]:
    """Returns `to_float` of each value."""
    return [to_float(value) for value in values]


def _clean_svg(text: str, title: str) -> str:
    """Strips Matplotlib's SVG of prolog, metadata and style sheet; names it for screen readers."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = text.replace("xlink:href", "href")
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    attributes = (
        f'<svg role="img" aria-label="{escape(title)}" '
        'style="stroke-linejoin: round; stroke-linecap: butt"'
    )
    return text.replace("<svg", attributes, 1)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a CSV whose texts no spreadsheet takes for formulas."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_guard_cell, header))
    writer.writerows(map(_guard_cell, row) for row in rows)
    return buffer.getvalue()


def _guard_cell(value: Any) -> Any:
    """Puts an apostrophe in front of text that a spreadsheet would run as a formula."""
    if not isinstance(value, str):
        return value
    guard = "'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return guard + value.replace("\r", "\n")  # csv would not quote what may end a row
