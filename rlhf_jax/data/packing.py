"""Packs token documents and prompt-sharing groups into rows: the batch arrays of every stage.

Arrays over B rows of T tokens with M target slots, P groups per row and K branches per group:

    tokens, positions, segment_ids [B,T] int32   segment 0 = padding, documents are 1, 2, …
    sources, targets [B,M] int32, weights [B,M] f32
                     the hidden state at row index sources[b,m] predicts the token targets[b,m];
                     weight 0 = unused slot (source 0, target 0)
    row_ids [B] int32                            the row's index in the packed set, −1 = empty row

and for groups:

    branch_ids [B,T] int32     0 = shared prompt (and padding), 1…K = branch
    sequences [B,M] int32      which sequence p·K + k a target belongs to (0 in unused slots)
    last, lengths [B,P,K] int32  row index of a branch's last token; its number of tokens
    valid [B,P] f32            1 = a group, 0 = unused place (last, lengths 0; example_ids −1)
    example_ids [B,P] int32    `Group.example`

Whether a token counts is stated by segment_ids and weights alone, never by comparing ids with pad.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.global_arrays import pieces

Arrays = dict[str, np.ndarray]
Stats = dict[str, float]
SLOT_MULTIPLE = 8


@dataclass(frozen=True)
class Document:
    """Tokens [n] of one document and which are trained: is_target [n], 0/1, 0 at index 0."""

    tokens: Sequence[int]
    is_target: Sequence[int]


@dataclass(frozen=True)
class Group:
    """A prompt and the token sequences that answer it; `example` is the index of its record.

    `given` are the places in each branch of what was told to it and not said by it.
    """

    prompt: Sequence[int]
    branches: tuple[Sequence[int], ...]
    example: int
    given: tuple[Sequence[range], ...] = ()

    @property
    def size(self) -> int:
        """How many tokens of a row it takes."""
        return len(self.prompt) + sum(map(len, self.branches))


def pack_documents(documents: Sequence[Document], row_length: int) -> tuple[Arrays, Stats]:
    """Best-fit-decreasing packing of documents into rows of `row_length` tokens.

    Deterministic. A target is predicted from the token before it in its own document. The second
    value counts rows, packed items, tokens and targets; "padding" is the share of empty places.
    Raises UserError where there is no document or one is longer than a row.
    """
    lengths = np.array([len(d.tokens) for d in documents], np.int64)
    rows, starts = _place(lengths, row_length)
    tokens = np.concatenate([np.asarray(d.tokens, np.int32) for d in documents])
    is_target = np.concatenate([np.asarray(d.is_target, bool) for d in documents])
    offsets = np.cumsum(lengths) - lengths
    if len(is_target) != len(tokens) or np.any(is_target[offsets]):
        raise ValueError("is_target must have the tokens' length and be 0 at index 0")

    position = np.arange(len(tokens)) - np.repeat(offsets, lengths)
    place = np.repeat(rows * row_length + starts, lengths) + position
    count = int(rows.max()) + 1
    arrays = _empty_rows(count, row_length)
    arrays["tokens"].reshape(-1)[place] = tokens
    arrays["positions"].reshape(-1)[place] = position
    arrays["segment_ids"].reshape(-1)[place] = np.repeat(_rank_in_row(rows, starts) + 1, lengths)
    _add_targets(arrays, place[is_target], place[is_target] - 1, tokens[is_target])
    return arrays, _stats(arrays, len(documents))


def pack_groups(
    groups: Sequence[Group], row_length: int, *, branches: int, most: int | None = None
) -> tuple[Arrays, Stats]:
    """Packs groups of one prompt and exactly `branches` (K) responses, sharing the prompt's tokens.

    A group is one segment: prompt, branch 1, …, branch K in row order; the positions of each
    branch continue from the prompt's end. Every token of a branch is a target, of weight 0 if it
    was `given`; the first is predicted from the prompt's last token, so K slots share that source.
    A row has at most `most` groups, where that is given.
    Raises UserError where there is no group or one is longer than a row.
    """
    for group in groups:
        if len(group.branches) != branches or not len(group.prompt):
            raise ValueError(f"group {group.example}: need a prompt and {branches} branches")
        if not all(len(branch) for branch in group.branches):
            raise ValueError(f"group {group.example}: a branch is empty")
    # Pieces are the prompts and branches in order: K + 1 of each group.
    pieces = [piece for group in groups for piece in (group.prompt, *group.branches)]
    size = np.array([len(piece) for piece in pieces], np.int64).reshape(-1, branches + 1)
    rows, starts = _place(size.sum(1), row_length, most)
    in_row = _rank_in_row(rows, starts)
    piece_place = (rows * row_length + starts)[:, None] + np.cumsum(size, 1) - size
    piece_branch = np.arange(branches + 1)
    piece_position = np.where(piece_branch == 0, 0, size[:, :1])
    piece_sequence = in_row[:, None] * branches + piece_branch - 1
    prompt_last = piece_place[:, :1] + size[:, :1] - 1

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(np.broadcast_to(values, size.shape).ravel(), size.ravel())

    tokens = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
    within = np.arange(len(tokens)) - np.repeat(np.cumsum(size) - size.ravel(), size.ravel())
    place, branch = spread(piece_place) + within, spread(piece_branch)
    source = np.where(within == 0, spread(prompt_last), place - 1)
    count = int(rows.max()) + 1
    arrays = _empty_rows(count, row_length)
    arrays["branch_ids"] = np.zeros((count, row_length), np.int32)
    arrays["tokens"].reshape(-1)[place] = tokens
    arrays["positions"].reshape(-1)[place] = spread(piece_position) + within
    arrays["segment_ids"].reshape(-1)[place] = spread(in_row[:, None] + 1)
    arrays["branch_ids"].reshape(-1)[place] = branch
    reply = branch > 0
    sequence = spread(piece_sequence)[reply]
    said = _mark_said(groups, size, len(tokens))
    _add_targets(arrays, place[reply], source[reply], tokens[reply], sequence, said[reply])

    per_row = int(in_row.max()) + 1
    arrays["last"] = np.zeros((count, per_row, branches), np.int32)
    arrays["lengths"] = np.zeros((count, per_row, branches), np.int32)
    arrays["valid"] = np.zeros((count, per_row), np.float32)
    arrays["example_ids"] = np.full((count, per_row), -1, np.int32)
    arrays["last"][rows, in_row] = (piece_place + size - 1)[:, 1:] % row_length
    arrays["lengths"][rows, in_row] = size[:, 1:]
    arrays["valid"][rows, in_row] = 1
    arrays["example_ids"][rows, in_row] = [group.example for group in groups]
    return arrays, _stats(arrays, len(groups))


def pack_stream(tokens: Sequence[int], row_length: int) -> tuple[Arrays, Stats]:
    """Cuts one long stream into consecutive rows; every token but the first is a target once.

    A row's last target is the next row's first token. This is for evaluation; training takes
    `batches.make_windows`.
    """
    stream = np.asarray(tokens, np.int32)
    if len(stream) < 2:
        raise UserError(f"a stream of {len(stream)} tokens has nothing to predict")
    inputs, targets = stream[:-1], stream[1:]
    count = -(-len(inputs) // row_length)
    arrays = _empty_rows(count, row_length)
    place = np.arange(len(inputs))
    arrays["tokens"].reshape(-1)[place] = inputs
    arrays["positions"].reshape(-1)[place] = place % row_length
    arrays["segment_ids"].reshape(-1)[place] = np.ones(len(inputs), np.int32)
    _add_targets(arrays, place, place, targets)
    return arrays, _stats(arrays, 1)


def check_ids(arrays: Arrays, vocab_size: int) -> None:
    """UserError if a token or target id lies outside [0, vocab_size).

    On the device an embedding gather would clamp it silently.
    """
    for name in ("tokens", "targets"):
        low, high = int(arrays[name].min(initial=0)), int(arrays[name].max(initial=0))
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"token id {bad} is outside the model's vocabulary of {vocab_size}: "
                "the data was encoded with another tokenizer"
            )


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """sha256 of the names, shapes, dtypes and contents of packed data or of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {np.dtype(array.dtype).str} {array.shape}\n".encode())
        for piece in pieces(array):
            flat = np.ascontiguousarray(piece).reshape(-1)
            digest.update(flat.view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def _place(
    lengths: np.ndarray, row_length: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row and start index of each item, by best-fit decreasing, ties by order.

    A row has at most `most` items, where that is given.

    Free rows are kept in a bucket per remaining length; a bit mask of the buckets in use finds the
    tightest one that fits in one operation.
    """
    if not len(lengths):
        raise UserError("no examples are left to pack")
    if lengths.min() < 1:
        raise ValueError(f"item {int(lengths.argmin())} has no tokens")
    if lengths.max() > row_length:
        raise UserError(
            f"item {int(lengths.argmax())} has {int(lengths.max())} tokens and does not fit a row "
            f"of {row_length}; raise the row length or name an over_long policy"
        )
    buckets: list[list[int]] = [[] for _ in range(row_length + 1)]
    in_use, count = 0, 0
    held: list[int] = []  # items of each row
    rows, starts = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = in_use >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = buckets[free].pop()
            if not buckets[free]:
                in_use ^= 1 << free
        else:
            free, row = row_length, count
            held.append(0)
            count += 1
        rows[item], starts[item] = row, row_length - free
        held[row] += 1
        if free > length and held[row] != most:
            buckets[free - length].append(row)
            in_use |= 1 << (free - length)
    return rows, starts


def _mark_said(groups: Sequence[Group], size: np.ndarray, count: int) -> np.ndarray:
    """[count] f32 of the pieces' tokens in order: 0 where a branch was given them, else 1."""
    said = np.ones(count, np.float32)
    starts = (np.cumsum(size) - size.ravel()).reshape(size.shape)
    for group, start in zip(groups, starts[:, 1:], strict=True):
        for begin, places in zip(start, group.given, strict=False):
            for place in places:
                said[begin + place.start : begin + place.stop] = 0
    return said


def _rank_in_row(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """0, 1, … for the entries of each row, in ascending `order`."""
    by_row = np.lexsort((order, rows))
    first = np.searchsorted(rows[by_row], rows[by_row], side="left")
    ranks = np.empty(len(rows), np.int64)
    ranks[by_row] = np.arange(len(rows)) - first
    return ranks


def _empty_rows(count: int, row_length: int) -> Arrays:
    names = ("tokens", "positions", "segment_ids")
    rows = {name: np.zeros((count, row_length), np.int32) for name in names}
    return rows | {"row_ids": np.arange(count, dtype=np.int32)}


def _add_targets(
    arrays: Arrays,
    place: np.ndarray,
    source: np.ndarray,
    targets: np.ndarray,
    sequences: np.ndarray | None = None,
    weights: np.ndarray | float = 1,
) -> None:
    """Adds the target arrays; `place` and `source` index the flattened rows."""
    count, row_length = arrays["tokens"].shape
    rows = place // row_length
    slots = _rank_in_row(rows, place)
    used = int(slots.max(initial=-1)) + 1
    width = max(SLOT_MULTIPLE, -(-used // SLOT_MULTIPLE) * SLOT_MULTIPLE)
    columns = {"sources": source % row_length, "targets": targets}
    if sequences is not None:
        columns["sequences"] = sequences
    for name, values in columns.items():
        arrays[name] = np.zeros((count, width), np.int32)
        arrays[name][rows, slots] = values
    arrays["weights"] = np.zeros((count, width), np.float32)
    arrays["weights"][rows, slots] = weights


def _stats(arrays: Arrays, items: int) -> Stats:
    used = arrays["segment_ids"] > 0
    return {
        "rows": len(used),
        "packed": items,
        "tokens": int(used.sum()),
        "targets": int(np.count_nonzero(arrays["weights"])),
        "padding": 1 - float(used.mean()),
    }
