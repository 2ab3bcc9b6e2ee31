"""The input pipeline: order from (seed, step), exact resume and mixing, nothing dropped."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest

from rlhf_jax.data.batches import (
    concatenate_rows,
    eval_batches,
    make_dataset,
    make_iterator,
    make_windows,
)
from rlhf_jax.data.packing import Document, Group, pack_documents, pack_groups
from rlhf_jax.errors import UserError


def rows(count: int, length: int = 8, first: int = 0):
    documents = [Document([first + i] * length, [0] + [1] * (length - 1)) for i in range(count)]
    return pack_documents(documents, length)[0]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_each_row_once_an_epoch_in_a_new_order():
    dataset = make_dataset(rows(12), 4, seed=0)
    epochs = [[i for s in range(3) for i in dataset[3 * e + s]["row_ids"]] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(12))


def test_batches_hold_the_rows_they_name():
    arrays = rows(10)
    batch = make_dataset(arrays, 4, seed=3)[5]
    assert_same(batch, {name: array[batch["row_ids"]] for name, array in arrays.items()})


def test_neighbouring_seeds_do_not_share_epochs():
    """Were epochs seeded with seed + epoch, seed 1 would replay seed 0 one epoch later."""
    first, second = (make_dataset(rows(64), 64, seed=s) for s in (0, 1))
    orders = {tuple(d[e]["row_ids"]) for d in (first, second) for e in range(3)}
    assert len(orders) == 6


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_resume_at_any_step_is_exact(stop):
    sources = [rows(9), rows(5, first=20)]

    def iterator():
        return make_iterator(make_dataset(sources, 4, seed=1, weights=[2, 1]))

    whole = iterator()
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(5)]
    resumed = iterator()
    resumed.set_state(state)
    for batch in expected:
        assert_same(next(resumed), batch)


def test_random_access_equals_iteration():
    dataset = make_dataset(rows(7), 3, seed=2)
    iterator = make_iterator(dataset)
    for step in range(10):
        assert_same(next(iterator), dataset[step])


def test_mixing_proportions_are_exact():
    dataset = make_dataset([rows(8), rows(50, first=100)], 8, seed=0, weights=[3, 1])
    ids = np.concatenate([dataset[s]["row_ids"] for s in range(16)])
    assert np.sum(ids < 8) == 96 and np.sum(ids >= 8) == 32
    counts = Counter(ids[ids < 8].tolist())
    assert set(counts.values()) == {12}, "each row of a source once an epoch of that source"


def test_concatenated_rows_keep_contents_and_widen_slots():
    pair = Group([1, 2], ([3, 4], [5]), 0)
    first, _ = pack_groups([pair, pair], 10, branches=2)
    second, _ = pack_groups([Group([1], (range(9), range(10)), 0)] * 3, 20, branches=2)
    with pytest.raises(UserError, match="one row length"):
        concatenate_rows([first, second])
    first, _ = pack_groups([pair, pair], 20, branches=2)
    both = concatenate_rows([first, second])
    assert both["row_ids"].tolist() == [0, 1, 2, 3]
    assert both["targets"].shape == (4, 24) and both["valid"].shape == (4, 2)
    assert both["valid"].tolist() == [[1, 1], [1, 0], [1, 0], [1, 0]]
    assert both["example_ids"][1].tolist() == [0, -1]
    assert both["weights"].sum() == 6 + 57
    assert_same({"targets": both["targets"][:1, :8]}, {"targets": first["targets"]})


def test_eval_batches_pad_the_last_one_with_empty_rows():
    arrays, _ = pack_groups([Group([1], ([2], [3]), i) for i in range(5)], 3, branches=2)
    batches = list(eval_batches(arrays, 4))
    assert [len(b["row_ids"]) for b in batches] == [4, 4]
    assert np.concatenate([b["row_ids"] for b in batches]).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    for name in ("weights", "segment_ids", "valid", "lengths", "tokens"):
        assert not batches[1][name][1:].any()
    assert (batches[1]["example_ids"][1:] == -1).all()


def test_windows_predict_the_next_token():
    stream = np.arange(100)
    dataset = make_windows(stream, 8, 4, seed=0)
    batch = dataset[3]
    assert batch["tokens"].shape == (4, 8)
    np.testing.assert_array_equal(batch["tokens"], batch["row_ids"][:, None] + np.arange(8))
    predicted_from = np.take_along_axis(batch["tokens"], batch["sources"], 1)
    np.testing.assert_array_equal(batch["targets"], predicted_from + 1)
    assert batch["weights"].sum() == 32 and (batch["segment_ids"] == 1).all()


def test_windows_cover_the_stream_evenly_and_depend_on_the_seed():
    batches = [make_windows(np.arange(24), 8, 1600, seed=s)[0] for s in (0, 0, 1)]
    assert_same(batches[0], batches[1])
    assert not np.array_equal(batches[0]["row_ids"], batches[2]["row_ids"])
    counts = np.bincount(batches[0]["row_ids"])
    assert len(counts) == 16 and np.sum((counts - 100) ** 2 / 100) < 37.7  # χ²₁₅ at p = 0.001


def test_window_rows_do_not_depend_on_the_batch_size():
    small, large = (make_windows(np.arange(99), 8, b, seed=5) for b in (2, 6))
    ids = np.concatenate([small[s]["row_ids"] for s in range(3)])
    assert ids.tolist() == large[0]["row_ids"].tolist()


def test_windows_resume():
    iterators = [make_iterator(make_windows(np.arange(99), 8, 2, seed=5)) for _ in range(2)]
    for _ in range(6):
        next(iterators[0])
    iterators[1].set_state(iterators[0].get_state())
    assert_same(next(iterators[0]), next(iterators[1]))


def test_errors():
    with pytest.raises(UserError, match="3 packed rows are fewer than a batch of 4"):
        make_dataset(rows(3), 4, seed=0)
    with pytest.raises(UserError, match="weights > 0"):
        make_dataset([rows(3), rows(3)], 2, seed=0, weights=[1, 0])
    with pytest.raises(UserError, match="weights > 0"):
        make_dataset([rows(3), rows(3)], 2, seed=0, weights=[1])
    with pytest.raises(UserError, match="no data source"):
        make_dataset([], 2, seed=0)
    with pytest.raises(UserError, match="no window"):
        make_windows(np.arange(8), 8, 1, seed=0)


def test_a_batch_costs_under_two_milliseconds():
    iterator = make_iterator(make_dataset(rows(500, 256), 32, seed=0))
    times = []
    for _ in range(60):
        start = time.thread_time()
        next(iterator)
        times.append(time.thread_time() - start)
    assert np.median(times) < 2e-3


def test_a_batch_may_be_one_row():
    rows = {"tokens": np.arange(3)[:, None], "row_ids": np.arange(3)}
    iterator = make_iterator(make_dataset(rows, 1, seed=0))
    assert sorted(int(next(iterator)["row_ids"][0]) for _ in range(3)) == [0, 1, 2]
