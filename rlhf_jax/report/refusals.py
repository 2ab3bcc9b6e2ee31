"""The figure of a trade-off as a curve: of safety, harmful prompts refused against others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.report import figure
from rlhf_jax.report.frontier import MARKERS

HEIGHT = 2.5  # inches of a panel


def draw_refusals(
    title: str, *, points: Sequence[Mapping[str, Any]], shares: tuple[str, str], what: str
) -> figure.Plot:
    """Draws a panel for each kind of request and a point for each setting, coloured by helpfulness.

    A model that refuses by chance lies on the dashed line, one that refuses everything at its
    upper end, one that refuses nothing at its lower.

    Args:
        title: of the figure.
        points: {column: value}: names of the "kind", the "arm" (a marker) and the "setting"; the
            two shares by their names, and with "_low" and "_high" their intervals; "helpful", the
            share of the first one's prompts answered rightly.
        shares: the names of what is paid and of what is gained by it, as "harmless" and "harmful".
        what: is said of the prompts that count, as "refused".
    """
    cost, gain = shares
    intervals = [f"{share}{end}" for share in shares for end in ("", "_low", "_high")]
    columns = ("kind", "arm", "setting", *intervals, "helpful")
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    arms = list(dict.fromkeys(point["arm"] for point in points))
    rows = [[point[column] for column in columns] for point in points]
    height = HEIGHT * len(kinds) + 0.4
    panels = [1.0] * len(kinds) if len(kinds) > 1 else ()
    with figure.open_axes(title, columns, rows, height, panels) as (axes, done):
        drawn = None
        for kind, panel in zip(kinds, axes if panels else [axes], strict=True):
            panel.plot([0, 1], [0, 1], "--", color=figure.INK, alpha=0.5, linewidth=0.8)
            for i, arm in enumerate(arms):
                own = [p for p in points if p["kind"] == kind and p["arm"] == arm]
                x, y = [p[cost] for p in own], [p[gain] for p in own]
                panel.errorbar(
                    x, y, xerr=_reach(own, cost), yerr=_reach(own, gain),
                    fmt="none", ecolor=figure.GREY, elinewidth=0.7,
                )  # fmt: skip
                drawn = panel.scatter(
                    x, y, c=[p["helpful"] for p in own], cmap="viridis", vmin=0, vmax=1,
                    marker=MARKERS[i % len(MARKERS)], s=26, label=arm, zorder=3,
                )  # fmt: skip
            panel.set_xlim(-0.03, 1.03)
            panel.set_ylim(-0.03, 1.03)
            figure.label_axes(panel, f"{cost} prompts {what}", f"{gain} {what}, {kind}")
            panel.label_outer()
            if kind == kinds[0]:
                figure.add_legend(panel)
        bar = panel.figure.colorbar(drawn, ax=axes)
        bar.set_label(f"{cost} prompts answered rightly")
    return done()


def _reach(points: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """How far intervals reach below and above the points, as Matplotlib has it."""
    return [
        [max(0.0, p[name] - p[f"{name}_low"]) for p in points],
        [max(0.0, p[f"{name}_high"] - p[name]) for p in points],
    ]
