"""The page of a file of votes: its labelers, a figure for each, and what to believe of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.labelers.agreement import (
    Measured,
    dawid_skene,
    krippendorff_alpha,
    majority,
    vote_table,
)
from rlhf_jax.labelers.estimates import CrowdReport, Estimate, LabelerReport, estimate, spammers
from rlhf_jax.labelers.likelihood import Votes
from rlhf_jax.report import figure
from rlhf_jax.report.page import render_page
from rlhf_jax.report.tables import format_percent

CANNOT = "cannot be told"
MEANING = (
    "Each number stands beside half the width of its 95 % interval. Sharpness: logits per unit of "
    "{unit}. Length: logits per word. Courtesy: logits per unit of politeness. Position: logits "
    "for the reply shown first. Lapses: the share of votes that are a toss of a coin. Accuracy: "
    "how often the better of two replies is preferred, as the fit expects it. Again: the share of "
    "pairs judged as the first time when they came again. Cycles: of three replies that were all "
    "compared, how often a beat b, b beat c and c beat a."
)
GOLD, FITTED = "the score", "quality, whose standard deviation over pairs is 1"


def columns(votes: Votes) -> tuple[str, ...]:
    """The headings of the table of labelers."""
    return ("labeler", *votes.effects, "votes", "accuracy", "again", "cycles")


def table(votes: Votes, report: CrowdReport) -> list[list[str]]:
    """A row of texts for each labeler, in the order of `columns`."""
    return [
        [
            each.name,
            *(show(name, effect) for name, effect in each.effects.items()),
            f"{each.votes:,}",
            show("accuracy", each.accuracy),
            _share(each.consistency),
            _share(each.cycles),
        ]
        for each in report.labelers
    ]


def show(name: str, effect: Estimate) -> str:
    """An estimate as text, with half its interval's width, or that it cannot be told."""
    if effect.why:
        return CANNOT
    digits = {"sharpness": 1, "lapses": 3, "accuracy": 3, "length": 3}.get(name, 2)
    half = (effect.high - effect.low) / 2
    return f"{effect.value:.{digits}f}\u00a0±\u00a0{half:.{digits}f}".replace("-", "\u2212")


def _share(measured: Measured) -> str:
    return "–" if measured.value is None else f"{100 * measured.value:.0f}\u00a0% of {measured.of}"


def sentences(votes: Votes, report: CrowdReport) -> list[str]:
    """What the votes say of the people together, in words."""
    alpha = krippendorff_alpha(vote_table(votes))
    said = f"Krippendorff’s α is undefined: {alpha.why}."
    if alpha.value is not None:
        said = f"Krippendorff’s α is {alpha.value:.3f} over {alpha.of:,} pairs of replies."
    told = [
        f"{len(votes.wins):,} votes by {len(votes.labelers)} labelers about "
        f"{len(votes.features):,} pairs of replies. {said}"
    ]
    if named := spammers(report.labelers):
        told.append(f"As a coin would answer: {', '.join(named)}. Leave out what they said.")
    if contrary := [each.name for each in report.labelers if each.verdict == "contrary"]:
        told.append(f"Surely preferring the worse reply: {', '.join(contrary)}.")
    if not report.known:
        told.append(
            "How good the replies are is not known, and is fitted with the labelers from pairs "
            "that several of them judged. What most labelers share, a liking for length too, "
            "counts as quality: a bias that all have cannot be told from it. Intervals of length "
            "and courtesy are too narrow then where quality is not normally distributed."
        )
    if not report.converged:
        told.append("The fit did not end where the likelihood is highest: trust no number here.")
    return told


Beliefs = tuple[tuple[str, ...], list[list[str]], list[str]]


