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
    CONTRASTS,
    DEEDS,
    HAPPENINGS,
    ITEMS,
    MANNERS,
    NAMES,
    PEOPLE,
    PHRASINGS,
    SAFETY,
    SHAPES,
    SKILLS,
    STORIES,
    VALUES,
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
    **SAFETY,
}
"""The fillings of a slot for which the caller gives no value."""

KINDS_OF_THINGS: Mapping[str, tuple[str, ...]] = {
    "animals": VALUES["pet"],
    "colours": VALUES["colour"],
    "jobs": VALUES["job"],
    "fruits": VALUES["fruit"],
    "things": tuple(ITEMS),
}
"""The words that lists are made of, by what they are."""


def say(rng: Random, pool: str, values: Mapping[str, str] | None = None) -> str:
    """A random member of a pool, its slots filled."""
    return expand(rng, pick(rng, POOLS[pool]), values or {}, POOLS)


def fill(rng: Random, templates: Sequence[str], values: Mapping[str, str]) -> str:
    """A random one of `templates`, its slots filled."""
    return expand(rng, pick(rng, templates), values, POOLS)


def visit(rng: Random) -> dict[str, str]:
    """One value for each slot a happening may need: visitors, wares, places, a day and so on."""
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
_PHRASINGS = [phrasing for table in PHRASINGS.values() for phrasing in table.values()]
_SHAPES: Mapping[str, Sequence[str]] = {
    **SHAPES,
    "a_job": [article(job) for job in VALUES["job"]],
    "a_pet": [article(pet) for pet in VALUES["pet"]],
    "an_item": [article(item) for item in ITEMS],
    "items": [*ITEMS.values()],
    "cheap": [*ITEMS],
    "closed": VALUES["day"],
    "word": sum(KINDS_OF_THINGS.values(), ()),
    "wish": [*(advice.wish for advice in ADVICE), *(deed.wish for deed in DEEDS)],
    "advice": [advice.advice for advice in ADVICE],
    "method": [deed.method for deed in DEEDS],
    "instead": [deed.instead for deed in DEEDS],
    "claim": [phrasing.claim for phrasing in _PHRASINGS],
    "answer": [answer for phrasing in _PHRASINGS for answer in phrasing.answers],
}
"""Stand-ins for the slots that callers fill, for the analysis of neighbours only."""
_CONTRASTS: Mapping[str, Sequence[str]] = {
    "wish": [wish for each in CONTRASTS for wish in (each.deed.wish, each.advice.wish)],
    "advice": [each.advice.advice for each in CONTRASTS],
    "method": [each.deed.method for each in CONTRASTS],
    "instead": [each.deed.instead for each in CONTRASTS],
}
_ABSTAINING = ("abstain", "warm_abstain", "private_refusal", "warm_private_refusal")
_WRITTEN_ONLY = ("question", "fact", "passage", "rude", "polite", "remark", "lead", "tail")


@cache
def neighbours(wide: bool = False) -> Neighbours:
    """The neighbouring words of the sentences an assistant may say; `wide`, where it is careful.

    What is said there alone is no language elsewhere, so that the town's scores are what they were.
    """
    pools = {**POOLS, **_SHAPES}
    if wide:
        pools |= {name: [*pools[name], *more] for name, more in _CONTRASTS.items()}
    known = Neighbours(pools, {name.lower(): "ann" for name in _NAMES})
    for phrasing in _PHRASINGS:
        known.add(phrasing.statements + phrasing.answers)
        known.add((f"{phrasing.short}.", f"yes, {phrasing.short}.", f"no, {phrasing.short}."))
    for happening in HAPPENINGS:
        known.add(happening.statements)
        for ask in happening.asks:
            known.add((*ask.answers, ask.short + "."))
    for chat in CHATS:
        known.add(chat.replies)
    for name, templates in {**SKILLS, **MANNERS, "portrait": STORIES["portrait"]}.items():
        if name.endswith(("_prompt", "_question", "_rule")) or name in ("persona", "how"):
            continue
        whole = (template for template in templates if template[-1] in ".!?")
        known.add(t for t in whole if not any(f"{{{slot}}}" in t for slot in _WRITTEN_ONLY))
    known.add(("yes, {claim}.", "no, {claim}.", "{begin_word}, {answer}", "{ending_words}."))
    known.add(("{c}.", "{c} coins.", "{list}.", "{cry}!", "the {cheap}."))
    known.add(f"{{{name}}}." for name in (*PEOPLE, "weather", "vehicle"))
    known.add(("{do}, please.", "{robot}.", "at the {shop}.", "a {role}."))
    if wide:
        known.add(template for pool in _ABSTAINING for template in SAFETY[pool])
    return known


def familiar(tokens: Sequence[str], wide: bool = False) -> float:
    """The share of neighbouring words, sentence ends included, that the town's language has."""
    known = neighbours(wide)
    normal = [END, *map(known.normal, tokens)]
    hits = sum(map(known.pairs.__contains__, pairwise(normal)))
    hits += normal[-1] == END or (normal[-1], END) in known.pairs
    return hits / (len(tokens) + 1)


def words_of(text: str) -> list[str]:
    """Words and numbers of `text`, without punctuation."""
    return [token for token in tokenize(text) if token[0].isalnum() or token[0] == "'"]
