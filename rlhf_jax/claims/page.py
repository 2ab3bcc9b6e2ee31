"""The page of some claims: one table, one figure, and what was measured beside each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.claims.findings import Finding
from rlhf_jax.claims.tables import COLUMNS, besides, rows
from rlhf_jax.files import write_whole
from rlhf_jax.report.cells import draw_intervals
from rlhf_jax.report.figure import Plot
from rlhf_jax.report.page import render_page


def write_page(directory: Path, path: str, findings: Sequence[Finding]) -> Path:
    """Writes report.html of some claims from the file `path`, and returns its path."""
    verdicts = [finding.verdict for finding in findings]
    counted = [f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)]
    table = {"title": "Claims and comparisons", "columns": COLUMNS, "rows": rows(findings)}
    page = render_page(
        "claims.html.jinja",
        source=path,
        counted=", ".join(counted),
        table=table | {"note": _WHAT, "fit": True},
        plots=[draw(findings)] if any(finding.tests for finding in findings) else [],
        findings=[(finding, besides(finding)) for finding in findings],
        directory=str(directory),
        command=shlex.join(["python", "-m", "rlhf_jax.claims", *sys.argv[1:]]),
    )
    write_whole(directory / "report.html", page.encode())
    return directory / "report.html"


_WHAT = (
    "Ours and theirs are means over seeds and prompts. The interval is of their difference on the "
    "same seeds and prompts: where runs of other seeds on other prompts would have it. Every rule "
    "and margin was stated before the runs. A claim is supported if all of its comparisons are, "
    "refuted if one of them is, and undecided if a condition is not shown to hold."
)


def draw(findings: Sequence[Finding]) -> Plot:
    """The intervals of all differences, each in units of what its rule asks for."""
    names, numbers = [], []
    for finding in findings:
        for i, each in enumerate(finding.found, 1):
            unit, e = each.comparison.margin or 1.0, each.difference
            names.append(finding.claim.name + (f" {i}" if len(finding.found) > 1 else ""))
            values = (e.mean, e.low, e.high, *each.of_prompts, *each.seeds)
            numbers.append([value / unit for value in values])
    return draw_intervals(
        "Differences in units of their margins, with intervals",
        cells=names,
        mean=[mean for mean, *_ in numbers],
        low=[low for _, low, *_ in numbers],
        high=[high for _, _, high, *_ in numbers],
        inner=[(low, high) for _, _, _, low, high, *_ in numbers],
        runs=[seeds for _, _, _, _, _, *seeds in numbers],
        xlabel="difference in margins; thick: of prompts alone; ticks: seeds",
    )
