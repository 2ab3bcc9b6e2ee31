"""Filters that look at texts alone: each says which items go, by their index, and why."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.records import Conversation, Pair, Prompt, Record, Text
from rlhf_jax.errors import UserError
from rlhf_jax.filter.records import Item, read_items, trained_text, turns_of
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.sources import split_sources

Gone = dict[int, str]
Find = Callable[[Sequence[Item]], Gone]

CHARACTERS = 5  # of the n-grams that near duplicates share
WORDS = 8  # of the n-grams that an evaluation set shares, as Tülu 3 counts them
OVERLAP = 0.5  # of a prompt's words that makes it one, as Tülu 3 takes it
LOOP = 4  # words of the n-grams that repetition counts
PERMUTATIONS = 128  # of a MinHash
MISSED = 0.01  # of the pairs that are just as similar as --near says
_PIECE = 2**16  # n-grams that are permuted together
_END = r"(-?(?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?|\d?\d(?:\.\d+)?%|100%|)"
_BAND = re.compile(rf"{_END}\.\.{_END}")
# Unicode's letters, digits, dashes, and what opens a bracket or a quotation.
_GOES_ON = ("Ll", "Lu", "Lt", "Lm", "Lo", "Nd", "Pd", "Ps", "Pi")
_ANSWER = re.compile(r"(?:^|[=#:\n])[ \t]*[-+$€£]?\d[\d.,/]*$")


def duplicates(items: Sequence[Item]) -> Gone:
    """Items whose turns and label are those of an earlier one, but for white space."""
    first: dict[Any, Item] = {}
    gone = {}
    for index, item in enumerate(items):
        record = item.record
        messages = () if isinstance(record, Text | Pair) else record.messages
        extra = record.prompt if isinstance(record, Pair) else messages
        turns = tuple(" ".join(turn.split()) for turn in turns_of(record))
        key = (turns, tuple((m.role, m.more) for m in extra), record.meta.get("label"))
        other = first.setdefault(key, item)
        if other is not item:
            gone[index] = f"a copy of {other.place}"
    return gone


def near_duplicates(items: Sequence[Item], threshold: float) -> Gone:
    """Items that share most n-grams of characters with an earlier one that stays.

    Candidates come from MinHash signatures in an LSH index (Broder 1997,
    https://doi.org/10.1109/SEQUEN.1997.666900); what goes has a Jaccard similarity of at least
    `threshold`, which is counted, not estimated.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
    blank = MinHash(PERMUTATIONS, hashfunc=int)
    kept: dict[int, np.ndarray] = {}
    gone = {}
    for number, item in enumerate(items):
        stop_point()
        grams, sketch = _character_grams(item), blank.copy()
        for start in range(0, len(grams), _PIECE):
            sketch.update_batch(grams[start : start + _PIECE])
        alike = [(_jaccard(grams, kept[other]), -other) for other in index.query(sketch)]
        most, other = max(alike, default=(0.0, 0))
        if most >= threshold:
            gone[number] = f"{most:.2f} of the n-grams of {items[-other].place}"
        else:
            kept[number] = grams
            index.insert(number, sketch)
    return gone


def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows: as few candidates as a missed share of `MISSED` allows.

    Texts of similarity s are candidates with a probability of 1 − (1 − sʳ)ᵇ.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


def _character_grams(item: Item) -> np.ndarray:
    """The sorted hashes of an item's n-grams of characters, [n] u32; one of a shorter text."""
    text = " ".join(" ".join(turns_of(item.record)).casefold().split())
    count = max(1, len(text) - CHARACTERS + 1)
    hashes = [zlib.crc32(text[i : i + CHARACTERS].encode()) for i in range(count)]
    return np.unique(np.array(hashes, np.uint32))


def _jaccard(ours: np.ndarray, theirs: np.ndarray) -> float:
    both = len(np.intersect1d(ours, theirs, assume_unique=True))
    return both / (len(ours) + len(theirs) - both)


class EvaluationSet:
    """The n-grams of words of what models are evaluated on: whole prompts, or texts.

    Letters' case, punctuation and where turns end don't count, nor does what the system says, which
    whole data sets share. A prompt of fewer than `WORDS` words counts only where it is a whole
    turn, since it may stand in others by chance.

    Args:
        sources: files and data sets, parted by commas; read as prompts where they are that.
    """

    def __init__(self, sources: str) -> None:
        self._items = _read_evaluation(sources)
        self._sizes: list[int] = []  # words of each item
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, item in enumerate(self._items):
            words = _words(" ".join(turns_of(_without_system(item.record))))
            self._sizes.append(len(words))
            for at, gram in enumerate(_grams(words)):
                self._places[gram].append((number, at))

    def contaminated(self, items: Sequence[Item], overlap: float) -> Gone:
        """Items that hold at least a share `overlap` of the words of one evaluation record.

        A word counts if it is in an n-gram of both (Tülu 3, https://arxiv.org/abs/2411.15124).
        """
        gone = {}
        for index, item in enumerate(items):
            stop_point()
            turns = [_words(turn) for turn in turns_of(item.record)]
            short = {tuple(turn) for turn in turns if 0 < len(turn) < WORDS}
            covered: dict[int, set[int]] = defaultdict(set)
            for gram in short.union(_grams([word for turn in turns for word in turn])):
                for number, at in self._places.get(gram, ()):
                    covered[number].update(range(at, at + len(gram)))
            shares = [(len(words) / self._sizes[n], -n) for n, words in covered.items()]
            most, other = max(shares, default=(0.0, 0))
            if most >= overlap:
                gone[index] = f"{most:.0%} of the words of {self._items[-other].place}"
        return gone


def _read_evaluation(sources: str) -> list[Item]:
    items: list[Item] = []
    for source in split_sources(sources):
        try:
            items += read_items(source, "prompt")[0]
        except UserError as error:
            try:
                items += read_items(source, "text")[0]
            except UserError:
                raise error from None
    return items


def _without_system(record: Record) -> Record:
    if not isinstance(record, Prompt):
        return record
    said = tuple(message for message in record.messages if message.role != "system")
    return dataclasses.replace(record, messages=said)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _grams(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The n-grams of a text's words in their order; of a shorter text the one that it is."""
    count = max(1, len(words) - WORDS + 1) if words else 0
    return [tuple(words[i : i + WORDS]) for i in range(count)]


def truncated(items: Sequence[Item]) -> Gone:
    """Items whose trained text stops in mid-sentence; a reply that calls a tool does not.

    That is one whose meta["finish_reason"] is "length", as engines write it, or that ends in a
    letter, a digit, a comma, a dash or what opens a bracket, or leaves a fence of code open. A
    number that stands alone, or after "=", "#", ":" or a line's end, is an answer and an end.
    """
    gone = {}
    for index, item in enumerate(items):
        record, text = item.record, trained_text(item.record).rstrip()
        if isinstance(record, Conversation) and record.messages[-1].more:
            continue
        if record.meta.get("finish_reason") == "length":
            gone[index] = "its finish_reason is length"
        elif not text:
            gone[index] = "it is empty"
        elif text[-1] in ",;:" or (
            unicodedata.category(text[-1]) in _GOES_ON and not _ANSWER.search(text)
        ):
            gone[index] = f"it ends in {text[-12:]!r}"
        elif text.count("```") % 2:
            gone[index] = "it leaves a fence of code open"
    return gone


def repetitive(items: Sequence[Item], most: float) -> Gone:
    """Items in whose trained text more than a share `most` of the n-grams of words came before.

    That is 1 − distinct / all n-grams, seq-rep-4 of https://arxiv.org/abs/1908.04319.
    """
    gone = {}
    for index, item in enumerate(items):
        words = _words(trained_text(item.record))
        grams = [tuple(words[i : i + LOOP]) for i in range(len(words) - LOOP + 1)]
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        if share > most:
            gone[index] = f"{share:.0%} of its n-grams came before"
    return gone


class Band(NamedTuple):
    """What numbers may be, ends included: each end a number, a quantile as "5%", or "" for none."""

    low: str
    high: str

    @classmethod
    def parse(cls, name: str, text: str) -> Band:
        """The band that an option states, "3..40", "..40", "5%..95%"; UserError if it is none."""
        found = _BAND.fullmatch(text)
        if found is None or not any(found.groups()):
            raise UserError(f"--{name}={text}: write LOW..HIGH, as in 3..40, ..40 or 5%..95%")
        low, high = found.groups()
        if low and high and low.endswith("%") == high.endswith("%"):
            _check_ends(float(low.rstrip("%")), float(high.rstrip("%")), f"--{name}={text}")
        return cls(low, high)

    def outside(self, values: Sequence[float] | np.ndarray, what: str) -> Gone:
        """The indices of values [N] beyond the ends, with what each is."""
        if not len(values):
            return {}
        low, high = _bound(self.low, values, -math.inf), _bound(self.high, values, math.inf)
        _check_ends(low, high, f"{what} {self.low}..{self.high}")
        gone = {}
        for index, value in enumerate(values):
            if not low <= value <= high:
                beyond = f"below {low:.4g}" if value < low else f"above {high:.4g}"
                gone[index] = f"{what} {value:.4g}, {beyond}"
        return gone


def _check_ends(low: float, high: float, where: str) -> None:
    if low > high:
        raise UserError(f"{where}: the low end, {low:g}, is above the high end, {high:g}")


def _bound(end: str, values: Sequence[float] | np.ndarray, none: float) -> float:
    if end.endswith("%"):
        return float(np.quantile(values, float(end[:-1]) / 100))
    return float(end) if end else none


def wrong_length(items: Sequence[Item], band: Band) -> Gone:
    """Items whose trained text has too few or too many words, as white space parts them."""
    return band.outside([len(trained_text(item.record).split()) for item in items], "words:")
