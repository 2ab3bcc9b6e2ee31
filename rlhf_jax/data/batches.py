"""Batches of packed rows through Grain; their order is a function of (seed, step) alone.

`make_dataset(…)[step]` is batch `step`, whatever came before it; `make_iterator` walks over them
and its `get_state()` is a JSON-serialisable dict from which `set_state` continues exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.errors import UserError

_GROUP_AXES = ("last", "lengths", "valid", "example_ids", "reference_logprobs", "labels", "votes")
_SLOT_AXES = ("sources", "targets", "weights", "sequences")
_ENDLESS = 2**62  # rows; batches of one must still be countable
_UNUSED = {"row_ids": -1, "example_ids": -1}


def make_dataset(
    sources: Arrays | Sequence[Arrays],
    batch_size: int,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
) -> grain.MapDataset:
    """An endless data set of shuffled batches [batch_size, …].

    Each source is shuffled anew in every epoch, in which it yields each of its rows once. Several
    sources are mixed row by row in the proportions `weights` (equal where None); their rows are
    numbered (`row_ids`) in the order of `concatenate_rows`.
    """
    sources = [sources] if isinstance(sources, dict) else list(sources)
    if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
        raise UserError(f"mixing {len(sources)} sources needs as many weights > 0, not {weights}")
    arrays = concatenate_rows(sources)
    rows = len(arrays["row_ids"])
    if rows < batch_size:
        raise UserError(f"{rows} packed rows are fewer than a batch of {batch_size}")
    counts = [len(source["row_ids"]) for source in sources]
    firsts = np.cumsum(counts) - counts
    order = functools.lru_cache(maxsize=2 * len(sources))(functools.partial(_epoch_order, seed))

    def take(draws: Sequence[int]) -> Arrays:
        """Draw d is the (d // S)-th row that source d % S of S gives."""
        nth, source = np.divmod(np.asarray(draws), len(sources))
        index = np.empty(len(draws), np.int64)
        for i, count in enumerate(counts):
            epoch, place = np.divmod(nth, count)
            for e in np.unique(epoch[source == i]):
                chosen = (source == i) & (epoch == e)
                index[chosen] = firsts[i] + order(i, int(e), count)[place[chosen]]
        return {name: array[index] for name, array in arrays.items()}

    # Grain's own shuffle takes 0.1 ms per row on small sets; only mixing and batching are Grain's.
    draws = [grain.MapDataset.range(i, _ENDLESS, len(sources)) for i in range(len(sources))]
    mixed = draws[0] if len(draws) == 1 else grain.MapDataset.mix(draws, weights)
    return mixed.batch(batch_size, batch_fn=take)


def make_windows(
    tokens: Sequence[int], row_length: int, batch_size: int, *, seed: int
) -> grain.MapDataset:
    """An endless data set of random windows of one long stream, as nanoGPT trains on.

    Row i of the endless sequence starts where a hash of (seed, i) says, and each of its tokens
    predicts the next one of the stream. `row_ids` holds the start of each window.
    """
    stream = np.asarray(tokens, np.int32)
    starts_count = len(stream) - row_length
    if starts_count < 1:
        raise UserError(f"a stream of {len(stream)} tokens has no window of {row_length} + 1")
    span = np.arange(row_length, dtype=np.int32)

    def take(indices: Sequence[int]) -> Arrays:
        starts = (random_bits(indices, seed) % np.uint64(starts_count)).astype(np.int32)
        places = starts[:, None] + span
        shape = places.shape
        return {
            "tokens": stream[places],
            "positions": np.broadcast_to(span, shape).copy(),
            "segment_ids": np.ones(shape, np.int32),
            "sources": np.broadcast_to(span, shape).copy(),
            "targets": stream[places + 1],
            "weights": np.ones(shape, np.float32),
            "row_ids": starts,
        }

    return grain.MapDataset.range(_ENDLESS).batch(batch_size, batch_fn=take)


def make_iterator(dataset: grain.MapDataset) -> grain.DatasetIterator:
    """Walks over a data set's batches; has `get_state()` and `set_state(state)`."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(read_options=options))


def eval_batches(arrays: Arrays, batch_size: int) -> Iterator[Arrays]:
    """Every row once, in order, in batches of one shape; the last is filled with empty rows."""
    count = len(arrays["row_ids"])
    for start in range(0, count, batch_size):
        batch = {name: array[start : start + batch_size] for name, array in arrays.items()}
        missing = batch_size - len(batch["row_ids"])
        yield {name: _pad(name, array, 0, missing) for name, array in batch.items()}


def pad_rows(arrays: Arrays, *, rows: int, slots: int, groups: int) -> Arrays:
    """Pads rows, target slots and group places to multiples, so that few shapes are compiled."""
    padded = {}
    for name, array in arrays.items():
        if name in _SLOT_AXES + _GROUP_AXES:
            multiple = slots if name in _SLOT_AXES else groups
            array = _pad(name, array, 1, -array.shape[1] % multiple)
        padded[name] = _pad(name, array, 0, -len(array) % rows)
    return padded


def concatenate_rows(sources: Sequence[Arrays]) -> Arrays:
    """All rows of several packed sets, numbered anew, slots and groups padded to the widest."""
    if not sources:
        raise UserError("no data source was given")
    names = sources[0].keys()
    for source in sources[1:]:
        if source.keys() != names or source["tokens"].shape[1:] != sources[0]["tokens"].shape[1:]:
            raise UserError("sources to be mixed must have one kind of rows and one row length")
    arrays = {}
    for name in names:
        columns = [source[name] for source in sources]
        if name in _SLOT_AXES + _GROUP_AXES:
            width = max(column.shape[1] for column in columns)
            columns = [_pad(name, column, 1, width - column.shape[1]) for column in columns]
        arrays[name] = np.concatenate(columns) if len(columns) > 1 else columns[0]
    arrays["row_ids"] = np.arange(len(arrays["tokens"]), dtype=np.int32)
    return arrays


def _pad(name: str, array: np.ndarray, axis: int, count: int) -> np.ndarray:
    if not count:
        return array
    widths = [(0, count if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths, constant_values=_UNUSED.get(name, 0))


def _epoch_order(seed: int, source: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of a source's `count` rows in an epoch."""
    return np.argsort(random_bits(range(count), seed, source, epoch), kind="stable")


def random_bits(indices: Sequence[int], *key: int) -> np.ndarray:
    """64 random bits for each index: uint64, the same for the same key on any machine."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part % 2**64))
    return _splitmix64(state + np.asarray(indices, np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Mixes 64-bit integers: Fast Splittable Pseudorandom Number Generators (Steele et al. 2014).

    https://doi.org/10.1145/2660193.2660195
    """
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
