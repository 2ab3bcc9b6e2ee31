"""The town's answers with defects at known rates, so that filters can be told right or wrong.

Without defects every record has another prompt and answer than all others, none of a held-out
prompt, and the town's own reference answer: whatever a filter takes out of these is a mistake.
"""

from __future__ import annotations

import dataclasses
import re
from random import Random

from rlhf_jax.data.records import Conversation, Message
from rlhf_jax.tasks.town.town import Town

DEFECTS = (
    "duplicate",
    "contaminated",
    "truncated",
    "repetition",
    "length",
    "score",
    "near duplicate",
)
LONGEST = 50  # words


def clean_records(count: int) -> list[Conversation]:
    """The first answers of the town that are as described above."""
    held_out = [_plain(prompt.messages[-1].content) for prompt in Town().prompts("heldout")]
    records, seen = [], set()
    for record in Town().solutions("train"):
        texts = tuple(" ".join(message.content.split()) for message in record.messages)
        asked = [f" {_plain(text)} " for text in texts]
        new = not any(f" {prompt} " in text for prompt in held_out for text in asked)
        if texts not in seen and len(texts[-1].split()) <= LONGEST and new:
            seen.add(texts)
            records.append(record)
        if len(records) == count:
            return records
    raise ValueError(f"the town has {len(records)} such answers, not {count}")


def with_defects(
    records: list[Conversation], each: int, seed: int = 0
) -> list[tuple[Conversation, str]]:
    """(record, its defect or "") of the records and `each` more of every defect, in random order.

    A record with a defect has one of its own, made from a record that is drawn for it alone or from
    a held-out prompt; ids are numbers in the order of the list. Copies come after what they copy.
    """
    random = Random(seed)
    spoilt = random.sample(records, each * (len(DEFECTS) - 1))
    held_out = list(Town().prompts("heldout", each))
    whole: list[tuple[float, Conversation, str]] = [(random.random(), r, "") for r in records]
    for defect in DEFECTS:
        for number in range(each):
            if defect == "contaminated":
                prompt = held_out[number]
                answer = Message("assistant", prompt.meta["reference"])
                made = Conversation("", (*prompt.messages, answer), prompt.meta)
            else:
                made = _spoil(spoilt.pop(), defect, number, random, records)
            later = 1 if "duplicate" in defect else 0
            whole.append((later + random.random(), made, defect))
    whole.sort(key=lambda entry: entry[0])
    return [
        (dataclasses.replace(record, id=str(number)), defect)
        for number, (_, record, defect) in enumerate(whole)
    ]


def _spoil(
    record: Conversation, defect: str, number: int, random: Random, others: list[Conversation]
) -> Conversation:
    *asked, last = record.messages
    text, meta = last.content, dict(record.meta)
    match defect:
        case "truncated":
            # Every other one as an engine hands it over, cut anywhere; the rest cut in a sentence.
            cuts = [
                i for i in range(1, len(text)) if number % 2 or text[:i].rstrip()[-1] not in ".!?"
            ]
            text = text[: random.choice(cuts)].rstrip()
            meta |= {"finish_reason": "length"} if number % 2 else {}
        case "repetition":
            words = text.split()
            text = " ".join([*words, *words[-random.randint(1, 4) :] * random.randint(6, 9)])
        case "length":
            more = [other.messages[-1].content for other in random.sample(others, 20)]
            text = " ".join([text, *more])
        case "score":
            wrong = random.choice(others)
            while wrong.meta["reference"] == text or wrong.meta["family"] == meta["family"]:
                wrong = random.choice(others)
            text = wrong.messages[-1].content
        case "near duplicate":
            words = asked[-1].content.upper().split()
            words.insert(random.randint(0, len(words)), random.choice(("WELL", "REALLY", "SO")))
            asked[-1] = Message(asked[-1].role, " ".join(words))
    return Conversation("", (*asked, Message("assistant", text)), meta)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
