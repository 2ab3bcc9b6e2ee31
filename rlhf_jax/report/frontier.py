"""Figures of reward against what it cost: KL to the reference, or the number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

from rlhf_jax.report import figure

MARKERS = ("o", "s", "^", "D", "v", "P")
WIDE = (7.6, 3.9)  # inches, for a figure as wide as a page
REWARDS = ("gold", "proxy")
MINUS = str.maketrans("-", "\u2212")


def draw_frontier(
    title: str, *, series: Mapping[str, Mapping[str, Any]], wide: bool = False
) -> figure.Plot:
    """Draws the gold reward of each run against √KL, its peak marked, and the proxy below it.

    Each has its own scale: a proxy that is over-optimised would flatten the gold reward's peak.

    Args:
        title: of the figure.
        series: run → {"kl": […], "gold": […]?, "proxy": […]?, "bound": bool?}, in the order of
            training, KL in nats per sequence. A run with one point is a marker; with `bound` its
            KL is an upper bound.
        wide: as wide as a page rather than a column.
    """
    from matplotlib.lines import Line2D

    shown = [k for k in REWARDS if any(run.get(k) for run in series.values())] or ["gold"]
    width, height = WIDE if wide else (figure.SIZE[0], 3.0)
    height += 1.2 * (len(shown) - 1)
    header = ("series", "kl", "sqrt_kl", "gold", "proxy")
    rows = [row for name, run in series.items() for row in _list_points(name, run)]
    shares = [3, 2][: len(shown)]
    with figure.open_axes(title, header, rows, height, shares, width) as (axes, done):
        panels = dict(zip(shown, axes if len(shown) > 1 else [axes], strict=True))
        handles, peaks = [], []
        for i, (name, run) in enumerate(series.items()):
            style = _choose_style(i)
            bound = "KL ≤" if run.get("bound") else "KL"
            label = f"{name}, {bound}" if run.get("bound") else name
            handles.append(Line2D([], [], label=label, **style))
            x = [_root(kl) for kl in run["kl"]]
            for key, panel in panels.items():
                y = figure.to_floats(run.get(key) or [None] * len(x))
                count = sum(isfinite(a) and isfinite(b) for a, b in zip(x, y, strict=True))
                panel.plot(
                    x, y, color=style["color"], linestyle="--" if key == "proxy" else "-",
                    marker=style["marker"] if count <= 12 else "",
                    markersize=6 if count == 1 else 3.5,
                    markerfacecolor=style["color"] if key == "gold" else "none",
                )  # fmt: skip
                if key == "gold" and count > 1:
                    best = _mark_peak(panel, x, y, style["color"])
                    text = f"{y[best]:.3g} at {bound} {float(run['kl'][best]):.3g}".translate(MINUS)
                    text = f"{name}: {text}" if len(series) > 1 else text
                    peaks.append((x[best], y[best], text))
        for key, panel in panels.items():
            ylabel = f"{key} reward" if len(panels) > 1 else "reward"
            figure.label_axes(panel, "√KL to the reference, KL in nats per sequence", ylabel)
            panel.margins(0.04, 0.14)
            panel.label_outer()
        _place_labels(panels[shown[0]], peaks, width, height * shares[0] / sum(shares))
        figure.add_legend(panels[shown[0]], handles, [handle.get_label() for handle in handles])
    return done()


def draw_best_of_n(
    title: str,
    *,
    n: Sequence[int],
    series: Mapping[str, Mapping[str, Sequence[float]]],
    bound: Sequence[float] | None = None,
) -> figure.Plot:
    """Draws a quantity against n on a log₂ axis, the peak of the series "gold" marked.

    Args:
        title: of the figure.
        n: samples per prompt.
        series: name → {"mean": […], "low": […]?, "high": […]?}, one value for each n.
        bound: a known limit for each n, dashed, e.g. n/(n + 1) for a win rate.
    """
    absent: Sequence[Any] = [None] * len(n)
    rows = [
        (name, *row)
        for name, s in series.items()
        for row in zip(n, s["mean"], s.get("low", absent), s.get("high", absent), strict=True)
    ]
    rows += [
        ("bound", k, value, None, None) for k, value in zip(n, bound or [], strict=bool(bound))
    ]
    with figure.open_axes(title, ("series", "n", "mean", "low", "high"), rows) as (axes, done):
        for i, (name, s) in enumerate(series.items()):
            style, mean = _choose_style(i), figure.to_floats(s["mean"])
            if "low" in s and "high" in s:
                low, high = figure.to_floats(s["low"]), figure.to_floats(s["high"])
                axes.fill_between(n, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(n, mean, label=name, **style)
            if name == "gold" and any(map(isfinite, mean)):
                best = _mark_peak(axes, n, mean, style["color"])
                axes.annotate(
                    f"{mean[best]:.3g} at n = {n[best]}".translate(MINUS), (n[best], mean[best]),
                    ha="center", xytext=(0, 6), textcoords="offset points", fontsize=6.5,
                )  # fmt: skip
        if bound:
            axes.plot(n, figure.to_floats(bound), "--", color=figure.INK, alpha=0.6, label="bound")
        axes.margins(0.05, 0.14)
        figure.label_axes(axes, "n, samples per prompt", "reward of the best by proxy")
        axes.set_xscale("log", base=2)
        axes.set_xticks(n, [str(k) for k in n])
        axes.minorticks_off()
        figure.add_legend(axes)
    return done()


def draw_oracle(
    title: str,
    *,
    points: Mapping[str, Mapping[str, float]],
    exact: Mapping[str, Sequence[float]],
) -> figure.Plot:
    """Draws where each algorithm came to, filled, and should have come to, hollow.

    Args:
        title: of the figure.
        points: algorithm → {"kl", "reward", "expected_kl"?, "expected_reward"?}, KL in nats per
            sequence.
        exact: {"kl": […], "reward": […]} of the best reward that any policy has at that KL.
    """
    keys = ("kl", "reward", "expected_kl", "expected_reward")
    rows: list[tuple[Any, ...]] = [
        ("exact", kl, reward, None, None)
        for kl, reward in zip(exact["kl"], exact["reward"], strict=True)
    ]
    rows += [(name, *map(point.get, keys)) for name, point in points.items()]
    width, height = WIDE
    with figure.open_axes(title, ("series", *keys), rows, height, width=width) as (axes, done):
        kls, rewards = (figure.to_floats(exact[key]) for key in ("kl", "reward"))
        axes.plot(kls, rewards, color=figure.INK, linewidth=1, label="exact")
        for i, (name, point) in enumerate(points.items()):
            x, y, expected_x, expected_y = figure.to_floats([point.get(key) for key in keys])
            style = _choose_style(i)
            axes.plot([x, expected_x], [y, expected_y], ":", color=style["color"], linewidth=0.8)
            axes.plot(
                [expected_x], [expected_y], markersize=8, markerfacecolor="none", linestyle="",
                **style,
            )  # fmt: skip
            axes.plot([x], [y], markersize=4.5, linestyle="", label=name, **style)
        figure.label_axes(axes, "KL to the reference, nats per sequence", "expected reward")
        axes.margins(0.06, 0.1)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, borderaxespad=0)
    return done()


def find_peak(values: Sequence[Any]) -> int | None:
    """Returns the index of the largest finite value, the first of several; None without any."""
    floats = figure.to_floats(values)
    finite = [i for i, value in enumerate(floats) if isfinite(value)]
    return max(finite, key=lambda i: floats[i], default=None)


def _list_points(name: str, run: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Returns the rows (name, KL, √KL, gold, proxy) of a run's points."""
    roots = [_root(kl) for kl in run["kl"]]
    cells = [root if isfinite(root) else None for root in roots]
    golds, proxies = (run.get(key) or [None] * len(cells) for key in REWARDS)
    points = zip(run["kl"], cells, golds, proxies, strict=True)
    return [(name, *point) for point in points]


