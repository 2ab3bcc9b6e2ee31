"""A sweep's results as texts: rows of its tables, and the sentences that say what they mean."""

from __future__ import annotations

from rlhf_jax.report.tables import METRICS, format_seconds
from rlhf_jax.sweep.results import SIGNIFICANT, Results
from rlhf_jax.training.meanings import is_less_better

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
            _format_p(each.p),
            _format_p(adjusted),
        ]
        for row in results.rows
        for each, adjusted in ([row.difference] if row.difference else [])
    ]


def sentences(results: Results, fresh: Results | None) -> list[str]:
    """What the table means, in words."""
    return [*_of_best(results, fresh), *_of_wins(results), *(_of_wins(fresh) if fresh else ())]


def _of_wins(results: Results) -> list[str]:
    """How often the others' answers are better by gold than the baseline's to the same prompts."""
    told = []
    for row in results.rows:
        wins = results.wins(row.name) if row.difference else None
        if wins:
            seeds = ", ".join(map(str, sorted(results.outcomes[row.name])))
            within = f" ({wins.low + 0.5:.3f} to {wins.high + 0.5:.3f})"
            told.append(
                f"To the same prompts {row.name} gives the better answer by gold, ties ½, in "
                f"{wins.mean + 0.5:.3f}{within if wins.low == wins.low else ''} against "
                f"{results.baseline}, seeds {seeds}."
            )
    return told


def _of_best(results: Results, fresh: Results | None) -> list[str]:
    best = results.best
    if best is None:
        return ["No cell has finished whole, so that none is called the best."]
    if fresh is None:
        return [
            f"{best.name} has the best mean; with a single seed or cell nothing can be said of it."
        ]
    told = _on_fresh_seeds(fresh, best.name)
    told[0] = f"Best: {best.name}. {told[0]}"
    if best.estimate:
        mean = _format(results, best.estimate.mean)
        told.append(f"On the seeds that it was chosen by it had {mean}.")
    if alike := results.equals_of(best.name):
        told.append(f"These cells may be as good; those seeds do not decide: {'; '.join(alike)}.")
    return told


def of_search(fresh: Results, best: str, trials: int) -> list[str]:
    """What a search has found, in words, from seeds that none of its trials had."""
    first, *others = _on_fresh_seeds(fresh, best)
    return [f"Best of {trials} trials: {best}. {first}", *others]


def _on_fresh_seeds(fresh: Results, best: str) -> list[str]:
    """What a cell has on seeds that it was not chosen by, and how much over the baseline."""
    row = fresh.row(best)
    if row.estimate is None or row.failures:
        return ["It failed on fresh seeds, so that it is not called the best."]
    e = row.estimate
    within = f" ({_interval(fresh, e.low, e.high)})" if e.low == e.low else ""
    told = [f"On {e.seeds} fresh seeds it has {_format(fresh, e.mean)}{within}."]
    if row.difference:
        d, p = row.difference
        better = (d.mean < 0) == is_less_better(fresh.metric)
        verdict = "that may be chance"
        if p < SIGNIFICANT:
            verdict = "it is better" if better else "it is worse"
        told.append(
            f"Over {fresh.baseline}, on the same seeds: {_format(fresh, d.mean, signed=True)} "
            f"({_interval(fresh, d.low, d.high, signed=True)}), p {_format_p(p, '= ')}: {verdict}."
        )
    return told


def _format(results: Results, value: float, *, signed: bool = False) -> str:
    """A number of the metric; rates are not in per cent, whose differences would be ambiguous."""
    spec = METRICS.get(results.metric, ("", "", ".3f"))[2]
    text = (
        "–" if value != value else format(value, ("+" if signed else "") + spec.replace("1%", "3f"))
    )
    return text.replace("-", "\u2212")


def _format_p(p: float, equals: str = "") -> str:
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def _interval(results: Results, low: float, high: float, *, signed: bool = False) -> str:
    if low != low:
        return "–"
    ends = (_format(results, end, signed=signed) for end in (low, high))
    return "\u00a0to\u00a0".join(ends)
