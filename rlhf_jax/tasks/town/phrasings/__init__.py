"""The town's words, read from the TOML files beside this module, which explain themselves.

A template is plain text with slots in braces, see `grammar`. Lists of the files become tuples.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Phrasing:
    """The ways to state, ask and answer one attribute of a person, a shop or a ware.

    `questions` are asked in training, `heldout_questions` never; `follow` asks about somebody
    already spoken of. `claim` is a clause that states the fact and may be made false by another
    value; `short` is the bare answer.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    heldout_questions: tuple[str, ...]
    answers: tuple[str, ...]
    follow: tuple[str, ...]
    claim: str
    short: str


@dataclass(frozen=True)
class Ask:
    """Questions and answers about one slot of a happening."""

    slot: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    short: str


@dataclass(frozen=True)
class Happening:
    """Something a visitor did, the slots it fills, and what may be asked about it."""

    slots: tuple[str, ...]
    statements: tuple[str, ...]
    asks: tuple[Ask, ...]


class Advice(NamedTuple):
    """A harmless wish that sounds bad, what to do, and the words of which good advice holds one."""

    wish: str
    advice: str
    keywords: tuple[str, ...]


class Deed(NamedTuple):
    """A harmful wish, how somebody without scruples would go about it, and what to do instead."""

    wish: str
    method: str
    instead: str
    keyword: str


class Contrast(NamedTuple):
    """A deed and a harmless wish with the same verb; `heldout` ones are asked in no training."""

    deed: Deed
    advice: Advice
    heldout: bool


class Chat(NamedTuple):
    """A remark, a fitting reply, and what the reply must hold (of each group, one phrase)."""

    remarks: tuple[str, ...]
    replies: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]


def _read(name: str) -> dict[str, Any]:
    text = Path(__file__).with_name(name).read_text("utf-8")
    return {key: _with_tuples(value) for key, value in tomllib.loads(text).items()}


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


WORDS = frozenset(
    word
    for file in Path(__file__).parent.glob("*.toml")
    for word in re.findall(r"[a-z]+", file.read_text("utf-8").lower())
)
"""Every word in these files, their comments too, in lower case."""

_people, _manners, _skills = _read("people.toml"), _read("manners.toml"), _read("skills.toml")
_stories, _values = _read("stories.toml"), _read("values.toml")
TOOLS: Mapping[str, Any] = _read("tools.toml")
TURNS: Mapping[str, Any] = _read("turns.toml")
MIXTURES: Mapping[str, Mapping[str, float]] = _read("mixtures.toml")

PHRASINGS: Mapping[str, Mapping[str, Phrasing]] = {
    kind: {attribute: Phrasing(**each) for attribute, each in _people[kind].items()}
    for kind in ("people", "shops", "wares")
}
"""How the town speaks of each attribute of its people, shops and wares."""
PEOPLE, SHOPS, WARES = PHRASINGS.values()
LEADS, CLAIM_QUESTIONS = _people["leads"], _people["claim_questions"]
HELDOUT_CLAIM_QUESTIONS = _people["heldout_claim_questions"]

MANNERS: Mapping[str, tuple[str, ...]] = _manners["pools"]
ADVICE = tuple(Advice(**each) for each in _manners["advice"])
DEEDS = tuple(Deed(**each) for each in _manners["deeds"])
CHATS = tuple(Chat(**each) for each in _manners["chats"])
DANGER, RUDE_WORDS = frozenset(_manners["danger"]), frozenset(_manners["rude_words"])
RUDE_PHRASES, COURTESY = _manners["rude_phrases"], _manners["courtesy"]
REFUSALS, DOUBT = _manners["refusals"], frozenset(_manners["doubt"])

_safety = _read("safety.toml")
SAFETY: Mapping[str, tuple[str, ...]] = _safety["pools"]
SAFETY_MIXTURES: Mapping[str, Mapping[str, float]] = _safety["mixtures"]
CONTRASTS = tuple(
    Contrast(Deed(**each["deed"]), Advice(**each["advice"]), each.get("heldout", False))
    for each in _safety["contrasts"]
)
HELDOUT_DEEDS, HELDOUT_ADVICE = _safety["heldout_deeds"], _safety["heldout_advice"]
WRAPPERS, ABSTENTIONS = _safety["wrappers"], _safety["abstentions"]
UNKNOWN_THINGS = _safety["unknown_things"]
HELDOUT_UNKNOWN_THINGS = _safety["heldout_unknown_things"]
STRANGERS = tuple(_safety[f"stranger_{part}"] for part in ("starts", "middles", "ends"))
PRIVATE_ATTRIBUTES = _safety["private_attributes"]

SKILLS: Mapping[str, tuple[str, ...]] = _skills["pools"]
HAPPENINGS = tuple(
    Happening(each["slots"], each["statements"], tuple(Ask(**ask) for ask in each["asks"]))
    for each in _skills["happenings"]
)
STORIES: Mapping[str, tuple[str, ...]] = _stories["pools"]

NAMES: Mapping[str, tuple[str, ...]] = _values["names"]
ITEMS: Mapping[str, str] = _values["items"]
NUMBER_WORDS: Mapping[str, str] = _values["number_words"]
SHAPES: Mapping[str, tuple[str, ...]] = _values["shapes"]
VALUES: Mapping[str, tuple[str, ...]] = _values["values"] | {
    "child": NAMES["daughters"] + NAMES["sons"],
    "person": NAMES["women"] + NAMES["men"],
    "visitor": NAMES["visitors_f"] + NAMES["visitors_m"],
    "item": (*ITEMS, *ITEMS.values()),
}
"""Every value by its pool; two-word values count as one."""
