"""Preferences as packed rows, for the reward model and for DPO and its family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.chat import AnyTokenizer, render_replies
from rlhf_jax.data.encode import encode_pairs, length_of_share, naming
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.data.records import Conversation, Message, Pair
from rlhf_jax.errors import UserError
from rlhf_jax.stages.common import check_unrendered, read_records, say_encoded

CHOSEN, REJECTED, MISMATCHED = 0, 1, 2  # branches of a group
_LABELS = {"true": 1.0, "false": 0.0}


def pack_preferences(
    config: ConfigDict, source: str, split: str, tokenizer: AnyTokenizer, *, mismatched: bool
) -> Arrays:
    """Rows of pairs, or of the replies of a file that labels each by itself, which hold `labels`.

    See `read_preferences`, `pack_pairs` and `pack_labelled`.
    """
    records = read_preferences(config, source, split)
    pairs = [record for record in records if isinstance(record, Pair)]
    if pairs:
        return _pair_rows(config, f"{source} ({split})", pairs, tokenizer, mismatched)
    single = [record for record in records if isinstance(record, Conversation)]
    return _labelled_rows(config, f"{source} ({split})", single, tokenizer, mismatched)


def read_preferences(
    config: ConfigDict, source: str, split: str
) -> list[Pair] | list[Conversation]:
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


def pack_pairs(config: ConfigDict, source: str, split: str, tokenizer: AnyTokenizer) -> Arrays:
    """Rows of groups: a prompt with its chosen and its rejected response."""
    records = read_records(config, source, "pair", split)
    return _pair_rows(config, f"{source} ({split})", records, tokenizer, False)


def pack_labelled(config: ConfigDict, source: str, split: str, tokenizer: AnyTokenizer) -> Arrays:
    """Rows of groups of one reply, and beside them `labels` [B, P, 1] in [0, 1]."""
    records = read_records(config, source, "conversation", split)
    return _labelled_rows(config, f"{source} ({split})", records, tokenizer, False)


def _pair_rows(
    config: ConfigDict,
    what: str,
    records: Sequence[Pair],
    tokenizer: AnyTokenizer,
    mismatched: bool,
) -> Arrays:
    """With `mismatched` a third branch holds the next pair's chosen response.

    That is for KTO's reference point; a group must still fit a row.
    """
    check_unrendered(what, records, tokenizer)
    length = config.data.row_length
    groups, counts = encode_pairs(records, tokenizer, length, over_long=config.data.over_long)
    if mismatched:
        following = [*groups[1:], groups[0]]
        for i, (group, other) in enumerate(zip(groups, following, strict=True)):
            record, text = records[group.example], records[other.example].chosen
            with naming(record.id):
                _, (reply,) = render_replies(record.prompt, [text], tokenizer)
            groups[i] = dataclasses.replace(group, branches=(*group.branches, reply))
    rows, packing = pack_groups(groups, length, branches=3 if mismatched else 2)
    say_encoded(config, what, counts, packing)
    return rows


def _labelled_rows(
    config: ConfigDict,
    what: str,
    records: Sequence[Conversation],
    tokenizer: AnyTokenizer,
    mismatched: bool,
) -> Arrays:
    """With `mismatched` a second branch holds the next record's reply to another prompt."""
    length, over_long = config.data.row_length, config.data.over_long
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
    asked = [record.messages[:-1] for record in records]
    others = _next_of_another_prompt(asked) if mismatched else None
    groups, dropped = [], 0
    lengths: list[int] = []
    for index, record in enumerate(records):
        answering = [record, *([records[others[index]]] if others else [])]
        with naming(record.id):
            texts = [each.messages[-1].content for each in answering]
            prompt, branches = render_replies(asked[index], texts, tokenizer)
        tokens = len(prompt) + sum(map(len, branches))
        lengths.append(tokens)
        if tokens <= length:
            groups.append(Group(prompt, tuple(branches), index))
            continue
        dropped += 1
        if over_long == "error":
            beside = " with the reply to another prompt beside it" if mismatched else ""
            raise UserError(
                f"record {record.id!r} has {tokens} tokens{beside}, more than a row of "
                f'{length}; raise data.row_length or set data.over_long to "drop"'
            )
    if not groups:
        raise UserError(f"no examples of {what} are left: {dropped} were over-long")
    rows, packing = pack_groups(groups, length, branches=2 if mismatched else 1)
    labels = np.where(rows["valid"] > 0, by_record[rows["example_ids"]], 0)
    counts = {"records": len(records), "dropped": dropped, "truncated": 0}
    counts["keeps_95"] = length_of_share(lengths)
    say_encoded(config, what, counts, {"good": float(by_record.mean())} | packing)
    return rows | {"labels": labels[..., None].astype(np.float32)}


def _next_of_another_prompt(prompts: Sequence[Sequence[Message]]) -> list[int]:
    """For each index that of the next prompt, cyclically, that is another one."""
    following = [0] * len(prompts)
    after = None
    for i in reversed(range(2 * len(prompts) - 1)):  # twice around: what follows the last ones
        here, there = i % len(prompts), (i + 1) % len(prompts)
        if prompts[here] != prompts[there]:
            after = there
        if after is not None:
            following[here] = after
    if after is None:
        raise UserError("kto needs replies to two prompts or more: one of them is its reference")
    return following


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
