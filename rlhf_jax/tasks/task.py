"""Tasks: the records of a data set, the worth of a reply to them, and what is reported.

A new data set is one `Task` and its name in `builders.TASKS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.data.records import Conversation, Pair, Prompt, Record
from rlhf_jax.tasks.data_files import DataFile


@dataclass(frozen=True)
class Verdict:
    """The worth of a reply by an exact verifier: `total` in [0, 1], and its components.

    One of these is "correct".
    """

    total: float
    components: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether the reply is right, in whatever style."""
        return self.components["correct"] >= 0.5


Outcome = tuple[float, float]  # how many, of how many


class TradeoffReply(NamedTuple):
    """What a reply adds to a trade-off: to which of its shares, of which kind, and whether.

    Attributes:
      share, kind: `Tradeoff.cost` or `Tradeoff.gain`, and one of `Tradeoff.kinds`.
      counts: whether the reply is in the share.
      right: whether it is right besides.
    """

    share: str
    kind: str
    counts: bool
    right: bool


@dataclass(frozen=True)
class Tradeoff:
    """Two shares of replies, of which a model has more of one for the price of the other.

    Attributes:
      cost, gain: what the shares are of: prompts of which a smaller, and of which a larger is good.
      what: is said of the replies that count, as in "harmless refused".
      kinds: of prompts, each with a curve of its own.
      outcome: of the last turn of a prompt and a reply; None of a prompt of neither share.
    """

    cost: str
    gain: str
    what: str
    kinds: tuple[str, ...]
    outcome: Callable[[str, str], TradeoffReply | None]


@dataclass(frozen=True)
class Task:
    """A data set by name.

    Attributes:
      name: as `data.train` has it.
      kinds: the kind of record of each config of the data set; the first config is the default.
      make: (config, paths of its files, left_out) → split → records, with ids that are unique
        within a split. `left_out` counts, by reason, the records that it skips.
      files: what each config is made from. Without any, records are made where they are read, and
        not stored.
      verify: the verdict on a reply to a record; UserError if `verifies` is false of the record.
      replay: the verdict on all of the assistant's turns in a record, where `verify` judges one.
      outcomes: what is measured beside: (how many, of how many) by name, of a record and the
        assistant's turns in it. Those of all records are reported as the rate eval/<name>, and
        drawn over the number where a name ends in "/<number>"; they are shares of a whole but
        where its last part begins with "of_".
      verifies: whether a record with this `meta` has what `verify` needs.
      preference: the probability that one of its labelers, shown two replies to a record, prefers
        the first; None if it has no labelers.
      probes: names of further prompts by data set; the share of right replies to the held-out ones
        is reported as eval/correct/<name>.
      group: the key of `meta` by which reports group the records, "" for none.
      tradeoff: what a sweep draws as a curve, None for none.
    """

    name: str
    kinds: Mapping[str, str]
    make: Callable[[str, list[Path], Counter[str]], Mapping[str, Iterable[Record]]]
    files: Mapping[str, tuple[DataFile, ...]] = field(default_factory=dict)
    verify: Callable[[Prompt | Pair | Conversation, str], Verdict] | None = None
    replay: Callable[[Prompt, Sequence[str]], Verdict] | None = None
    outcomes: Callable[[Prompt, Sequence[str]], Mapping[str, Outcome]] | None = None
    verifies: Callable[[Mapping[str, str]], bool] = lambda meta: False
    preference: Callable[[Prompt, str, str], float] | None = None
    probes: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    tradeoff: Tradeoff | None = None
