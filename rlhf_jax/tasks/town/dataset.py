"""The embedded town as a data set, held-out as "validation". It is made where it is read: no file.

text, conversation, pair, prompt    records of that kind
facts                               prompts: every fact about a person, asked once; of those
                                    training may ask about, and ("validation") of the others
arithmetic                          prompts: sums and differences only; those of "validation" are
                                    of pairs of numbers that training never asks about
solutions                           conversations: the same with the right answer
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import tensorflow_datasets as tfds

from rlhf_jax.data.records import Record
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN, TownConfig

KINDS = {
    "text": "text",
    "conversation": "conversation",
    "pair": "pair",
    "prompt": "prompt",
    "facts": "prompt",
    "arithmetic": "prompt",
    "solutions": "conversation",
}
_STREAMS: dict[str, Callable[[Town, str], Iterable[Record]]] = {
    "text": Town.texts,
    "conversation": Town.demonstrations,
    "pair": Town.pairs,
    "prompt": Town.prompts,
    "facts": Town.fact_prompts,
    "arithmetic": Town.prompts,
    "solutions": Town.solutions,
}
_SUMS = TownConfig(families={"arithmetic": 1.0}, prompts=8_000)
_CONFIGS = {"arithmetic": _SUMS, "solutions": _SUMS}
_SPLITS = {"train": TRAIN, "validation": HELDOUT}


def read_town(config: str, split: str) -> list[Record]:
    """The records of a key of `KINDS`; `split` may be sliced as TFDS does ("train[:10%]").

    Raises:
        UserError: a split there is none of, or a slice that cannot be read.
    """
    name = split.partition("[")[0]
    if name not in _SPLITS:
        raise UserError(f"town: no split {name!r}; there are: {', '.join(_SPLITS)}")
    records = _make(config, name)
    whole = tfds.core.SplitInfo(name=name, shard_lengths=[len(records)], num_bytes=0)
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    except (KeyError, ValueError) as error:
        raise UserError(f"town: cannot read {split!r}: {error}") from error
    return list(records[part.from_ : part.to])


@functools.cache
def _make(config: str, split: str) -> tuple[Record, ...]:
    return tuple(_STREAMS[config](Town(_CONFIGS.get(config)), _SPLITS[split]))
