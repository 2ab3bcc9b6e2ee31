"""Preferences as packed rows, for the reward model and for DPO and its family."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.encode import (
    BESIDE,
    add_mismatched,
    encode_pairs,
    is_identical,
    length_of_share,
    render_groups,
)
from rlhf_jax.data.packing import Arrays, pack_groups
from rlhf_jax.data.records import Conversation, Pair
from rlhf_jax.errors import UserError
from rlhf_jax.labelers.training import settle
from rlhf_jax.tasks.sources import check_unrendered, read_records

CHOSEN, REJECTED, MISMATCHED = 0, 1, 2  # branches of a group
_LABELS = {"true": 1.0, "false": 0.0}


def pack_preferences(
    config: Config, source: str, split: str, tokenizer: Tokenizer, *, mismatched: bool
) -> Arrays:
    """Rows of pairs, or of the replies of a file that labels each by itself, which hold `labels`.

    See `read_preferences`, `pack_pairs` and `pack_labelled`. `mismatched`: with a further branch,
    a reply to another prompt, for KTO's reference point: `encode.add_mismatched`.
    """
    records = read_preferences(config, source, split)
    pairs = [record for record in records if isinstance(record, Pair)]
    if pairs:
        return _pair_rows(config, source, split, pairs, tokenizer, mismatched)
    single = [record for record in records if isinstance(record, Conversation)]
    return _labelled_rows(config, f"{source} ({split})", single, tokenizer, mismatched)


def read_preferences(config: Config, source: str, split: str) -> list[Pair] | list[Conversation]:
    """The pairs of a source, or the conversations of a file that labels each by itself.

    Raises:
        UserError: single replies for a loss other than KTO, or beside pairs.
    """
    records = read_records(config, source, "preference", split)
    kinds = {type(record) for record in records}
    if len(kinds) > 1:
        raise UserError(f"data: {source!r} mixes pairs and unpaired records; use one of them")
    if Conversation in kinds and config.loss.name != "kto":
        raise UserError(
            f"data: {source!r} holds unpaired records: use loss.name = 'kto', or the reward "
            "stage's 'pointwise'"
        )
    return records


def pack_pairs(config: Config, source: str, split: str, tokenizer: Tokenizer) -> Arrays:
    """Rows of groups: a prompt with its chosen and its rejected response.

    Pairs whose replies are the same tokens are left out of the split "train"; in another,
    `identical` [B, P] bool says which they are, if there are any.

    Raises:
        UserError: they are all like that, and to be trained on.
    """
    records = read_records(config, source, "pair", split)
    return _pair_rows(config, source, split, records, tokenizer, False)


def pack_labelled(config: Config, source: str, split: str, tokenizer: Tokenizer) -> Arrays:
    """Rows of groups of one reply, and beside them `labels` [B, P, 1] in [0, 1]."""
    records = read_records(config, source, "conversation", split)
    return _labelled_rows(config, f"{source} ({split})", records, tokenizer, False)


def _pair_rows(
    config: Config,
    source: str,
    split: str,
    records: Sequence[Pair],
    tokenizer: Tokenizer,
    mismatched: bool,
) -> Arrays:
    what, length, trained = f"{source} ({split})", config.data.row_length, split == "train"
    check_unrendered(what, records, tokenizer)
    if trained:
        _warn_margins(what, records)
    settled = settle(records, config.data.labelers if trained else "pooled", what)
    records = settled.records
    groups, counts = encode_pairs(
        records, tokenizer, length, over_long=config.data.over_long, mismatched=mismatched
    )
    identical = [group.example for group in groups if is_identical(group)]
    _warn_identical(what, len(identical), len(groups), trained)
    if trained:
        groups = [group for group in groups if not is_identical(group)]
    rows, packing = pack_groups(groups, length, branches=3 if mismatched else 2)
    if settled.effects is not None:
        votes = np.where(rows["valid"][..., None] > 0, settled.effects[rows["example_ids"]], 0)
        rows["votes"] = votes.astype(np.float32)
    if settled.weights is not None:
        weights = np.where(rows["valid"] > 0, settled.weights[rows["example_ids"]], 0)
        rows["valid"] = weights.astype(np.float32)
    if identical and not trained:
        rows["identical"] = np.isin(rows["example_ids"], identical)
    console.say_encoded(config, what + BESIDE * mismatched, counts, packing)
    return rows


def _warn_margins(what: str, records: Sequence[Pair]) -> None:
    count = sum(record.margin is not None for record in records)
    if count:
        logging.warning(
            "%s: %s of %s pairs say by what margin they are preferred; no loss uses that: they "
            "count as the others do", what, f"{count:,}", f"{len(records):,}",
        )  # fmt: skip


def _warn_identical(what: str, identical: int, pairs: int, trained: bool) -> None:
    """A warning where more than half of the pairs are one reply twice; UserError if all are."""
    if trained and identical == pairs:
        raise UserError(
            f"{what}: the replies of all {pairs:,} pairs are the same, chosen as rejected: there "
            "is nothing to learn from them"
        )
    if 2 * identical > pairs:
        logging.warning(
            "%s: the replies of %s of %s pairs (%.1f %%) are the same, chosen as rejected: these "
            "pairs %s", what, f"{identical:,}", f"{pairs:,}", 100 * identical / pairs,
            "are left out" if trained else "count half as right in accuracies",
        )  # fmt: skip


def _labelled_rows(
    config: Config,
    what: str,
    records: Sequence[Conversation],
    tokenizer: Tokenizer,
    mismatched: bool,
) -> Arrays:
    length, over_long = config.data.row_length, config.data.over_long
    if config.data.labelers != "pooled":
        raise UserError(f"{what}: data.labelers is of votes on pairs, and these are single replies")
    if over_long not in ("error", "drop"):
        raise UserError(f"data.over_long = {over_long!r}: labelled replies know error and drop")
    check_unrendered(what, records, tokenizer)
    for record in records:
        if record.messages[-1].more:
            raise UserError(
                f"record {record.id!r}: a labelled reply that calls a tool is not supported; the "
                "sft stage trains on tool calls"
            )
    by_record = np.array([label_of(record) for record in records], np.float32)
    groups = render_groups(records, tokenizer)
    if mismatched:
        groups = add_mismatched(groups, records, tokenizer, length, over_long)
    beside = BESIDE * mismatched
    for record, group in zip(records, groups, strict=True):
        if over_long == "error" and group.size > length:
            raise UserError(
                f"record {record.id!r} has {group.size} tokens{beside}, more than a row of "
                f'{length}; raise data.row_length or set data.over_long to "drop"'
            )
    fitting = [group for group in groups if group.size <= length]
    dropped = len(groups) - len(fitting)
    if not fitting:
        raise UserError(f"no examples of {what} are left: {dropped} were over-long")
    rows, packing = pack_groups(fitting, length, branches=2 if mismatched else 1)
    labels = np.where(rows["valid"] > 0, by_record[rows["example_ids"]], 0)
    counts = {"records": len(records), "dropped": dropped, "truncated": 0}
    counts["keeps_95"] = length_of_share([group.size for group in groups])
    console.say_encoded(config, what + beside, counts, {"good": float(by_record.mean())} | packing)
    return rows | {"labels": labels[..., None].astype(np.float32)}


def label_of(record: Conversation) -> float:
    """How good the last reply is, from 0 to 1, by `meta["label"]`; UserError if it is not there."""
    stated = record.meta.get("label", "")
    try:
        label = _LABELS[stated] if stated in _LABELS else float(stated)
    except ValueError:
        label = -1.0
    if not 0 <= label <= 1:
        raise UserError(
            f"record {record.id!r}: a pointwise loss needs a 'label' from 0 to 1, not "
            f"{record.meta.get('label')!r}"
        )
    return label
