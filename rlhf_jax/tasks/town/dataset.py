"""The embedded town as a task, held-out as "validation". It is made where it is read: no file.

text, conversation, pair, prompt    records of that kind
facts                               prompts: every fact about a person, asked once; of those
                                    training may ask about, and ("validation") of the others
arithmetic                          prompts: sums and differences only; those of "validation" are
                                    of pairs of numbers that training never asks about
solutions                           conversations: the same with the right answer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rlhf_jax.data.records import Record
from rlhf_jax.tasks.task import Task
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN, TownConfig

_SUMS = TownConfig(families={"arithmetic": 1.0}, prompts=8_000)
_STREAMS = {  # config → kind, the town's method, the town's configuration
    "text": ("text", "texts", None),
    "conversation": ("conversation", "demonstrations", None),
    "pair": ("pair", "pairs", None),
    "prompt": ("prompt", "prompts", None),
    "facts": ("prompt", "fact_prompts", None),
    "arithmetic": ("prompt", "prompts", _SUMS),
    "solutions": ("conversation", "solutions", _SUMS),
}


def _make(config: str, paths: list[Path], left_out: Counter[str]) -> dict[str, Iterable[Record]]:
    _, stream, options = _STREAMS[config]
    records = getattr(Town(options), stream)
    return {"train": records(TRAIN), "validation": records(HELDOUT)}


TOWN = Task(
    "town",
    kinds={config: kind for config, (kind, *_) in _STREAMS.items()},
    make=_make,
    verify=gold_score,
    verifies=lambda meta: "expectation" in meta,
    probes={"facts": "town/facts"},
    group="family",
)