def _choose_style(index: int) -> dict[str, Any]:
    """Returns a series' colour and marker, another pair for each of the first 36."""
    marker = MARKERS[(index + index // len(figure.LINES)) % len(MARKERS)]
    return {"color": figure.LINES[index % len(figure.LINES)], "marker": marker}


def _mark_peak(axes: Any, x: Sequence[float], y: Sequence[float], color: str) -> int:
    """Draws a star at the largest y that has an x; returns its index."""
    index = find_peak([b if isfinite(a) else None for a, b in zip(x, y, strict=True)])
    assert index is not None, "no finite value"
    axes.plot([x[index]], [y[index]], "*", color=color, markersize=9, markeredgecolor=figure.INK,
              markeredgewidth=0.5, zorder=4)  # fmt: skip
    return index


def _place_labels(
    axes: Any, labels: Sequence[tuple[float, float, str]], width: float, height: float
) -> None:
    """Writes each label above its point, or as many lines off as keep it clear of the others.

    The extents are estimates: the layout is known only once it is drawn.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    line, letter = 9 / (72 * height - 45), 3.8 / (72 * width - 40)
    taken: list[tuple[float, float, float]] = []
    for x, y, text in sorted(labels, key=lambda label: (-label[1], label[0], label[2])):
        half = min(0.5, letter * len(text) / 2)
        center = min(max((x - left) / (right - left), half), 1 - half)
        at = (y - bottom) / (top - bottom)
        tries = [at + side * line * k for k in range(1, len(labels) + 2) for side in (0.9, -1.1)]
        free = [
            v
            for v in tries
            if 0 <= v <= 1
            and not any(abs(c - center) < half + h and abs(u - v) < line for c, u, h in taken)
        ]
        v = free[0] if free else tries[0]
        taken.append((center, v, half))
        axes.text(center, v, text, transform=axes.transAxes, ha="center", va="center", fontsize=6.5)


def _root(kl: Any) -> float:
    """Returns √KL; an estimate may fall below zero and counts as zero then."""
    value = figure.to_float(kl)
    return sqrt(max(0.0, value)) if isfinite(value) else value
