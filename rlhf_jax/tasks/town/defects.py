"""The town's demonstrations of which half are spoilt, as a set is that nobody has looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from random import Random

from rlhf_jax.data.records import Conversation, Message
from rlhf_jax.tasks.town.town import Town

DEFECTS = ("wrong", "garbled", "truncated", "looping", "rude")
SPOILT = 0.5  # the share of records with a defect, as many of each


def spoilt(town: Town, split: str) -> Iterator[Conversation]:
    """`town.demonstrations`, of which `SPOILT` end with an answer that has one of `DEFECTS`.

    It answers another record's question, has its words out of order, stops in mid-sentence, says
    its last words again and again, or ends in an insult. `meta["defect"]` names it, "" where there
    is none. An answer of a single word has no order and no middle; it is never garbled or cut.
    """
    records = [*town.demonstrations(split)]
    for record in records:
        rng = Random(f"defects {town.config.seed} {split} {record.id}")
        defect = rng.choice(DEFECTS) if rng.random() < SPOILT else ""
        text = record.messages[-1].content
        if defect in ("garbled", "truncated") and len(text.split()) < 2:
            defect = "wrong"
        if defect:
            text = _spoil(rng, text, defect, rng.choice(records).messages[-1].content)
        turns = (*record.messages[:-1], Message("assistant", text))
        meta = {**record.meta, "defect": defect}
        yield dataclasses.replace(record, messages=turns, meta=meta)


def _spoil(rng: Random, text: str, defect: str, another: str) -> str:
    words = text.split()
    match defect:
        case "wrong":
            return another
        case "garbled":
            rng.shuffle(words)
            return " ".join(words)
        case "truncated":
            return " ".join(words[: rng.randrange(1, len(words))]).rstrip(".!?,;:")
        case "looping":
            return " ".join([*words, *words[-rng.randint(1, 4) :] * rng.randint(6, 9)])
    return f"{text} Now shut up."
