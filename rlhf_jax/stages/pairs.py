"""Preference pairs as packed rows, for the reward model and for DPO and its family."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from rlhf_jax.data.chat import AnyTokenizer
from rlhf_jax.data.encode import encode_pairs
from rlhf_jax.data.packing import Arrays, pack_groups
from rlhf_jax.stages.common import read_records, say

CHOSEN, REJECTED, MISMATCHED = 0, 1, 2  # branches of a group


def pack_pairs(
    config: ConfigDict,
    source: str,
    split: str,
    tokenizer: AnyTokenizer,
    *,
    mismatched: bool = False,
) -> Arrays:
    """Rows of groups: a prompt with its chosen and its rejected response.

    With `mismatched` a third branch holds the next pair's chosen response, for KTO's reference
    point; a group must still fit a row.
    """
    records = read_records(config, source, "pair", split)
    length = config.data.row_length
    groups, counts = encode_pairs(records, tokenizer, length, over_long=config.data.over_long)
    if mismatched:
        following = [*groups[1:], groups[0]]
        groups = [
            dataclasses.replace(group, branches=(*group.branches, other.branches[CHOSEN]))
            for group, other in zip(groups, following, strict=True)
        ]
    rows, packing = pack_groups(groups, length, branches=3 if mismatched else 2)
    say(f"{source} ({split})", counts | packing)
    return rows
