"""How far labelers agree with each other and with themselves, and what to believe of a pair."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from rlhf_jax.labelers.likelihood import Votes

LEVELS = ("nominal", "ordinal", "interval")


class Measured(NamedTuple):
    """A number, or None and why there is none; `of` is of how many it is."""

    value: float | None
    why: str
    of: int


def krippendorff_alpha(table: np.ndarray, level: str = "nominal") -> Measured:
    """Krippendorff's α = 1 − D_observed / D_expected of what labelers said of the same units.

    "Computing Krippendorff's Alpha-Reliability" (2011), https://repository.upenn.edu/asc_papers/43

    Args:
      table: [labelers, units] float, NaN where a labeler said nothing.
      level: "nominal": values differ or don't; "ordinal": by how many lie between; "interval": by
        their squared difference.

    Returns:
      α and the number of units with two values or more; None where nothing was said twice, or all
      that was said is the same, so that no disagreement could be expected.
    """
    if level not in LEVELS:
        raise ValueError(f"level is one of {', '.join(LEVELS)}, not {level!r}")
    values = np.unique(table[~np.isnan(table)])
    said = (table[:, :, None] == values).sum(0)  # [units, values]
    said = said[said.sum(1) > 1]
    if not len(said):
        return Measured(None, "nothing has two labels", 0)
    pairable = said / (said.sum(1, keepdims=True) - 1)
    coincidences = pairable.T @ said - np.diag(pairable.sum(0))
    totals = coincidences.sum(0)
    if np.count_nonzero(totals) < 2:
        return Measured(None, "all labels are the same", len(said))
    apart = values[:, None] - values
    if level == "nominal":
        apart = np.sign(apart)
    if level == "ordinal":
        ranks = np.cumsum(totals) - totals / 2
        apart = ranks[:, None] - ranks
    observed = (coincidences * apart**2).sum()
    expected = (totals[:, None] * totals * apart**2).sum() / (totals.sum() - 1)
    return Measured(float(1 - observed / expected), "", len(said))


def vote_table(votes: Votes) -> np.ndarray:
    """[L, P] each labeler's first vote about each pair: 1 for a, 0 for b, ½ for a tie, else NaN."""
    table = np.full((len(votes.labelers), len(votes.features)), np.nan)
    first = np.unique(votes.labeler * table.shape[1] + votes.pair, return_index=True)[1]
    table[votes.labeler[first], votes.pair[first]] = votes.wins[first]
    return table


def self_consistency(votes: Votes) -> list[Measured]:
    """For each labeler, how often a pair that came again was judged as it was the first time."""
    first: dict[tuple[int, int], float] = {}
    agreed: list[list[bool]] = [[] for _ in votes.labelers]
    for who, pair, wins in zip(votes.labeler, votes.pair, votes.wins, strict=True):
        if (who, pair) in first:
            agreed[who].append(bool(wins == first[who, pair]))
        first.setdefault((who, pair), wins)
    return [_share(sum(each), len(each), "no pair came to this labeler twice") for each in agreed]


def cycles(votes: Votes) -> list[Measured]:
    """For each labeler, the share of three replies, all compared, where a beat b, b c and c a."""
    beaten: list[dict[int, dict[int, float]]] = [defaultdict(dict) for _ in votes.labelers]
    for who, pair, wins in zip(votes.labeler, votes.pair, votes.wins, strict=True):
        a, b = votes.replies[pair].tolist()
        beaten[who][a][b] = beaten[who][a].get(b, 0.0) + wins - 0.5
        beaten[who][b][a] = -beaten[who][a][b]
    results = []
    for graph in beaten:
        triples = cyclic = 0
        for a, others in graph.items():
            for b, c in combinations(sorted(others), 2):
                if a < b and c in graph[b]:
                    triples += 1
                    around = {np.sign(graph[a][b]), np.sign(graph[b][c]), np.sign(graph[c][a])}
                    cyclic += around in ({1.0}, {-1.0})
        why = "no three replies were all compared by this labeler"
        results.append(_share(cyclic, triples, why))
    return results


def _share(count: int, of: int, why: str) -> Measured:
    return Measured(count / of, "", of) if of else Measured(None, why, 0)


def majority(votes: Votes) -> np.ndarray:
    """[P] the share of a pair's votes that are for a, a tie half a vote."""
    count = np.bincount(votes.pair, minlength=len(votes.features))
    return np.bincount(votes.pair, votes.wins, len(votes.features)) / count


def dawid_skene(votes: Votes, *, most: int = 200, tolerance: float = 1e-6) -> np.ndarray:
    """[P] the probability that a is better, each labeler having an error rate for either side.

    "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm" (1979),
    https://www.jstor.org/stable/2346806, with one vote more of each kind, which keeps rates from
    0 and 1. Both sides are as likely beforehand, since it means nothing which of them is a. It
    starts from the majority's shares and ends where no probability changes by more than
    `tolerance`, or after `most` rounds.
    """
    labelers, pairs = len(votes.labelers), len(votes.features)
    belief = majority(votes)
    for _ in range(most):
        rates = []  # P(vote for a | a better), P(vote for a | b better)
        for better in (belief, 1 - belief):
            weight = better[votes.pair]
            total = np.bincount(votes.labeler, weight, labelers) + 2
            rates.append((np.bincount(votes.labeler, weight * votes.wins, labelers) + 1) / total)
        of_a, of_b = (np.log(rates[0] / rates[1]), np.log((1 - rates[0]) / (1 - rates[1])))
        each = votes.wins * of_a[votes.labeler] + (1 - votes.wins) * of_b[votes.labeler]
        before, belief = belief, expit(np.bincount(votes.pair, each, pairs))
        if np.abs(belief - before).max() < tolerance:
            break
    return belief
