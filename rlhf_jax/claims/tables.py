"""Findings as texts: for the console and the page, for a README and for a spreadsheet.

What decides holds no time and no size of memory, so that runs which were killed and begun again
come to the same table.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from rlhf_jax.claims.findings import LEVEL, Finding, Found
from rlhf_jax.files import write_whole
from rlhf_jax.report.figure import csv_text

COLUMNS = ("claim", "verdict", "compared", f"difference, {100 * LEVEL:g} %", "must be")
TABLE = "claims.md"
_CSV = [
    *("claim", "verdict", "condition", "compared", "rule", "margin", "holds"),
    *("ours", "theirs", "difference", "low", "high", "low of prompts alone"),
    *("high of prompts alone", "seeds", "prompts", "differences of seeds"),
]
_UNITS = {"seconds": " s", "memory": " MiB"}


def rows(findings: Sequence[Finding]) -> list[list[str]]:
    """A row for each comparison, in the order of `COLUMNS`; of a claim that was not run one row."""
    found = []
    for finding in findings:
        first = [finding.claim.name, finding.verdict]
        for each in finding.found:
            compared = f"{each.comparison}: {means(each)}"
            found.append([*first, compared, difference(each), asked(finding, each)])
            first = ["", ""]
        if not finding.tests:
            found.append([*first, *["–"] * 3])
    return found


def means(found: Found) -> str:
    """The means of both sides."""
    return f"{number(found.ours)} and {number(found.theirs)}"


def difference(found: Found) -> str:
    """A difference with its interval."""
    e = found.difference
    low, high = number(e.low, signed=True), number(e.high, signed=True)
    return f"{number(e.mean, signed=True)} ({low} to {high})"


def number(value: float, *, signed: bool = False) -> str:
    """A number with three digits after the point, none where it is in the hundreds."""
    if not isfinite(value):
        return "–"
    places = 0 if abs(value) >= 100 else 3
    return format(value, f"{'+' if signed else ''},.{places}f").replace("-", "−")


def asked(finding: Finding, found: Found) -> str:
    """What the rule asks of the interval, and whether it is so."""
    condition = ", a condition" if found in finding.conditions else ""
    return f"{found.comparison.must_be}{condition}: {found.verdict}"


def told(finding: Finding) -> list[str]:
    """A line for each comparison: what it came to."""
    return [
        f"{each.comparison}: {means(each)}, {difference(each)}; must be {asked(finding, each)}"
        for each in finding.found
    ]


def besides(finding: Finding) -> list[str]:
    """What is told beside a claim, a text for each measure: its mean, and its range over seeds."""
    texts = []
    for measure, mean, least, greatest in finding.beside:
        spread = f" ({number(least)} to {number(greatest)})" if least < greatest else ""
        texts.append(f"{measure} {number(mean)}{_UNITS.get(measure.metric, '')}{spread}")
    return texts


def markdown(findings: Sequence[Finding]) -> str:
    """The table for a README, a row a claim."""
    lines = [f"| claim | verdict | measured, with {100 * LEVEL:g} % intervals |", "|---|---|---|"]
    for finding in findings:
        verdict = f"**{finding.verdict}**" if finding.tests else finding.verdict
        measured = "<br>".join(told(finding)) or "–"
        lines.append(f"| {finding.claim.sentence} | {verdict} | {measured} |")
    return "\n".join(lines) + "\n"


def write_tables(directory: Path, findings: Sequence[Finding]) -> None:
    """Writes claims.md, a row a claim, and claims.csv, a row a comparison with all its numbers."""
    table = [
        [
            *(finding.claim.name, finding.verdict, each in finding.conditions),
            *(str(each.comparison), each.comparison.rule, each.comparison.margin, each.verdict),
            *(each.ours, each.theirs),
            *(each.difference.mean, each.difference.low, each.difference.high, *each.of_prompts),
            *(each.difference.seeds, each.prompts, " ".join(map(repr, each.seeds))),
        ]
        for finding in findings
        for each in finding.found
    ]
    write_whole(directory / "claims.csv", csv_text(_CSV, table).encode())
    write_whole(directory / TABLE, markdown(findings).encode())


def print_finding(finding: Finding) -> None:
    """Prints a claim's verdict, what it was found by and beside, and which runs have failed."""
    failed = [f"{run} failed: {why}" for run, why in finding.failures.items()]
    print(f"{finding.verdict}: {finding.claim.name}: {finding.claim.sentence}")
    for line in [*told(finding), *besides(finding), *failed]:
        print(f"    {line}", flush=True)
