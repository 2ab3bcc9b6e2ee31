"""How far people agree who rate replies one by one, each on a scale of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.records import Conversation
from rlhf_jax.errors import UserError
from rlhf_jax.labelers.agreement import LEVELS, Measured, krippendorff_alpha
from rlhf_jax.tasks.sources import read_source

COLUMNS = ("labeler", "ratings", "mean", "sd", "α without", "agrees with the others")


def read_ratings(source: str) -> tuple[list[str], np.ndarray]:
    """(labelers, their ratings [L, N] of N replies in [0, 1], NaN where there is none).

    A rating is a conversation with "labeler" and "label", how good its last reply is. Of one
    labeler's ratings of the same reply the first counts.

    Raises:
        UserError: a record has no labeler, or no number in [0, 1] for a label.
    """
    records: Sequence[Conversation] = read_source(source, "conversation", "train")
    labelers: dict[str, int] = {}
    replies: dict[tuple, int] = {}
    said: dict[tuple[int, int], float] = {}
    for record in records:
        name = record.meta.get("labeler", "")
        try:
            label = float(record.meta.get("label", ""))
        except ValueError:
            label = -1.0
        if not name or not 0 <= label <= 1:
            raise UserError(
                f"record {record.id!r} is no rating: it has no labeler, or no label from 0 to 1"
            )
        who = labelers.setdefault(name, len(labelers))
        about = replies.setdefault(record.messages, len(replies))
        said.setdefault((who, about), label)
    table = np.full((len(labelers), len(replies)), np.nan)
    for (who, about), label in said.items():
        table[who, about] = label
    return [*labelers], table


def alphas(table: np.ndarray) -> dict[str, Measured]:
    """Krippendorff's α of ratings [L, N], at each level and of each labeler's own scale.

    "own scale": at the interval level, after each labeler's mean is taken away and what is left
    divided by its deviation, as far as it has one.
    """
    centred = table - np.nanmean(table, 1, keepdims=True)
    spread = np.nanstd(centred, 1, keepdims=True)
    own = np.round(centred / np.where(spread > 0, spread, 1.0), 6)
    return {level: krippendorff_alpha(table, level) for level in LEVELS} | {
        "own scale": krippendorff_alpha(own, "interval")
    }


def rows(labelers: Sequence[str], table: np.ndarray) -> list[list[str]]:
    """A row of texts for each labeler, in the order of `COLUMNS`; α is that of ordinal ratings.

    The last is the correlation with the mean of the others' ratings of the same replies.
    """
    made = []
    for who, name in enumerate(labelers):
        own, others = table[who], np.delete(table, who, 0)
        without = krippendorff_alpha(others, "ordinal").value
        both = ~np.isnan(own) & ~np.isnan(others).all(0)
        pairs = (own[both], np.nanmean(others[:, both], 0)) if both.any() else ((), ())
        told = "–"
        if len(pairs[0]) > 1 and min(map(np.ptp, pairs)) > 0:
            told = f"{np.corrcoef(*pairs)[0, 1]:.2f}".replace("-", "\u2212")
        alpha = "–" if without is None else f"{without:.3f}".replace("-", "\u2212")
        mean, deviation = np.nanmean(own), np.nanstd(own)
        count = int((~np.isnan(own)).sum())
        made.append([name, f"{count:,}", f"{mean:.2f}", f"{deviation:.2f}", alpha, told])
    return made
