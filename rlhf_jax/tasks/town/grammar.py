"""A small grammar: sentences from templates, and which words the town puts side by side.

A template is plain text with slots in braces, `"{name} lives on {street}."`. A slot is filled from
the values at hand, or else by a random template of the pool of that name. Because every sentence of
the town comes from these templates, the pairs of neighbouring words that can occur are known
exactly; `known_pairs` lists them, and the gold scorer calls a reply fluent by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from random import Random
from typing import TypeVar

T = TypeVar("T")

_SLOT = re.compile(r"\{(\w+)\}")
_START = re.compile(r'(^|[.!?]"?\s+"?|\n"?|: ")([a-z])')
_TOKEN = re.compile(r"[a-z]+|[0-9]+|'[a-z]+|[.,!?;:\"-]|\S")
END = "."


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options, all equally likely; the same on every Python version."""
    return options[int(rng.random() * len(options))]


@cache
def _parts(template: str) -> tuple[str, ...]:
    """Literal text and slot names in turn; literals at even places."""
    return tuple(_SLOT.split(template))


def expand(
    rng: Random,
    template: str,
    values: Mapping[str, str],
    pools: Mapping[str, Sequence[str]],
) -> str:
    """The template with each slot filled from `values`, else from a random member of its pool."""
    parts = _parts(template)
    if len(parts) == 1:
        return template
    filled = list(parts)
    for place in range(1, len(parts), 2):
        slot = parts[place]
        if slot in values:
            filled[place] = values[slot]
        else:
            filled[place] = expand(rng, pick(rng, pools[slot]), values, pools)
    return "".join(filled)


def finish(text: str) -> str:
    """`text` with a capital letter at the start of every sentence."""
    return _START.sub(lambda match: match[1] + match[2].upper(), text)


def tokenize(text: str) -> list[str]:
    """Words, numbers, clitics (`'s`) and punctuation marks of `text`, in lower case."""
    return _TOKEN.findall(text.lower())


class Neighbours:
    """Which tokens may stand side by side, from templates and pools.

    `alias` maps tokens that behave alike (names, say) to one token; all numbers count as one.
    Sentence ends are one token, and any sentence may follow any other.
    """

    def __init__(self, pools: Mapping[str, Sequence[str]], alias: Mapping[str, str]) -> None:
        self.pools = pools
        self.alias = {**alias, "!": END, "?": END}
        self.pairs: set[tuple[str, str]] = set()
        self._edges: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._seen: set[str] = set()

    def normal(self, token: str) -> str:
        """`token` as it stands in the pairs."""
        return "#" if token.isdigit() else self.alias.get(token, token)

    def add(self, templates: Iterable[str]) -> None:
        """Adds the pairs of whole sentences."""
        for template in templates:
            first, last = self._template(template)
            self.pairs.update((END, token) for token in first)
            self.pairs.update((token, END) for token in last)

    def _slot(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        name = name if name in self.pools else name.rstrip("0123456789")
        if name not in self._edges:
            edges = [self._template(template) for template in self.pools[name]]
            self._edges[name] = (
                frozenset().union(*(first for first, _ in edges)),
                frozenset().union(*(last for _, last in edges)),
            )
        return self._edges[name]

    def _template(self, template: str) -> tuple[frozenset[str], frozenset[str]]:
        """First and last tokens of a template; its inner pairs are added on the way."""
        parts = _parts(template)
        units: list[tuple[frozenset[str], frozenset[str]]] = []
        for place, part in enumerate(parts):
            if place % 2:
                units.append(self._slot(part))
            else:
                tokens = (frozenset({self.normal(token)}) for token in tokenize(part))
                units += [(token, token) for token in tokens]
        if template not in self._seen:
            self._seen.add(template)
            for (_, left), (right, _) in pairwise(units):
                self.pairs.update((a, b) for a in left for b in right)
        return (units[0][0], units[-1][1]) if units else (frozenset(), frozenset())
