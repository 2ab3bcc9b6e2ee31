"""A crowd of named people who compare the same replies, and rate them one by one.

What a person sees of a reply's worth is u(a) of `labelers`, with Gumbel noise, so that the greater
of two is what Bradley–Terry says. A comparison tells which one it is. A rating tells the worth in
units of gold score on the person's own scale from 1 to 5, which is rounded and cut at its ends:

    3 + offset + drift · (t − ½) + slope · (u(a) / sharpness − 0.75) / 0.125

where t goes from 0 to 1.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import log
from random import Random
from typing import Any

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.labelers import Labeler, compare
from rlhf_jax.tasks.town.town import Town

VOTES_PER_PAIR = 4
REPEATED = 0.1  # the share of votes that the same person is asked for again, sides swapped
MIDDLE, STEP = 0.75, 0.125  # the gold score of a 3, and what a further point takes at slope 1


@dataclass(frozen=True)
class Person:
    """Somebody of a crowd: how they compare, and the scale on which they rate.

    `offset` and `drift` are points of the scale, the drift from the first rating to the last one;
    `slope` is in points per `STEP` of gold score.
    """

    compares: Labeler = field(default_factory=Labeler)
    offset: float = 0.0
    slope: float = 1.0
    drift: float = 0.0

    def rate(self, rng: Random, prompt: Prompt, reply: str, time: float) -> int:
        """The person's rating of a reply, 1 to 5; `time` in [0, 1] is how far on they are."""
        labeler = self.compares
        if rng.random() < labeler.lapses or not labeler.sharpness:
            return 1 + int(5 * rng.random())
        noise = -log(-log(rng.random() or 1e-300))
        worth = (labeler.utility(gold_score(prompt, reply), reply) + noise) / labeler.sharpness
        points = 3 + self.offset + self.drift * (time - 0.5) + self.slope * (worth - MIDDLE) / STEP
        return min(5, max(1, round(points)))


CROWD: Mapping[str, Person] = {
    "careful": Person(),
    "hasty": Person(Labeler(sharpness=12, lapses=0.05), offset=0.5, slope=0.7, drift=0.8),
    "length-loving": Person(Labeler(sharpness=15, length=0.2), offset=-0.5, slope=0.8),
    "courtesy-loving": Person(Labeler(sharpness=15, courtesy=4), offset=1.0, slope=0.8),
    "first-position": Person(Labeler(position=1), offset=-1.0, drift=-0.8),
    "last-position": Person(Labeler(position=-1), slope=1.4),
    "lapsing": Person(Labeler(lapses=0.3), drift=1.0),
    "spammer": Person(Labeler(sharpness=0, lapses=1)),
}
"""One of each kind. All but the last two can be told well from a thousand votes."""

BIASED: Mapping[str, Person] = {
    **{f"honest-{i}": Person(Labeler(sharpness=15), offset=i / 2 - 1.5) for i in range(1, 6)},
    **{f"hasty-{i}": Person(Labeler(sharpness=8, lapses=0.05), slope=0.7) for i in range(1, 3)},
    **{f"length-loving-{i}": Person(Labeler(sharpness=8, length=0.6)) for i in range(1, 4)},
}
"""Ten people of whom three prefer what is longer."""


