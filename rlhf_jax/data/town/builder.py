"""The embedded town as a TFDS data set: one config a kind of record, held-out as "validation"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from rlhf_jax.data.record_builder import RecordBuilder, RecordConfig
from rlhf_jax.data.records import Record
from rlhf_jax.data.town import town
from rlhf_jax.data.town.world import HELDOUT, TRAIN


class Town(RecordBuilder, skip_registration=True):
    """A small made-up town: raw text, demonstrations, preferences and prompts with exact answers.

    text, conversation, pair and prompt hold "train" and "validation"; "facts" holds, as prompts,
    every fact about a person once: of those training may ask about, and ("validation") of the
    others.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        *(
            RecordConfig(name=kind, kind=kind)
            for kind in ("text", "conversation", "pair", "prompt")
        ),
        RecordConfig(name="facts", kind="prompt"),
    ]

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        made = town.Town()
        streams: dict[str, Callable[[str], Iterable[Record]]] = {
            "text": made.texts,
            "conversation": made.demonstrations,
            "pair": made.pairs,
            "prompt": made.prompts,
            "facts": made.fact_prompts,
        }
        make = streams[self.builder_config.name]
        return {"train": make(TRAIN), "validation": make(HELDOUT)}
