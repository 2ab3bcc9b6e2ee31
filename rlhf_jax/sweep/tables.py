"""A sweep's results as texts: rows of its tables, and the sentences that say what they mean."""

from __future__ import annotations

from rlhf_jax.report.tables import METRICS, format_seconds
from rlhf_jax.sweep.results import SIGNIFICANT, Results

COLUMNS = ("cell", "seeds", "mean", "sd", "95 %", "of prompts alone", "time")
DIFFERENCES = ("cell", "difference", "95 %", "p", "p (Holm)")


def estimates(results: Results) -> list[list[str]]:
    """A row of texts for each cell, in the order of `COLUMNS`."""
    rows = []
    for row in results.rows:
        e, texts = row.estimate, ["–", "–", "–"]
        if e:
            texts = [_format(results, e.mean), _format(results, e.deviation)]
            texts.append(_interval(results, e.low, e.high))
        seeds = f"{e.seeds if e else 0}" + (
            f" of {e.seeds + len(row.failures)}" if e and row.failures else ""
        )
        prompts = _interval(results, *row.of_prompts)
        rows.append([row.name, seeds, *texts, prompts, format_seconds(row.seconds)])
    return rows


def differences_of(results: Results) -> list[list[str]]:
    """A row of texts for each cell that is compared, in the order of `DIFFERENCES`."""
    return [
        [
            row.name,
            _format(results, each.mean, signed=True),
            _interval(results, each.low, each.high, signed=True),
            f"{each.p:.3f}",
            f"{adjusted:.3f}",
        ]
        for row in results.rows
        for each, adjusted in ([row.difference] if row.difference else [])
    ]


def sentences(results: Results, fresh: Results | None) -> list[str]:
    """What the table means, in words."""
    best = results.best
    if best is None:
        return ["No cell has finished whole, so that none is called the best."]
    if fresh is None:
        return [
            f"{best.name} has the best mean; with a single seed or cell nothing can be said of it."
        ]
    again, told = fresh.row(best.name), []
    if again.estimate is None or again.failures:
        return [f"{best.name} has the best mean, but it failed on fresh seeds."]
    e = again.estimate
    told.append(
        f"Best: {best.name}. On {e.seeds} fresh seeds it has {_format(results, e.mean)} "
        f"({_interval(results, e.low, e.high)}); on those it was chosen by, "
        f"{_format(results, best.estimate.mean)}."  # type: ignore[union-attr]
    )
    if again.difference:
        d, p = again.difference
        verdict = "it is better" if p < SIGNIFICANT else "that may be chance"
        told.append(
            f"Over {results.baseline}, on the same fresh seeds: "
            f"{_format(results, d.mean, signed=True)} "
            f"({_interval(results, d.low, d.high, signed=True)}), p = {p:.3f}: {verdict}."
        )
    alike = results.equals_of(best.name)
    if alike:
        told.append(f"Not told apart from it by these seeds: {'; '.join(alike)}.")
    return told


def _format(results: Results, value: float, *, signed: bool = False) -> str:
    """A number of the metric; rates are not in per cent, whose differences would be ambiguous."""
    spec = METRICS.get(results.metric, ("", "", ".3f"))[2]
    text = (
        "–" if value != value else format(value, ("+" if signed else "") + spec.replace("1%", "3f"))
    )
    return text.replace("-", "\u2212")


def _interval(results: Results, low: float, high: float, *, signed: bool = False) -> str:
    if low != low:
        return "–"
    ends = (_format(results, end, signed=signed) for end in (low, high))
    return "\u00a0to\u00a0".join(ends)