def votes(
    town: Town,
    split: str,
    people: Mapping[str, Person] = CROWD,
    *,
    prompts: int = 650,
    seed: int = 0,
) -> Iterator[Pair]:
    """Comparisons of three replies to each prompt, every pair by several people in both orders.

    `meta` is that of `labelers.compare` and "labeler", "order" ("chosen_first" or
    "rejected_first"), "pair", and "truth", JSON of what the labeler is. `REPEATED` of the votes
    come once more, by the same person with sides swapped.
    """
    truths = {name: json.dumps(asdict(person.compares)) for name, person in people.items()}
    for prompt, replies in town.compared(split, prompts):
        rng = Random(f"votes {seed} {prompt.id}")
        for i, j in combinations(range(len(replies)), 2):
            name = f"{prompt.id}-{i}{j}"
            swapped = rng.random() < 0.5
            for labeler in rng.sample([*people], VOTES_PER_PAIR):
                asked = 2 if rng.random() < REPEATED else 1
                for again in range(asked):
                    swapped = not swapped
                    shown = (replies[j], replies[i]) if swapped else (replies[i], replies[j])
                    pair = compare(people[labeler].compares, rng, prompt, *shown)
                    meta = {
                        **pair.meta,
                        "labeler": labeler,
                        "order": f"{'chosen' if pair.chosen == shown[0] else 'rejected'}_first",
                        "pair": name,
                        "truth": truths[labeler],
                    }
                    record = f"{name}-{labeler}-{again}"
                    yield Pair(record, prompt.messages, pair.chosen, pair.rejected, meta=meta)


def ratings(
    town: Town,
    split: str,
    people: Mapping[str, Person] = CROWD,
    *,
    prompts: int = 650,
    seed: int = 0,
) -> Iterator[Conversation]:
    """Ratings by the same people of the same replies as in `votes`, at the same cost.

    Each reply is rated as often as it is read there, where it is in two pairs of three; `REPEATED`
    of the ratings too come once more. `meta` has "labeler", "rating" from 1 to 5 and "label", the
    rating in [0, 1].
    """
    asked: list[tuple[Prompt, Sequence[str]]] = [*town.compared(split, prompts)]
    for index, (prompt, replies) in enumerate(asked):
        rng = Random(f"ratings {seed} {prompt.id}")
        for i, reply in enumerate(replies):
            for labeler in rng.sample([*people], 2 * VOTES_PER_PAIR):
                for again in range(2 if rng.random() < REPEATED else 1):
                    rating = people[labeler].rate(rng, prompt, reply, index / len(asked))
                    meta = {
                        **prompt.meta,
                        "labeler": labeler,
                        "rating": str(rating),
                        "label": str((rating - 1) / 4),
                    }
                    turns = (*prompt.messages, Message("assistant", reply))
                    yield Conversation(f"{prompt.id}-{i}-{labeler}-{again}", turns, meta)


def rated(town: Town, split: str, people: Mapping[str, Person] = CROWD) -> Iterator[Pair]:
    """The `ratings` as pairs: of two replies to a prompt the one that a person rated higher.

    Whatever a person's scale, it is the same for both. Equal ratings make no pair. `meta` has
    "labeler".
    """
    by_person: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for each in ratings(town, split, people):
        own = by_person[each.messages[:-1], each.meta["labeler"]]
        own.setdefault(each.messages[-1].content, each.meta["rating"])
    for index, ((prompt, labeler), own) in enumerate(by_person.items()):
        for place, (one, other) in enumerate(combinations(own, 2)):
            if own[one] != own[other]:
                chosen, rejected = (one, other) if own[one] > own[other] else (other, one)
                name = f"{split}-{index}-{place}"
                yield Pair(name, prompt, chosen, rejected, meta={"labeler": labeler})


def ordered(town: Town, split: str, prompts: int | None = None) -> Iterator[Pair]:
    """The pairs of `town.pairs` with the one of the higher gold score chosen; ties are left out."""
    for pair in town.pairs(split, prompts):
        chosen, rejected = float(pair.meta["gold_chosen"]), float(pair.meta["gold_rejected"])
        if chosen > rejected:
            yield Pair(pair.id, pair.prompt, pair.chosen, pair.rejected, meta=pair.meta)
        elif rejected > chosen:
            meta = {
                "gold_chosen": pair.meta["gold_rejected"],
                "gold_rejected": pair.meta["gold_chosen"],
            }
            yield Pair(pair.id, pair.prompt, pair.rejected, pair.chosen, meta={**pair.meta, **meta})