def beliefs(votes: Votes, report: CrowdReport) -> Beliefs:
    """(headings, rows, sentences) of what to believe of a pair, by three methods.

    The third is the fit of labelers whose replies' quality is unknown. Right and wrong are by the
    known scores, of pairs that these tell apart.
    """
    blind = estimate(replace(votes, quality=None)) if report.known else report
    methods = {
        "majority": majority(votes) - 0.5,
        "Dawid–Skene": dawid_skene(votes) - 0.5,
        "labelers fitted": blind.belief,
    }
    sides = {name: np.sign(np.where(np.abs(b) < 1e-9, 0, b)) for name, b in methods.items()}
    told = []
    if len(votes.wins) == len(votes.features):
        told.append(
            "Each pair has a single vote: majority and Dawid–Skene are both that vote, and nothing "
            "but further votes about the same pairs can say who is right."
        )
    if votes.quality is None:
        fitted = sides["labelers fitted"]
        rows = [
            [name, f"{int((side == 0).sum()):,}", f"{int((side == -fitted).sum()):,}"]
            for name, side in sides.items()
        ]
        return ("method", "undecided", "against the fit"), rows, told
    truth = np.sign(votes.quality)
    known = truth != 0
    rows = [
        [name, *(f"{int((known & (side == want)).sum()):,}" for want in (truth, 0, -truth))]
        for name, side in sides.items()
    ]
    misled = known & (sides["majority"] == -truth)
    if misled.any():
        ds, fit = (
            format_percent(float((sides[name][misled] == -truth[misled]).mean()))
            for name in ("Dawid–Skene", "labelers fitted")
        )
        told.append(
            f"On {int(misled.sum()):,} pairs most votes are wrong. Dawid–Skene believes them "
            f"on {ds} and the fit on {fit}: two who are wrong of three are believed by all of them "
            "unless these two are known to be worse."
        )
    return ("method", "right", "undecided", "wrong"), rows, told


def draw_labeler(
    votes: Votes, report: LabelerReport, truth: Mapping[str, float], known: bool
) -> figure.Plot:
    """Draws a labeler's effects on a typical pair with 95 % intervals, and the truth where known.

    Each is in logits per standard deviation over pairs of what it is an effect of; lapses, which
    are none, are in the caption. What cannot be told is an open circle without an interval.
    """
    spread = np.sqrt((votes.features**2).mean(0)).tolist()
    quality = 1.0 if votes.quality is None else float(np.sqrt((votes.quality**2).mean()))
    scales = dict(zip(votes.effects, [quality, *spread, 1.0], strict=False))
    rows = [
        (
            name, each.value * scale, each.low * scale, each.high * scale, each.why,
            truth[name] * scale if name in truth and (known or name != "sharpness") else "",
        )
        for (name, scale), each in zip(scales.items(), report.effects.values(), strict=False)
    ]  # fmt: skip
    header = ("effect", "estimate", "low", "high", "cannot be told", "truth")
    with figure.open_axes(report.name, header, rows, 1.7) as (axes, done):
        axes.axvline(0, color=figure.INK, linewidth=0.6)
        for y, (_, value, low, high, why, true) in enumerate(rows):
            if not why:
                axes.plot([low, high], [y, y], color=figure.BLUE, linewidth=1.6)
            face = "none" if why else figure.BLUE
            axes.plot([value], [y], "o", color=figure.BLUE, markerfacecolor=face, markersize=5)
            if true != "":
                axes.plot([true], [y], "|", color=figure.ORANGE, markersize=11, markeredgewidth=1.8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        figure.label_axes(axes, "logits on a typical pair" + "; bar: the truth" * bool(truth), "")
    lapses = show("lapses", report.effects["lapses"])
    accuracy = show("accuracy", report.accuracy)
    verdict = f"{report.verdict}; " if report.verdict else ""
    return replace(done(), note=f"{verdict}lapses {lapses}, accuracy {accuracy}")


def write_page(
    out: str,
    source: str,
    votes: Votes,
    report: CrowdReport,
    believed: Beliefs,
    truths: Mapping[str, Mapping[str, float]],
) -> Path:
    """Writes the page of a file of votes and returns its path.

    Args:
        out: the page's file.
        source: what the votes were read from.
        votes: the votes.
        report: `estimate` of them.
        believed: `beliefs` of them.
        truths: simulated labelers' true effects by name.

    Raises:
        UserError: there cannot be a file of that name.
    """
    headings, rows, told = believed
    plots = [
        draw_labeler(votes, each, truths.get(each.name, {}), report.known)
        for each in report.labelers
    ]
    page = render_page(
        "labelers.html.jinja",
        source=source,
        sentences=sentences(votes, report),
        labelers=_entry("Labelers", columns(votes), table(votes, report)),
        untold=_untold(report),
        meaning=MEANING.format(unit=GOLD if report.known else FITTED),
        plots=plots,
        believed=_entry("Pairs of replies", headings, rows),
        beliefs=told,
    )
    try:
        write_whole(Path(out), page.encode())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out!r}: {error}") from error
    return Path(out)


def _untold(report: CrowdReport) -> dict[str, Any] | None:
    rows = [
        [each.name, name, effect.why]
        for each in report.labelers
        for name, effect in each.effects.items()
        if effect.why
    ]
    return _entry("What cannot be told", ("labeler", "effect", "why"), rows) if rows else None


def _entry(title: str, headings: tuple[str, ...], rows: list[list[str]]) -> dict[str, Any]:
    return {"title": title, "columns": headings, "rows": rows, "fit": True}
