"""Votes from a file or a data set: who preferred which reply, and what of it is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.jsonl import read_lines, take_slice
from rlhf_jax.data.records import Pair
from rlhf_jax.data.shapes import BadLine, Fields, is_tie, make_record
from rlhf_jax.errors import UserError
from rlhf_jax.labelers.likelihood import Votes
from rlhf_jax.tasks.builders import load_records, verifier_of
from rlhf_jax.tasks.sources import parse_source

ORDERS = {"chosen_first": 1.0, "rejected_first": -1.0}


class Vote(NamedTuple):
    """A pair whose `meta` says who voted; in a tie neither side was preferred."""

    record: Pair
    tie: bool = False


def read_votes(source: str) -> list[Vote]:
    """The votes of a JSON lines file or of a data set of pairs, as "votes.jsonl" or "town/votes".

    Either may be sliced, as in "votes.jsonl[:100]"; a data set is read in its split "train" if it
    states no other.

    A line is a pair as `data/shapes.py` has it, with "labeler", and optionally "order"
    ("chosen_first" or "rejected_first": what was shown first), "tie" and "pair", a name that is the
    same for all votes about these two replies.

    Raises:
        UserError: a line is no such vote, or there is none.
    """
    parsed = parse_source(source)
    if parsed.is_file:
        votes: list[Any] = read_lines(parsed.name, _vote_of)
        return take_slice(votes, parsed.part, parsed.name) if parsed.part else votes
    records = load_records(parsed.name, (parsed.split or "train") + parsed.part, kind="pair")
    votes = [Vote(record) for record in records if isinstance(record, Pair)]
    if len(votes) < max(1, len(records)):
        raise UserError(f"{source} has {len(records):,} records, of which {len(votes):,} are pairs")
    return votes


def _vote_of(fields: Fields, default_id: str) -> Any:
    record, _ = make_record(fields, "pair", default_id)
    if not record.meta.get("labeler"):
        raise BadLine("no labeler", "a vote has a field 'labeler' that says whose it is")
    return Vote(record, is_tie(fields))  # type: ignore[arg-type]


def comparing(votes: Sequence[Vote], what: str) -> list[Vote]:
    """The votes that compare two replies; those on one text twice are left out, which is said.

    Whoever votes on such a pair prefers the same text, and would seem to agree with everybody.

    Raises:
        UserError: there is none.
    """
    left = [vote for vote in votes if vote.record.chosen != vote.record.rejected]
    if not left:
        raise UserError(f"{what}: each of {len(votes):,} votes is on the same reply twice")
    if len(left) < len(votes):
        count = len(votes) - len(left)
        print(f"{what}: {count:,} votes on the same reply twice are left out", flush=True)
    return left


def arrays_of(votes: Sequence[Vote], *, judged: bool) -> Votes:
    """The votes as arrays, with the feature "length" in words.

    Args:
        votes: one or more, each on two replies that differ.
        judged: whether a task's verifier, if it knows all prompts, says how good replies are, and
          how courteous, which is a further feature then.

    Raises:
        UserError: a vote has no labeler, an order that is none, or the name of another pair.
    """
    labelers = {name: i for i, name in enumerate(sorted({_labeler(vote) for vote in votes}))}
    pairs: dict[str, tuple[int, tuple[str, ...], Pair]] = {}
    replies: dict[tuple[str, str], int] = {}
    whose, about, wins, first = [], [], [], []
    for vote in votes:
        record = vote.record
        prompt = repr(record.prompt)
        # Which one is a must mean nothing, not even over pairs of the same two replies.
        sides = tuple(sorted((record.chosen, record.rejected), key=lambda x: _digest(prompt + x)))
        name = record.meta.get("pair") or _digest(repr((prompt, sides)))
        index, known, first_of = pairs.setdefault(name, (len(pairs), sides, record))
        if known != sides or first_of.prompt != record.prompt:
            raise UserError(f"vote {record.id!r}: pair {name!r} is of other replies elsewhere")
        chosen_is_a = record.chosen == sides[0]
        order = record.meta.get("order", "")
        if order and order not in ORDERS:
            raise UserError(f"vote {record.id!r}: order is one of {', '.join(ORDERS)}: {order!r}")
        whose.append(labelers[_labeler(vote)])
        about.append(index)
        wins.append(0.5 if vote.tie else float(chosen_is_a))
        first.append(ORDERS.get(order, 0.0) * (1 if chosen_is_a else -1))
    prompts = [repr(record.prompt) for _, _, record in pairs.values()]
    sides_of = [sides for _, sides, _ in pairs.values()]
    ids = [
        [replies.setdefault((prompt, side), len(replies)) for side in sides]
        for prompt, sides in zip(prompts, sides_of, strict=True)
    ]
    words = [[float(len(side.split())) for side in sides] for sides in sides_of]
    features, quality = {"length": words}, None
    task = verifier_of([vote.record for vote in votes]) if judged else None
    if task and task.verify:
        verdicts = [[task.verify(r, side) for side in sides] for _, sides, r in pairs.values()]
        quality = _difference([[verdict.total for verdict in both] for both in verdicts])
        if "polite" in verdicts[0][0].components:
            features["courtesy"] = [[v.components["polite"] for v in both] for both in verdicts]
    return Votes(
        labelers=tuple(labelers), labeler=np.array(whose), pair=np.array(about),
        wins=np.array(wins), first=np.array(first), names=tuple(features),
        features=np.stack([_difference(each) for each in features.values()], axis=1),
        replies=np.array(ids), quality=quality,
    )  # fmt: skip


def truths_of(votes: Sequence[Vote]) -> Mapping[str, Mapping[str, float]]:
    """Simulated labelers' true effects by name; nothing of others.

    Raises:
        UserError: a vote's "truth" is no object of numbers.
    """
    stated = {_labeler(v): v.record.meta["truth"] for v in votes if "truth" in v.record.meta}
    try:
        return {
            name: {effect: float(x) for effect, x in json.loads(text).items()}
            for name, text in stated.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'a labeler\'s "truth" must be an object of numbers: {error}') from None


def _labeler(vote: Vote) -> str:
    name = vote.record.meta.get("labeler", "")
    if not name:
        raise UserError(
            f"record {vote.record.id!r} has no labeler: it is no vote of a known person"
        )
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(sides: Sequence[Sequence[float]]) -> np.ndarray:
    """[P] the first side less the second."""
    first, second = np.asarray(sides, np.float64).T
    return first - second
