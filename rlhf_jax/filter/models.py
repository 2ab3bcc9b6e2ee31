"""Filters that ask a model or a scorer: how likely a text is, and what a reply is worth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.encode import render_groups
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.data.records import Prompt, Text, convert
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import in_record_order, map_rows, response_logprobs
from rlhf_jax.filter.records import Item, trained_text
from rlhf_jax.filter.texts import Band, Gone
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.rewards.scorers import TextScorers, parse_rewards
from rlhf_jax.training.saved_model import Model, load_model

TOKENS = 4096  # of a forward pass
_NOT_TEXTS = ("model", "length", "regex")  # scorers that need more than a record and its reply


def perplexities(items: Sequence[Item], model: Model) -> np.ndarray:
    """exp(nats a token) of each item's trained text after its prompt, its end included: [N] f64."""
    rows, tokens = _pack(items, model)
    logprobs = response_logprobs(model.config, model.params, rows, TOKENS, "perplexity")
    return np.exp(-in_record_order(logprobs, rows)[:, 0].astype(np.float64) / tokens)


def unlikely(items: Sequence[Item], band: Band, run: str) -> Gone:
    """Items whose perplexity under the language model of a run is outside the band."""
    if not items:
        return {}
    return band.outside(perplexities(items, _load(run, "lm", "--model")), "perplexity")


def scores(items: Sequence[Item], scorer: str) -> np.ndarray:
    """What each item's reply to its prompt is worth, [N] f64.

    Args:
        scorer: the directory of a reward model, whose scores are on its normal scale if it has one;
            else weights of scorers that judge texts, as `reward.scorers` names them.

    Raises:
        UserError: there is no such scorer, or a reply that it cannot judge.
    """
    if any(isinstance(item.record, Text | Prompt) for item in items):
        raise UserError("--score judges replies to prompts; these records have none")
    if Path(scorer).is_dir():
        model = _load(scorer, "scalar", "--scorer")
        rows, _ = _pack(items, model)
        score = jax.jit(partial(sequence_scores, model.config))
        given = map_rows(score, model.params, rows, TOKENS, "scores")
        mean, deviation = model.normalization or (0.0, 1.0)
        return (in_record_order(given, rows)[:, 0].astype(np.float64) - mean) / deviation
    prompts: list[Any] = [convert(item.record, "prompt") for item in items]
    with TextScorers(weights_of(scorer)) as judge:
        replies = [trained_text(item.record) for item in items]
        return judge.score(prompts, replies, lengths=np.zeros(len(items))).total


def weights_of(scorer: str) -> dict[str, float]:
    """The weights of the scorers of texts that an option names; none for a directory.

    Raises:
        UserError: it names a scorer that does not exist, or that needs more than texts.
    """
    if Path(scorer).is_dir():
        return {}
    weights = parse_rewards(scorer)
    if wrong := sorted(weights.keys() & set(_NOT_TEXTS)):
        raise UserError(
            f"--scorer={scorer}: {wrong[0]!r} is no scorer here; name a reward model's directory, "
            "gold, correct, number, math, exact or file.py:function"
        )
    return weights


def unworthy(items: Sequence[Item], band: Band, scorer: str) -> Gone:
    """Items whose score is outside the band."""
    return band.outside(scores(items, scorer), "score") if items else {}


def _load(run: str, head: str, option: str) -> Model:
    model = load_model(run)
    if model.config.head != head:
        other = "a reward model, not a language model"
        other = other if head == "lm" else "a language model, not a reward model"
        raise UserError(f"{option}: {run} is {other}")
    return model


def _pack(items: Sequence[Item], model: Model) -> tuple[Arrays, np.ndarray]:
    """Rows of trained texts after their prompts, and the tokens of each text [N].

    Raises:
        UserError: an item is longer than the model's context, or a prompt without a reply.
    """
    groups = []
    for index, item in enumerate(items):
        record, tokenizer = item.record, model.tokenizer
        if isinstance(record, Text):
            start = [] if tokenizer.bos is None else [tokenizer.bos]
            tokens = [*start, *tokenizer.encode_texts([record.text])[0], tokenizer.end]
            groups.append(Group(tokens[:1], (tokens[1:],), index))
        elif isinstance(record, Prompt):
            raise UserError(f"{item.place}: a prompt has no reply that a model could judge")
        else:
            whole: Any = convert(record, "conversation")
            (group,) = render_groups([whole], tokenizer)
            groups.append(Group(group.prompt, group.branches, index))
    longest, limit = max(groups, key=lambda group: group.size), model.config.max_length
    if longest.size > limit:
        over = sum(group.size > limit for group in groups)
        raise UserError(
            f"{over:,} of {len(groups):,} records are longer than the model's context of {limit:,} "
            f"tokens (the longest, {items[longest.example].place}, has {longest.size:,}); leave "
            "them out with --words=..N"
        )
    rows, _ = pack_groups(groups, -(-longest.size // 64) * 64, branches=1)
    return rows, np.array([len(group.branches[0]) for group in groups])
