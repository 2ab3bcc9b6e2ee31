"""Who has compared what, and what each labeler sees next.

Nothing is remembered that the files don't say: what a labeler has answered is read from the votes
and skips, which side an answer is on follows from the seed, the labeler and the pair. So a server
that was killed goes on where it was. A showing is named by its pair, with `AGAIN` at the second
time; one that is answered already is not answered twice, however often it is sent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.label.files import SKIPS, VOTES, Comparison, LabelFiles, Line

AGAIN = ".again"
CHECK_EVERY = 10  # votes of a labeler between two gold checks
CHOICES = ("1", "2", "0", "s")  # the first answer, the second one, a tie, a skip


class Refused(Exception):
    """A request that cannot be followed: `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Design:
    """How pairs are given to labelers.

    Attributes:
      pairs: how many are wanted.
      overlap: votes of as many labelers on each.
      repeat_every: a pair out of so many comes again, with its sides swapped; 0: none does.
      seed: of the sides.
    """

    pairs: int
    overlap: int
    repeat_every: int
    seed: int


@dataclass
class _Labeler:
    """What one labeler has answered, by the showing: a vote's or skip's file and line, in order."""

    answered: dict[str, tuple[str, Line]] = field(default_factory=dict)
    open: str | None = None  # the showing on the page

    @property
    def last(self) -> str | None:
        """The showing that was answered last."""
        return next(reversed(self.answered), None)

    def lines(self, *, repeat: bool = False) -> list[Line]:
        """Votes on sampled pairs, those of the second time or of the first, in order."""
        return [
            line
            for name, line in self.answered.values()
            if name == VOTES and "check" not in line and line.get("repeat", False) == repeat
        ]


class Book:
    """The pairs of a labelling directory, and what every labeler has answered.

    Its methods may be called from any thread. `changed` is notified of new pairs and answers.

    Args:
        files: where it is kept.
        checks: gold checks, whose first answer is the better one.

    Raises:
        UserError: the files contradict one another.
    """

    def __init__(self, files: LabelFiles, design: Design, checks: Sequence[Comparison]) -> None:
        self.files, self.design = files, design
        self.pairs: dict[str, Comparison] = {each.pair: each for each in files.comparisons()}
        self.checks = {each.pair: each for each in checks if each.pair not in self.pairs}
        self.changed = threading.Condition(threading.RLock())
        self.problem = ""  # why no more pairs come
        self._labelers: dict[str, _Labeler] = {}
        self._votes: Counter[str] = Counter()  # of each pair, those of a second time left out
        lines = [(name, line) for name in (VOTES, SKIPS) for line in files.read(name)]
        try:
            for name, line in sorted(lines, key=lambda each: each[1]["number"]):
                showing = line["pair"] + (AGAIN if line.get("repeat") else "")
                self._labeler(line["labeler"]).answered[showing] = name, line
                self._votes[showing] += name == VOTES
        except (KeyError, TypeError) as error:
            raise UserError(f"{files.folder / VOTES} is not as this package writes it") from error
        if sum(len(each.answered) for each in self._labelers.values()) < len(lines):
            raise UserError(f"{files.folder / VOTES} has two votes of a labeler on one pair")

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Stores pairs that were sampled; those that are there already are left out."""
        new = {each.pair: each for each in comparisons if each.pair not in self.pairs}
        with self.changed:
            if new:
                self.files.add_comparisons([*new.values()])
                self.pairs |= new
                self.changed.notify_all()

    def wanted(self, ahead: int) -> bool:
        """Whether a labeler, or a new one, has fewer than `ahead` pairs before him."""
        with self.changed:
            if len(self.pairs) >= self.design.pairs:
                return False
            everybody = [*self._labelers.values(), _Labeler()]
            return any(len([*self._fresh(each)]) < ahead for each in everybody)

    def showing(self, name: str) -> Line:
        """What a labeler's page shows: a pair and how far he is, as JSON has it."""
        with self.changed:
            labeler = self._labeler(name)
            if labeler.open is None or labeler.open in labeler.answered:
                labeler.open = self._next(labeler)
            shown = None
            if labeler.open is not None:
                pair, first = self._sides(name, labeler.open)
                second, cut = 1 - first, pair.more.get("cut", ())
                shown = {
                    "id": labeler.open,
                    "turns": pair.turns,
                    "answers": [pair.answers[first], pair.answers[second]],
                    "cut": [first in cut, second in cut],
                }
            return {"shown": shown, "state": self._state(shown)} | self._progress(labeler)

    def answer(self, name: str, showing: str, choice: str, seconds: float) -> bool:
        """Stores a vote or a skip; False if that showing had another answer already, which stays.

        Raises:
            Refused: there is no such showing for this labeler.
            NoRoom: the disk is full; nothing is stored.
        """
        with self.changed:
            labeler = self._labeler(name)
            pair, first = self._sides(name, showing)
            repeat = showing.endswith(AGAIN)
            if showing in labeler.answered:
                return choice_of(*labeler.answered[showing]) == choice
            if repeat and pair.pair not in labeler.answered:
                raise Refused(409, "that pair was not answered the first time")
            file = SKIPS if choice == "s" else VOTES
            line: Line = {} if choice == "s" else _vote(pair, first, choice)
            number = labeler.answered[labeler.last][1]["number"] + 1 if labeler.last else 0
            line |= {"labeler": name, "seconds": seconds, "pair": pair.pair, "number": number}
            line |= {"repeat": True} if repeat else {}
            self.files.append(file, [line])
            labeler.answered[showing] = file, line
            self._votes[showing] += file == VOTES
            self.changed.notify_all()
            return True

    def undo(self, name: str, showing: str) -> None:
        """Takes a labeler's last answer back, and shows that pair again.

        One that is taken back already, as when the request is sent twice, is left at that.

        Raises:
            Refused: it is not the last one.
        """
        with self.changed:
            labeler = self._labeler(name)
            self._sides(name, showing)
            if showing not in labeler.answered:
                return
            if showing != labeler.last:
                raise Refused(409, "only the last answer can be taken back")
            file, line = labeler.answered[showing]
            self.files.remove(file, line)
            del labeler.answered[showing]
            self._votes[showing] -= file == VOTES
            labeler.open = showing
            self.changed.notify_all()

    def votes(self) -> list[Line]:
        """All votes, as the file has them."""
        with self.changed:
            return self.files.read(VOTES)

    def _labeler(self, name: str) -> _Labeler:
        return self._labelers.setdefault(name, _Labeler())

    def _sides(self, name: str, showing: str) -> tuple[Comparison, int]:
        """The pair of a showing, and which of its answers is shown first."""
        known = showing.removesuffix(AGAIN)
        pair = self.pairs.get(known) or self.checks.get(known)
        if pair is None or (pair.check and showing.endswith(AGAIN)):
            raise Refused(404, "there is no such pair")
        first = int(json_digest([self.design.seed, name, known]), 16) & 1
        return pair, first ^ showing.endswith(AGAIN)

    def _next(self, labeler: _Labeler) -> str | None:
        """A pair's second time, a gold check, or the first pair that wants votes, in this order."""
        votes, every = labeler.lines(), self.design.repeat_every
        due = votes[::every][: len(votes) // every] if every else []
        # The files don't say what K was when they were begun: others than these may be answered.
        for line in due:
            if (again := line["pair"] + AGAIN) not in labeler.answered:
                return again
        left = [pair for pair in self.checks if pair not in labeler.answered]
        if left and len(self.checks) - len(left) < len(votes) // CHECK_EVERY:
            return left[0]
        fresh = sorted(self._fresh(labeler), key=lambda each: each[0])
        return fresh[0][1] if fresh else None

    def _fresh(self, labeler: _Labeler) -> Iterator[tuple[int, str]]:
        """(how many others have it before them, pair) that lack votes and are new to a labeler."""
        shown = [each.open for each in self._labelers.values()]
        for pair in self.pairs:
            lacks = self.design.overlap - self._votes[pair]
            if lacks > 0 and pair not in labeler.answered:
                others = shown.count(pair) - (labeler.open == pair)
                yield max(0, others - lacks + 1), pair

    def _state(self, shown: Line | None) -> str:
        if shown is not None:
            return "ready"
        if self.problem:
            return "failed"
        return "done" if len(self.pairs) >= self.design.pairs else "sampling"

    def _progress(self, labeler: _Labeler) -> Line:
        again = {line["pair"]: line for line in labeler.lines(repeat=True)}
        firsts = {line["pair"]: line for line in labeler.lines() if line["pair"] in again}
        same = sum(_preferred(again[pair]) == _preferred(line) for pair, line in firsts.items())
        checks = [line["check"] for _, line in labeler.answered.values() if "check" in line]
        overlap = self.design.overlap
        return {
            "problem": self.problem,
            "last": labeler.last,
            "yours": len(labeler.lines()) + len(again) + len(checks),
            "skipped": sum(name == SKIPS for name, _ in labeler.answered.values()),
            "done": sum(min(self._votes[pair], overlap) for pair in self.pairs),
            "of": self.design.pairs * overlap,
            "repeats": [same, len(firsts)],
            "checks": [sum(checks), len(checks)],
        }


def _vote(pair: Comparison, first: int, choice: str) -> Line:
    """What a vote states of the pair; of a tie the answer shown first is the chosen one."""
    chosen = first if choice in "10" else 1 - first
    line = pair.preferred(chosen, tie=choice == "0")
    line |= {"order": "chosen_first" if chosen == first else "rejected_first"}
    return line | ({"check": choice != "0" and chosen == 0} if pair.check else {})


def _preferred(line: Line) -> str:
    return "" if line.get("tie") else line["chosen"]


def choice_of(file: str, line: Line) -> str:
    """The key that made a vote or a skip."""
    if file == SKIPS:
        return "s"
    if line.get("tie"):
        return "0"
    return "1" if line["order"] == "chosen_first" else "2"
