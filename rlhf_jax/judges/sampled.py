"""Pairs to be judged: those of a file or data set, or answers of policies to the same prompts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.data.records import Prompt, meta_of_seed
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.held_out_answers import Answer, answer
from rlhf_jax.judges.judge import Comparison
from rlhf_jax.tasks.prompts import prompts_within
from rlhf_jax.tasks.sources import read_source
from rlhf_jax.training.saved_model import Model, load_speaker

TOKENS = 8192  # of a training step of this size, by which answers are sampled together


@dataclass(frozen=True)
class Policy:
    """A model that answers, and how its answers are drawn.

    Attributes:
      name: its directory.
      max_new_tokens, temperature, seed: of the sampling.
    """

    name: str
    model: Model
    max_new_tokens: int
    temperature: float
    seed: int

    @classmethod
    def load(cls, name: str, max_new_tokens: int, temperature: float, seed: int) -> Policy:
        """That of a run or a Hub directory.

        Raises:
            UserError: there is none, or it is a reward model.
        """
        return cls(name, load_speaker(name), max_new_tokens, temperature, seed)

    def answers(self, prompts: list[Prompt], stream: int, begin: int = 0) -> list[Answer]:
        """An answer to each; `stream` tells the times apart that a policy is asked them.

        `begin` is the first one's place among all prompts, where they are asked in parts.
        """
        return answer(
            self.model, prompts, max_new_tokens=self.max_new_tokens, tokens=TOKENS,
            temperature=self.temperature, seed=4 * self.seed + stream, begin=begin,
        )  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Pairs (a, b) with what is known of them.

    Attributes:
      of: the pairs.
      labels: [N] whether a is what a file prefers; None where none said so.
      models: which policy gave a, and which b; "" where unknown.
      cut: by index, which of a and b ended at the limit of tokens.
      left_out: how many pairs there are none of, by reason.
    """

    of: list[Comparison]
    labels: np.ndarray | None = None
    models: tuple[str, str] = ("", "")
    cut: Mapping[int, list[int]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


def _drawn(records: Sequence[Any], source: str, count: int, seed: int) -> list[Any]:
    if not 0 < count <= len(records):
        raise UserError(f"--count={count}: there are {len(records)} records of {source}")
    chosen = np.random.default_rng(seed).permutation(len(records))[:count]
    return [records[i] for i in chosen]


def read_pairs(source: str, split: str, count: int, seed: int) -> Pairs:
    """`count` pairs of a source, drawn at random, the side that each prefers as a or as b by lot.

    Raises:
        UserError: there are fewer.
    """
    records = _drawn(read_source(source, "pair", split), source, count, seed)
    first = np.random.default_rng([seed, 1]).random(count) < 0.5
    pairs = []
    for record, chosen_first in zip(records, first, strict=True):
        shown = Comparison(
            Prompt(record.id, record.prompt, record.meta), record.chosen, record.rejected
        )
        pairs.append(shown if chosen_first else shown.swapped)
    return Pairs(pairs, labels=first)


def read_prompts(
    source: str, policies: list[Policy], split: str, count: int | None, room: int
) -> list[Prompt]:
    """`count` prompts of a source, or all, drawn at random, that leave each policy `room` tokens.

    What their meta says of replies of their own is named so: see `meta_of_seed`.

    Raises:
        UserError: there are fewer.
    """
    records: Sequence[Prompt] = read_source(source, "prompt", split)
    for policy in policies:
        limit = policy.model.config.max_length - room
        why = f"left out: the context of {policy.name} leaves {limit} for a prompt"
        tokenizer = policy.model.tokenizer
        records = prompts_within(limit, f"{source} prompts", records, tokenizer, why).records
    count = len(records) if count is None else count
    return [
        dataclasses.replace(record, meta=meta_of_seed(record.meta))
        for record in _drawn(records, source, count, policies[0].seed)
    ]


def sample_pairs(first: Policy, second: Policy, prompts: list[Prompt], begin: int = 0) -> Pairs:
    """Two answers to each prompt, one of each policy; the same text twice is no pair.

    `begin` is as of `Policy.answers`. There may be no pair.
    """
    both = zip(first.answers(prompts, 0, begin), second.answers(prompts, 1, begin), strict=True)
    pairs: list[Comparison] = []
    cut: dict[int, list[int]] = {}
    left_out: Counter[str] = Counter()
    for prompt, (a, b) in zip(prompts, both, strict=True):
        if a.text == b.text:
            left_out["the same answer twice"] += 1
        elif "\0" in a.text + b.text:  # which no record may hold
            left_out["a NUL character"] += 1
        else:
            if unfinished := [i for i, each in enumerate((a, b)) if not each.finished]:
                cut[len(pairs)] = unfinished
            pairs.append(Comparison(prompt, a.text, b.text))
    return Pairs(pairs, models=(first.name, second.name), cut=cut, left_out=left_out)
