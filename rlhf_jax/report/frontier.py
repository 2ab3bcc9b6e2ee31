"""Figures of reward against what it cost: KL to the reference, or the number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

from rlhf_jax.report.figure import (
    INK,
    LINES,
    SIZE,
    Plot,
    figure,
    label_axes,
    legend,
    number,
)

MARKERS = ("o", "s", "^", "D", "v", "P")
WIDE = (7.6, 3.9)  # inches, for a figure as wide as a page
KINDS = ("gold", "proxy")
MINUS = str.maketrans("-", "\u2212")


def frontier(
    title: str,
    *,
    series: Mapping[str, Mapping[str, Any]],
    exact: Mapping[str, Sequence[float]] | None = None,
    xlabel: str = "√KL to the reference, KL in nats a sequence",
    ylabel: str = "reward",
    wide: bool = False,
    note: str = "",
) -> Plot:
    """Gold reward of each run against √KL, its peak marked, and the proxy in a panel below.

    Each has its own scale: a proxy that is over-optimised would flatten the gold reward's peak.

    Args:
        title: of the figure.
        series: run → {"kl": […], "gold": […]?, "proxy": […]?, "bound": bool?}, in the order of
            training. A run with one point is a marker; with `bound` its KL is an upper bound.
        exact: {"kl": […], "reward": […]} of the best reward that any policy has at that KL.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        wide: as wide as a page rather than a column.
        note: the caption.
    """
    from matplotlib.lines import Line2D

    rows: list[tuple[Any, ...]] = []
    for name, run in series.items():
        golds, proxies = (run.get(key) or [None] * len(run["kl"]) for key in ("gold", "proxy"))
        for kl, gold, proxy in zip(run["kl"], golds, proxies, strict=True):
            rows.append((name, kl, _cell(_root(kl)), gold, proxy))
    if exact:
        for kl, reward in zip(exact["kl"], exact["reward"], strict=True):
            rows.append(("exact", kl, _cell(_root(kl)), reward, None))
    shown = [k for k in KINDS if any(run.get(k) for run in series.values())] or ["gold"]
    width, height = WIDE if wide else (SIZE[0], 3.0)
    height += 1.2 * (len(shown) - 1)
    header = ("series", "kl", "sqrt_kl", "gold", "proxy")
    shares = [3, 2][: len(shown)]
    with figure(title, header, rows, note, height, shares, width) as (axes, done):
        panels = dict(zip(shown, axes if len(shown) > 1 else [axes], strict=True))
        handles: list[Any] = []
        peaks = []
        if exact:
            x, y = [_root(kl) for kl in exact["kl"]], [number(v) for v in exact["reward"]]
            handles += panels[shown[0]].plot(x, y, color=INK, linewidth=1, label="exact")
        for i, (name, run) in enumerate(series.items()):
            color, marker = _look(i)
            bound = "KL ≤" if run.get("bound") else "KL"
            label = f"{name}, {bound}" if run.get("bound") else name
            handles.append(Line2D([], [], color=color, marker=marker, label=label))
            x = [_root(kl) for kl in run["kl"]]
            for key, panel in panels.items():
                y = [number(v) for v in run.get(key) or [None] * len(x)]
                count = sum(isfinite(a) and isfinite(b) for a, b in zip(x, y, strict=True))
                panel.plot(
                    x, y, color=color, linestyle="--" if key == "proxy" else "-",
                    marker=marker if count <= 12 else "", markersize=6 if count == 1 else 3.5,
                    markerfacecolor=color if key == "gold" else "none",
                )  # fmt: skip
                if key == "gold" and count > 1:
                    index, at, best = _mark_peak(panel, x, y, color)
                    text = f"{best:.3g} at {bound} {float(run['kl'][index]):.3g}".translate(MINUS)
                    peaks.append((at, best, f"{name}: {text}" if len(series) > 1 else text))
        for key, panel in panels.items():
            label_axes(panel, xlabel, f"{key} {ylabel}" if len(panels) > 1 else ylabel)
            panel.margins(0.04, 0.14)
            panel.label_outer()
        _place(panels[shown[0]], peaks, width, height * shares[0] / sum(shares))
        legend(panels[shown[0]], handles, [handle.get_label() for handle in handles])
    return done()


def best_of_n(
    title: str,
    *,
    n: Sequence[int],
    series: Mapping[str, Mapping[str, Sequence[float]]],
    bound: Sequence[float] | None = None,
    xlabel: str = "n, samples a prompt",
    ylabel: str = "reward of the best by proxy",
    note: str = "",
) -> Plot:
    """A quantity against n on a log₂ axis with intervals, the peak of the series "gold" marked.

    Args:
        title: of the figure.
        n: samples a prompt.
        series: name → {"mean": […], "low": […]?, "high": […]?}, one value each n.
        bound: a known limit each n, dashed, e.g. n/(n + 1) for a win rate.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        note: the caption.
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
    with figure(title, ("series", "n", "mean", "low", "high"), rows, note) as (axes, done):
        for i, (name, s) in enumerate(series.items()):
            (color, marker), mean = _look(i), [number(v) for v in s["mean"]]
            if "low" in s and "high" in s:
                low, high = ([number(v) for v in s[end]] for end in ("low", "high"))
                axes.fill_between(n, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(n, mean, color=color, marker=marker, label=name)
            if name == "gold" and any(map(isfinite, mean)):
                index, _, y = _mark_peak(axes, n, mean, color)
                axes.annotate(
                    f"{y:.3g} at n = {n[index]}".translate(MINUS), (n[index], y), ha="center",
                    xytext=(0, 6), textcoords="offset points", fontsize=6.5,
                )  # fmt: skip
        if bound:
            axes.plot(n, [number(v) for v in bound], "--", color=INK, alpha=0.6, label="bound")
        axes.margins(0.05, 0.14)
        label_axes(axes, xlabel, ylabel)
        axes.set_xscale("log", base=2)
        axes.set_xticks(n, [str(k) for k in n])
        axes.minorticks_off()
        legend(axes)
    return done()


def oracle(
    title: str,
    *,
    points: Mapping[str, Mapping[str, float]],
    exact: Mapping[str, Sequence[float]],
    xlabel: str = "KL to the reference, nats a sequence",
    ylabel: str = "expected reward",
    note: str = "",
) -> Plot:
    """Where each algorithm came to, filled, and should have come to, hollow, on the exact frontier.

    Args:
        title: of the figure.
        points: algorithm → {"kl", "reward", "expected_kl"?, "expected_reward"?}.
        exact: {"kl": […], "reward": […]} of the best reward that any policy has at that KL.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        note: the caption.
    """
    keys = ("kl", "reward", "expected_kl", "expected_reward")
    rows: list[tuple[Any, ...]] = [
        ("exact", kl, reward, None, None)
        for kl, reward in zip(exact["kl"], exact["reward"], strict=True)
    ]
    rows += [(name, *map(point.get, keys)) for name, point in points.items()]
    width, height = WIDE
    with figure(title, ("series", *keys), rows, note, height, width=width) as (axes, done):
        kls, rewards = ([number(v) for v in exact[key]] for key in ("kl", "reward"))
        axes.plot(kls, rewards, color=INK, linewidth=1, label="exact")
        for i, (name, point) in enumerate(points.items()):
            x, y, expected_x, expected_y = (number(point.get(key)) for key in keys)
            style = dict(zip(("color", "marker"), _look(i), strict=True))
            axes.plot([x, expected_x], [y, expected_y], ":", color=style["color"], linewidth=0.8)
            axes.plot(
                [expected_x], [expected_y], markersize=8, markerfacecolor="none", linestyle="",
                **style,
            )  # fmt: skip
            axes.plot([x], [y], markersize=4.5, linestyle="", label=name, **style)
        label_axes(axes, xlabel, ylabel)
        axes.margins(0.06, 0.1)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, borderaxespad=0)
    return done()


