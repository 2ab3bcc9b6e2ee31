"""Prompts to be answered: their records, and their tokens as a model reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_jax import console
from rlhf_jax.data.conversation import Tokenizer, render_prompt
from rlhf_jax.data.encode import length_of_share
from rlhf_jax.data.records import Prompt
from rlhf_jax.environments.trajectories import Environments
from rlhf_jax.tasks.sources import check_unrendered


@dataclass(frozen=True)
class PromptSet:
    """Prompts to sample from: their records, their tokens and what answers the replies to them."""

    records: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]
    environments: Environments | None = None

    def take(self, indices: Sequence[int]) -> PromptSet:
        """The prompts at these indices, in their order."""
        records, tokens = [self.records[i] for i in indices], [self.tokens[i] for i in indices]
        return dataclasses.replace(self, records=records, tokens=tokens)

    @staticmethod
    def joined(sets: Sequence[PromptSet]) -> PromptSet:
        """The prompts of all sets, in order, with what answers the replies to the first."""
        records, tokens = [r for s in sets for r in s.records], [t for s in sets for t in s.tokens]
        return dataclasses.replace(sets[0], records=records, tokens=tokens)


def prompts_within(
    limit: int, what: str, records: Sequence[Prompt], tokenizer: Tokenizer, why: str
) -> PromptSet:
    """The prompts of at most `limit` tokens, of which there may be none.

    Prints how many there are under the name `what`, and warns of those left out: `why` says by
    which field of the config.
    """
    check_unrendered(what, records, tokenizer)
    tokens = [render_prompt(record.messages, tokenizer) for record in records]
    fitting = [i for i, ids in enumerate(tokens) if len(ids) <= limit]
    too_long = len(records) - len(fitting)
    console.say(what, {"read": len(records), "too long": too_long})
    keeps_95 = length_of_share([*map(len, tokens)])
    console.warn_over_long(what, too_long, len(records), keeps_95, why)
    return PromptSet(records, tokens).take(fitting)
