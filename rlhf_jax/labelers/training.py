"""What a model is trained on where labelers differ: their votes as they are, or what they come to.

pooled      every vote is a pair, whoever's it is
majority    every pair once, as most voted; without those that are undecided
weighted    every pair once, by Dawid–Skene's probability p of it, with weight |2p − 1|
nuisance    every vote, with what its labeler is: the score learns what is left when the labeler's
            position and length effects, lapses and sharpness are taken out. Scoring knows of none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from rlhf_jax.data.records import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.labelers.agreement import dawid_skene, majority
from rlhf_jax.labelers.estimates import sees, take_shared
from rlhf_jax.labelers.likelihood import Votes, fit
from rlhf_jax.labelers.read import Vote, arrays_of, comparing


class Settled(NamedTuple):
    """Pairs to train on.

    Attributes:
      records: N pairs.
      effects: [N, 3] scale, bias for the chosen one in logits, and lapses of who chose; or None.
      weights: [N] in [0, 1], or None for 1.
    """

    records: Sequence[Pair]
    effects: np.ndarray | None = None
    weights: np.ndarray | None = None


def settle(records: Sequence[Pair], how: str, what: str) -> Settled:
    """What the votes of a source come to by one of the ways above; `what` names it in messages.

    Nothing but the votes is used, no score of a reply. With fewer than three labelers a bias for
    length cannot be told from quality, and is left in.

    Raises:
        UserError: a record has no labeler, all compare a reply with itself, or no pair is decided.
    """
    if how == "pooled":
        return Settled(records)
    compared = comparing([Vote(record) for record in records], what)
    records = [vote.record for vote in compared]
    votes = arrays_of(compared, judged=False)
    if how == "nuisance":
        effects = vote_effects(votes)
        print(f"{what}: {len(records):,} votes of {len(votes.labelers)} labelers", flush=True)
        return Settled(records, effects=effects)
    belief = majority(votes) if how == "majority" else dawid_skene(votes)
    decided = np.flatnonzero(np.abs(belief - 0.5) > 1e-9)
    print(
        f"{what}: {len(records):,} votes about {len(belief):,} pairs, of which "
        f"{len(belief) - len(decided):,} are undecided and left out",
        flush=True,
    )
    if not len(decided):
        raise UserError(f"{what}: no pair has a majority; data.labelers=pooled takes the votes")
    first = {int(pair): i for i, pair in reversed([*enumerate(votes.pair)])}
    pairs = []
    for pair in decided.tolist():
        record, wins = records[first[pair]], votes.wins[first[pair]]
        sides = (record.chosen, record.rejected)
        chosen, rejected = sides if (belief[pair] > 0.5) == (wins > 0.5) else sides[::-1]
        pairs.append(Pair(record.id, record.prompt, chosen, rejected))
    weights = np.abs(2 * belief[decided] - 1) if how == "weighted" else None
    return Settled(pairs, weights=weights)


def vote_effects(votes: Votes) -> np.ndarray:
    """[V, 3] of each vote: its labeler's scale, their bias for what they chose, and lapses.

    A scale of 1 is the median sharpness of those whose votes depend on how good replies are.

    Raises:
        UserError: nobody's do.
    """
    fitted = fit(votes)
    seeing = sees(fitted)
    if not seeing.any():
        raise UserError(
            f"the votes of {len(votes.labelers)} labelers don't tell how good replies are, beyond "
            "what length and positions explain: they need pairs that several of them judged; "
            "data.labelers=pooled takes the votes as they are"
        )
    if len(votes.labelers) > 2:
        fitted, _ = take_shared(fitted)
    theta = fitted.theta.copy()
    if len(votes.labelers) < 3:
        theta[:, 1:-2] = 0
    mine, side = theta[votes.labeler], np.where(votes.wins > 0.5, 1.0, -1.0)
    bias = (mine[:, 1:-2] * votes.features[votes.pair]).sum(1) + mine[:, -2] * votes.first
    scale = mine[:, 0] / np.median(theta[seeing, 0])
    return np.stack([scale, side * bias, expit(mine[:, -1])], axis=1)
