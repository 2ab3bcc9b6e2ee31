"""The kinds of figure that a report knows, by name, and the curves of a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from rlhf_jax.report.figure import (
    BLUE,
    DASHES,
    GREY,
    INK,
    LINES,
    MODELS,
    Plot,
    figure,
    label_axes,
    legend,
    number,
    tick,
)
from rlhf_jax.report.frontier import best_of_n, frontier, oracle
from rlhf_jax.report.tables import format_percent


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
    except KeyError as error:
        raise ValueError(f"plot {spec.get('title')!r}: there is no {error}") from error
    except (TypeError, ValueError) as error:
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
    with figure(title, ("series", xlabel, "value"), rows, note) as (axes, done):
        for x in resumes:
            axes.axvline(x, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (1, 2)))
        for i, (name, (xs, ys)) in enumerate(series.items()):
            marked = len(ys) <= 12 or name.endswith("held-out")
            _line(axes, i, name, xs, ys, marked)
        label_axes(axes, xlabel, ylabel)
        if len(series) > 1:
            legend(axes)
        if resumes:
            axes.annotate(
                "resumed", (resumes[-1], 1), xycoords=("data", "axes fraction"),
                xytext=(3, -6), textcoords="offset points", fontsize=6.5, alpha=0.7,
            )  # fmt: skip
    return done()


def lines(
    title: str,
    *,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    bands: Mapping[str, Sequence[Sequence[float]]] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    note: str = "",
) -> Plot:
    """Lines over one common x; a non-finite y is a gap.

    Args:
        title: of the figure.
        x: the horizontal values.
        series: name → y.
        bands: name → [low, high], shaded around the line of that name, e.g. over seeds.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        note: the caption.
    """
    bands = bands or {}
    absent = [[None] * len(x)] * 2
    rows = [
        (name, *row)
        for name, ys in series.items()
        for row in zip(x, ys, *bands.get(name, absent), strict=True)
    ]
    header = ("series", xlabel or "x", "value", "low", "high")
    with figure(title, header, rows, note) as (axes, done):
        for i, (name, ys) in enumerate(series.items()):
            if name in bands:
                low, high = ([number(v) for v in end] for end in bands[name])
                color = LINES[i % len(LINES)]
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            _line(axes, i, name, x, ys, len(x) <= 12)
        label_axes(axes, xlabel, ylabel)
        if len(series) > 1:
            legend(axes)
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
    with figure(title, header, rows, note, height=3.0, panels=(3.2, 1)) as (panels, done):
        axes, histogram = panels
        filled = [i for i, n in enumerate(counts) if n]
        start = low[filled[0]] if filled else 0.0
        axes.plot([start, 1], [start, 1], color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        axes.plot(
            [confidence[i] for i in filled], [accuracy[i] for i in filled], "-o", color=BLUE
        )  # fmt: skip
        axes.text(0.03, 0.9, f"ECE {ece:.3f}", transform=axes.transAxes)
        label_axes(axes, "", "accuracy")
        histogram.stairs(counts, edges, fill=True, color=GREY)
        axes.set_xlim(start - 0.02, 1.02)
        axes.tick_params(labelbottom=False)
        label_axes(histogram, "predicted probability", "count")
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
    with figure(title, header, rows, note) as (axes, done):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            x = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
            values = [number(v) for v in series[name]]
            color = MODELS[(i - len(names)) % len(MODELS)]
            axes.bar(x, values, width * 0.92, color=color, label=name)
            if name in lows and name in highs:
                axes.vlines(x, lows[name], highs[name], color=INK, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=0.6)
        label_axes(axes, "", ylabel)
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        legend(axes)
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
    with figure(title, ("label", "value", "low", "high"), rows, note, height) as (axes, done):
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
        label_axes(axes, xlabel, "")
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
    with figure(title, header, rows, note) as (axes, done):
        filled = [i for i, n in enumerate(counts) if n]
        axes.axhline(0.5, color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        axes.vlines(
            filled, [low[i] for i in filled], [high[i] for i in filled], color=BLUE, linewidth=1.6
        )
        axes.plot(filled, [accuracy[i] for i in filled], "o", color=BLUE, markersize=5)
        label_axes(axes, xlabel, "accuracy")
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
    with figure(title, ("series", "bin_low", "bin_high", "count"), rows, note) as (axes, done):
        for i, (name, ns) in enumerate(counts.items()):
            color = LINES[i % len(LINES)]
            axes.stairs(ns, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(ns, edges, color=color, linewidth=1.2, label=name)
        label_axes(axes, xlabel, "count")
        if len(counts) > 1:
            legend(axes)
    return done()


KINDS: dict[str, Callable[..., Plot]] = {
    f.__name__: f
    for f in (
        curves, lines, reliability, grouped_bars, intervals, binned_accuracy, histogram,
        frontier, best_of_n, oracle,
    )
}  # fmt: skip


# Title, unit, and names in metrics.jsonl without their train/, time/ or (held out) eval/. What
# differs in scale has a figure of its own; a * stands for any text, which then names the curve.
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
    ("Reward components", "", ("rewards/*/mean",)),
    ("Groups", "", ("frac_reward_zero_std", "reward_std")),
    ("Entropy", "nats a sequence", ("objective/entropy",)),
    ("Policy entropy", "nats a token", ("policy/entropy",)),
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
    logged = list(dict.fromkeys(key for record in records for key in record))
    plots = []
    for title, unit, names in PANELS:
        if titles is not None and title not in titles:
            continue
        keys = _matches(logged, names)
        twice = {
            label for label, n in Counter(short for short, _ in keys.values()).items() if n > 1
        }
        series: dict[str, Any] = {
            full if short in twice else short: tuple(
                zip(*((r["step"], r[key]) for r in records if key in r), strict=True)
            )
            for key, (short, full) in keys.items()
        }
        if series:
            plots.append(curves(title + suffix, series, ylabel=unit, resumes=resumes))
    return plots


def _matches(logged: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Key in the records → (its last part, the whole name), as labels, in the order of `names`."""
    found = {}
    for name in names:
        before, star, after = name.partition("*")
        for prefix, ending in PREFIXES:
            for key in logged:
                if fnmatchcase(key, prefix + name):
                    text = key[len(prefix + before) : len(key) - len(after)] if star else name
                    labels = (text if star else text.split("/")[-1], text)
                    short, full = (label.replace("_", " ") + ending for label in labels)
                    found[key] = (short, full.replace("/", " "))
    return found


def _line(axes: Any, i: int, name: str, x: Sequence[float], y: Sequence[Any], marked: bool) -> None:
    """The i-th line of a figure."""
    color, dash = LINES[i % len(LINES)], DASHES[i % len(DASHES)]
    marker = "o" if marked else ""
    values = [number(v) for v in y]
    axes.plot(x, values, linestyle=dash, color=color, marker=marker, label=name)


def _bin_labels(edges: Sequence[float]) -> list[str]:
    """Names of the bins (−∞, e₀), …, [e₋₁, ∞); between half-integers the integers they hold."""
    if all(edge % 1 == 0.5 for edge in edges):
        first, last = [tick(e + 0.5) for e in edges], [tick(e - 0.5) for e in edges]
        inner = [a if a == b else f"{a}…{b}" for a, b in zip(first[:-1], last[1:], strict=True)]
        return [f"≤{last[0]}", *inner, f"≥{first[-1]}"]
    text = [tick(edge) for edge in edges]
    return [f"<{text[0]}", *(f"{a}…{b}" for a, b in pairwise(text)), f"≥{text[-1]}"]
