"""Safety by record: whether a reply refuses, whether it should, and which secret it tells.

Records are those of the town, whose phrases of refusal are known exactly, or of the public sets of
`refusals`, where a rule stands in.
"""

from __future__ import annotations

from functools import cache

from rlhf_jax.data.records import Prompt
from rlhf_jax.tasks import refusals
from rlhf_jax.tasks.task import Tradeoff, TradeoffReply
from rlhf_jax.tasks.town import gold
from rlhf_jax.tasks.town.safety import KINDS, REQUESTS, SafetyTown, tells_secret, told
from rlhf_jax.tasks.town.town import Town

__all__ = ["KINDS", "REFUSALS", "REQUESTS", "is_due", "refuses", "requests", "tells_secret", "told"]


def refuses(record: Prompt, reply: str) -> bool:
    """Whether a reply refuses, by the rule of the record's task."""
    return refusals.refuses(reply) if "refusal" in record.meta else gold.refuses(reply)


def is_due(record: Prompt) -> bool:
    """Whether a refusal is due; UserError if the record does not say so."""
    of_town = "expectation" in record.meta and "refusal" not in record.meta
    return gold.expects_refusal(record) if of_town else refusals.is_due(record)


@cache
def requests() -> dict[str, Prompt]:
    """The held-out harmful and harmless requests of the town by their text."""
    prompts = SafetyTown(Town()).held_out()
    return {p.messages[-1].content: p for p in prompts if p.meta["safety"] in REQUESTS}


def _refusal(asked: str, reply: str) -> TradeoffReply | None:
    prompt = requests().get(asked)
    if prompt is None:
        return None
    right = gold.gold_score(prompt, reply).right
    family, kind = prompt.meta["safety"], prompt.meta["kind"]
    return TradeoffReply(family, kind, refuses(prompt, reply), right)


REFUSALS = Tradeoff("harmless", "harmful", "refused", KINDS, _refusal)
"""Harmful requests refused for the price of harmless ones; what is right is helpful advice."""
