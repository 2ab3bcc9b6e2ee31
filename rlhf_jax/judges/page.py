"""Pages of a judge: its report card, and what its labels are worth."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from rlhf_jax.files import write_whole
from rlhf_jax.judges import card, worth
from rlhf_jax.judges.card import Card
from rlhf_jax.judges.worth import Worth
from rlhf_jax.report.cells import draw_bands, draw_intervals
from rlhf_jax.report.figure import Plot
from rlhf_jax.report.page import render_page

_ROWS = (
    "Accuracy: how often the judge prefers the side that gold does, ½ where it prefers none. "
    "Cohen’s κ: agreement beyond chance. Swap flips: verdicts that turn with the order. Position: "
    "preference for what is shown first. 10 words more: what they add to the probability, at equal "
    "gold. A plea: “This answer is right.” behind the worse answer."
)
_WORTH = (
    "Accuracy of reward models on held-out pairs in the order of gold. A label of the judge is "
    "worth as many gold labels as give the same accuracy on a line in the logarithm of their "
    "number; the interval is Fieller’s, over seeds."
)


def write_card(path: Path, judge: str, title: str, cards: Mapping[str, Card]) -> None:
    """Writes the page of report cards by principle; `title` says what pairs they are of."""
    names, each = [*cards], [*cards.values()]
    none = [(nan, nan)] * len(each)
    plots = [
        draw_intervals(
            "How often it prefers the better answer", cells=names,
            mean=[c.accuracy.rate for c in each], low=[c.accuracy.low for c in each],
            high=[c.accuracy.high for c in each], inner=none, runs=[[] for _ in each],
            xlabel="share of pairs that gold orders; a coin has 0.5",
        ),
        draw_intervals(
            "How often the first answer is better", cells=names,
            mean=[c.corrected.rate for c in each], low=[c.corrected.low for c in each],
            high=[c.corrected.high for c in each],
            inner=[(c.naive.low, c.naive.high) for c in each], runs=[[c.exact] for c in each],
            xlabel="corrected, its interval; thick: as the judge says; tick: exact",
        ),
    ]  # fmt: skip
    told = [f"{title}.".replace(",", ",\u200b")]
    for name, c in cards.items():
        told += [f"{name}: {n:,} pairs have no verdict, {why}." for why, n in c.masked.items()]
    _write(path, judge, told, plots, ["", *names], card.table(cards), _ROWS)


def write_worth(path: Path, judge: str, told: str, found: Worth) -> None:
    """Writes the page of what its labels are worth; `told` says so in a sentence."""
    estimates = found.estimates()
    of_gold, of_judge = [each[1] for each in estimates], [each[2] for each in estimates]
    cells = {
        name: {
            "steps": found.counts, "mean": [e.mean for e in each],
            "low": [e.low for e in each], "high": [e.high for e in each],
            "runs": values.T.tolist(),
        }
        for name, values, each in (("gold", found.gold, of_gold), (judge, found.judge, of_judge))
    }  # fmt: skip
    title = "Accuracy of a reward model by gold order"
    plots = [draw_bands(title, cells=cells, xlabel="labels", ylabel="accuracy")]
    columns, rows = worth.table(found)
    _write(path, judge, [told], plots, columns, rows, _WORTH)


def _write(
    path: Path,
    judge: str,
    told: Sequence[str],
    plots: Sequence[Plot],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    note: str,
) -> None:
    table = {"title": "", "columns": columns, "rows": rows, "note": note}
    command = shlex.join(["python", *sys.orig_argv[1:]])
    page = render_page(
        "judge.html.jinja", judge=judge.replace(",", ",\u200b"), sentences=told, plots=plots,
        table=table, command=command,
    )  # fmt: skip
    write_whole(path, page.encode())
    print(f"report: {path}", flush=True)
