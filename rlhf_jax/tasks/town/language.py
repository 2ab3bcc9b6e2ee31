"""The town's language: every pool of templates and values, and `say`, which draws from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from random import Random

from rlhf_jax.tasks.town.grammar import END, Neighbours, expand, pick, tokenize
from rlhf_jax.tasks.town.phrasings import (
    ADVICE,
    CHATS,
    DEEDS,
    HAPPENINGS,
    ITEMS,
    MANNERS,
    NAMES,
    PEOPLE,
    SHOPS,
    SKILLS,
    STORIES,
    VALUES,
    WARES,
)
from rlhf_jax.tasks.town.world import article

NUMBERS = tuple(str(number) for number in range(2, 10))
POOLS: Mapping[str, Sequence[str]] = {
    **{name: values for name, values in VALUES.items() if name not in ("item", "answer", "pet")},
    "item": tuple(ITEMS),
    "pet": VALUES["pet"],
    "number": NUMBERS,
    **SKILLS,
    **MANNERS,
    **STORIES,
}
"""What a slot may hold when the caller gives no value for it."""

KINDS_OF_THINGS: Mapping[str, tuple[str, ...]] = {
    "animals": VALUES["pet"],
    "colours": VALUES["colour"],
    "jobs": VALUES["job"],
    "fruits": VALUES["fruit"],
    "things": tuple(ITEMS),
}
"""What lists are made of."""


def say(rng: Random, pool: str, values: Mapping[str, str] | None = None) -> str:
    """A random member of a pool, its slots filled."""
    return expand(rng, pick(rng, POOLS[pool]), values or {}, POOLS)


def fill(rng: Random, templates: Sequence[str], values: Mapping[str, str]) -> str:
    """A random one of `templates`, its slots filled."""
    return expand(rng, pick(rng, templates), values, POOLS)


def visit(rng: Random) -> dict[str, str]:
    """One value for each slot a happening may need: two visitors, wares, places, a day and so
    on."""
    visitor, visitor2 = rng.sample(VALUES["visitor"], 2)
    item, item2 = rng.sample(tuple(ITEMS), 2)
    pet = pick(rng, VALUES["pet"])
    drawn = ("fruit", "place", "vehicle", "day", "weather", "shop", "colour", "food", "hobby")
    return {
        **{name: pick(rng, VALUES[name]) for name in drawn},
        "visitor": visitor,
        "visitor2": visitor2,
        "who": visitor,
        "she": "she" if visitor in NAMES["visitors_f"] else "he",
        "her2": "her" if visitor in NAMES["visitors_f"] else "him",
        "item": item,
        "an_item": article(item),
        "items": ITEMS[item],
        "item2": item2,
        "an_item2": article(item2),
        "pet": pet,
        "a_pet": article(pet),
        "number": pick(rng, NUMBERS),
    }


_NAMES = VALUES["person"] + VALUES["visitor"] + VALUES["child"] + VALUES["robot"]
_PHRASINGS = (*PEOPLE.values(), *SHOPS.values(), *WARES.values())
_SHAPES: Mapping[str, Sequence[str]] = {
    "name": ("Ann",),
    "person": ("Ann",),
    "visitor": ("Ann",),
    "child": ("Ann",),
    "robot": ("Ann",),
    "friend": ("Ann",),
    "who": ("Ann", "she", "he"),
    "whose": ("Ann's", "her", "his"),
    "she": ("she", "he"),
    "her": ("her", "his"),
    "him": ("her", "him"),
    "her2": ("her", "him"),
    "woman": ("woman", "man"),
    "child_kind": ("daughter", "son"),
    "a_job": tuple(article(job) for job in VALUES["job"]),
    "a_pet": tuple(article(pet) for pet in VALUES["pet"]),
    "an_item": tuple(article(item) for item in ITEMS),
    "items": tuple(ITEMS.values()),
    "cheap": tuple(ITEMS),
    "opens": ("1",),
    "closes": ("1",),
    "closed": VALUES["day"],
    "age": ("1",),
    "price": ("1",),
    "number": ("1",),
    "a": ("1",),
    "b": ("1",),
    "word": sum(KINDS_OF_THINGS.values(), ()),
    "c": ("1", "{word}"),
    "list": ("1, 1, 1", "{word}, {word}, {word}"),
    "wish": (*(each.wish for each in ADVICE), *(each.wish for each in DEEDS)),
    "advice": tuple(advice.advice for advice in ADVICE),
    "method": tuple(deed.method for deed in DEEDS),
    "instead": tuple(deed.instead for deed in DEEDS),
    "claim": tuple(phrasing.claim for phrasing in _PHRASINGS),
    "answer": tuple(answer for phrasing in _PHRASINGS for answer in phrasing.answers),
}
"""Stand-ins for the slots that callers fill, for the analysis of neighbours only."""
_WRITTEN_ONLY = ("question", "fact", "passage", "rude", "polite", "remark", "lead", "tail")


@cache
def neighbours() -> Neighbours:
    """The neighbouring words of the sentences an assistant may say."""
    pools = {**POOLS, **_SHAPES}
    found = Neighbours(pools, {name.lower(): "ann" for name in _NAMES})
    for phrasing in _PHRASINGS:
        found.add(phrasing.statements + phrasing.answers)
        found.add((f"{phrasing.short}.", f"yes, {phrasing.short}.", f"no, {phrasing.short}."))
    for happening in HAPPENINGS:
        found.add(happening.statements)
        for ask in happening.asks:
            found.add((*ask.answers, ask.short + "."))
    for chat in CHATS:
        found.add(chat.replies)
    for name, templates in {**SKILLS, **MANNERS, "portrait": STORIES["portrait"]}.items():
        if name.endswith(("_prompt", "_question", "_rule")) or name in ("persona", "how"):
            continue
        whole = (template for template in templates if template[-1] in ".!?")
        found.add(t for t in whole if not any(f"{{{slot}}}" in t for slot in _WRITTEN_ONLY))
    found.add(("yes, {claim}.", "no, {claim}.", "{begin_word}, {answer}", "{ending_words}."))
    found.add(("{c}.", "{c} coins.", "{list}.", "{cry}!", "the {cheap}."))
    found.add(f"{{{name}}}." for name in (*PEOPLE, "weather", "vehicle"))
    found.add(("{do}, please.", "{robot}.", "at the {shop}.", "a {role}."))
    return found


def familiar(tokens: Sequence[str]) -> float:
    """The share of neighbouring words, sentence ends included, that the town's language has."""
    known = neighbours()
    normal = [END, *map(known.normal, tokens)]
    hits = sum(map(known.pairs.__contains__, pairwise(normal)))
    hits += normal[-1] == END or (normal[-1], END) in known.pairs
    return hits / (len(tokens) + 1)


def words_of(text: str) -> list[str]:
    """Words and numbers of `text`, without punctuation."""
    return [token for token in tokenize(text) if token[0].isalnum() or token[0] == "'"]
