"""An exercise: a conversation that awaits a reply, and what good and bad replies to it are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache

from rlhf_jax.data.records import Message


@dataclass(frozen=True)
class Expectation:
    """How the gold scorer judges a reply. Phrases are in lower case.

    `required`: of each group one phrase must be asserted. `allowed`: the values of the town
    (`VALUES`, numbers) that may be mentioned besides; any other makes the reply wrong, unless
    `open`. `ordered`: the required phrases must be all the values, in this order. `concludes`: the
    first required phrase is a number and must be the last number said. `refuse`: the reply must be
    a refusal, and unless `open` mentions no value but the allowed ones. `abstain`: it must say that
    it does not know, and mention no other value. `question`: the reply may be a question.
    `courtesy`: courtesy is worth something here. `constraint`: as in "one word", "capitals",
    "begin: well", "end: good luck", "exclaim". A reply of fewer than `min_words` is no sentence; of
    more than `max_words`, not brief.
    """

    required: tuple[tuple[str, ...], ...]
    allowed: tuple[str, ...] = ()
    open: bool = False
    ordered: bool = False
    concludes: bool = False
    refuse: bool = False
    question: bool = False
    courtesy: bool = True
    constraint: str = ""
    min_words: int = 3
    max_words: int = 14
    abstain: bool = False

    def dumps(self) -> str:
        """Returns a JSON string, to travel in a record's `meta`; `loads` is the inverse."""
        fields = {name: x for name, x in vars(self).items() if name != "abstain" or x}
        return json.dumps(fields, sort_keys=True)


@lru_cache(maxsize=65536)
def loads(text: str) -> Expectation:
    """The expectation written by `Expectation.dumps`."""
    fields = json.loads(text)
    fields["required"] = tuple(tuple(group) for group in fields["required"])
    fields["allowed"] = tuple(fields["allowed"])
    return Expectation(**fields)


@dataclass(frozen=True)
class Exercise:
    """One exercise and the material for replies of every style; sentences may start in lower case.

    `plain` is a right answer, `warm` a courteous one where an opening or closing phrase would not
    do, `short` a right but curt one, `wrong` a well-formed wrong one, `broken` one that is right
    but breaks the asked format, `extra` a further true sentence. `key` names the content: exercises
    of one key are never divided between training and held-out. `heldout` says what is new in a
    held-out exercise: the "fact", the "phrasing", "both", or the "content".
    """

    messages: tuple[Message, ...]
    plain: str
    wrong: str
    expectation: Expectation
    key: str
    short: str = ""
    warm: str = ""
    broken: str = ""
    extra: str = ""
    heldout: str = ""
    meta: dict[str, str] = field(default_factory=dict)


def user(text: str) -> tuple[Message, ...]:
    """A conversation of one user turn."""
    return (Message("user", text),)


def lower(*values: str) -> tuple[str, ...]:
    """`values` in lower case."""
    return tuple(value.lower() for value in values)