def peak(values: Sequence[Any]) -> int | None:
    """The index of the largest finite value, the first of several; None where there is none."""
    finite = [i for i, value in enumerate(values) if isfinite(number(value))]
    return max(finite, key=lambda i: number(values[i]), default=None)


def _look(index: int) -> tuple[str, str]:
    """(colour, marker) of a series, another for each of the first 36."""
    return LINES[index % len(LINES)], MARKERS[(index + index // len(LINES)) % len(MARKERS)]


def _mark_peak(
    axes: Any, x: Sequence[float], y: Sequence[float], color: str
) -> tuple[int, float, float]:
    """Draws a star at the largest y that has an x; returns its index and place."""
    index = peak([b if isfinite(a) else None for a, b in zip(x, y, strict=True)])
    assert index is not None, "no finite value"
    axes.plot([x[index]], [y[index]], "*", color=color, markersize=9, markeredgecolor=INK,
              markeredgewidth=0.5, zorder=4)  # fmt: skip
    return index, x[index], y[index]


def _place(
    axes: Any, labels: Sequence[tuple[float, float, str]], width: float, height: float
) -> None:
    """Writes each label above its point, or as many lines off as keep it clear of the others.

    The extents are estimates: the layout is known only once it is drawn.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    line, letter = 9 / (72 * height - 45), 3.8 / (72 * width - 40)
    placed: list[tuple[float, float, float]] = []
    for x, y, text in sorted(labels, key=lambda label: (-label[1], label[0], label[2])):
        half = min(0.5, letter * len(text) / 2)
        center = min(max((x - left) / (right - left), half), 1 - half)
        at = (y - bottom) / (top - bottom)
        tries = [at + side * line * k for k in range(1, len(labels) + 2) for side in (0.9, -1.1)]
        free = [
            v
            for v in tries
            if 0 <= v <= 1
            and not any(abs(c - center) < half + h and abs(u - v) < line for c, u, h in placed)
        ]
        v = free[0] if free else tries[0]
        placed.append((center, v, half))
        axes.text(center, v, text, transform=axes.transAxes, ha="center", va="center", fontsize=6.5)


def _root(kl: Any) -> float:
    """√KL; an estimate may fall below zero and counts as zero then."""
    value = number(kl)
    return sqrt(max(0.0, value)) if isfinite(value) else value


def _cell(value: float) -> float | None:
    return value if isfinite(value) else None
