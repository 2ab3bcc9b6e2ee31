"""Packing against a naive construction: nothing lost, positions restart, no target crosses over."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.packing import (
    Document,
    Group,
    check_ids,
    fingerprint,
    pack_documents,
    pack_groups,
    pack_stream,
)
from rlhf_jax.errors import UserError


def random_documents(rng, count, longest):
    for _ in range(count):
        n = int(rng.integers(1, longest + 1))
        is_target = [0, *rng.integers(0, 2, n - 1).tolist()]
        yield Document(rng.integers(0, 50, n).tolist(), is_target)


def random_groups(rng, count, longest, branches):
    for example in range(count):
        sizes = rng.integers(1, longest + 1, branches + 1)
        prompt, *replies = [rng.integers(0, 50, n).tolist() for n in sizes]
        yield Group(prompt, tuple(replies), 100 + example)


def unpack_documents(arrays):
    """Reads documents back from the rows, one token at a time."""
    for row in range(len(arrays["tokens"])):
        used = arrays["weights"][row] > 0
        targets = dict(zip(arrays["sources"][row][used], arrays["targets"][row][used], strict=True))
        segments = arrays["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(places, np.arange(places[0], places[-1] + 1))
            np.testing.assert_array_equal(arrays["positions"][row][places], np.arange(len(places)))
            tokens = arrays["tokens"][row][places].tolist()
            is_target = [0] * len(places)
            for i in range(len(places) - 1):
                if places[i] in targets:
                    assert targets.pop(places[i]) == tokens[i + 1]
                    is_target[i + 1] = 1
            yield Document(tokens, is_target)
        assert not targets, "a target whose source is no token before it in its document"


def key(document):
    return (tuple(document.tokens), tuple(document.is_target))


@pytest.mark.parametrize("seed", range(5))
def test_every_document_comes_back_exactly_once(seed):
    rng = np.random.default_rng(seed)
    documents = list(random_documents(rng, 60, 30))
    arrays, stats = pack_documents(documents, 32)
    assert sorted(map(key, unpack_documents(arrays))) == sorted(map(key, documents))
    assert stats["packed"] == 60 and stats["rows"] == len(arrays["tokens"])
    assert stats["tokens"] == sum(len(d.tokens) for d in documents)
    assert stats["targets"] == sum(sum(d.is_target) for d in documents)
    assert stats["padding"] == pytest.approx(1 - stats["tokens"] / (32 * stats["rows"]))


def test_hand_packed_row():
    documents = [Document([1, 7, 2], [0, 1, 1]), Document([1, 8, 9, 2], [0, 0, 1, 1])]
    arrays, _ = pack_documents(documents, 8)
    expected = {
        "tokens": [[1, 8, 9, 2, 1, 7, 2, 0]],
        "positions": [[0, 1, 2, 3, 0, 1, 2, 0]],
        "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0]],
        "sources": [[1, 2, 4, 5, 0, 0, 0, 0]],
        "targets": [[9, 2, 7, 2, 0, 0, 0, 0]],
        "weights": [[1, 1, 1, 1, 0, 0, 0, 0]],
        "row_ids": [0],
    }
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)


def test_pad_and_end_tokens_count_like_any_other():
    """The mask comes from lengths: a document of pad ids (0) keeps all its targets."""
    arrays, stats = pack_documents([Document([0, 0, 0], [0, 1, 1])], 8)
    assert stats["targets"] == 2 and stats["tokens"] == 3
    assert arrays["segment_ids"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_slots_are_a_multiple_of_eight():
    arrays, _ = pack_documents([Document(range(10), [0] + [1] * 9)], 16)
    assert arrays["targets"].shape == (1, 16)
    arrays, _ = pack_documents([Document([5], [0])], 16)
    assert arrays["targets"].shape == (1, 8) and not arrays["weights"].any()


def test_best_fit_fills_rows_exactly():
    sizes = [6, 5, 4, 3, 2, 4]
    documents = [Document([i] * n, [0] * n) for i, n in enumerate(sizes)]
    arrays, stats = pack_documents(documents, 8)
    assert stats["rows"] == 3 and stats["padding"] == 0
    assert arrays["tokens"].tolist() == [
        [0] * 6 + [4] * 2,
        [1] * 5 + [3] * 3,
        [2] * 4 + [5] * 4,
    ]


def test_thousands_of_documents():
    rng = np.random.default_rng(0)
    documents = [Document(range(n), [0] * n) for n in rng.integers(10, 200, 5000).tolist()]
    _, stats = pack_documents(documents, 512)
    assert stats["padding"] < 0.02


def test_packing_is_deterministic():
    documents = list(random_documents(np.random.default_rng(3), 50, 20))
    first, second = (pack_documents(documents, 32)[0] for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    second["tokens"][0, 0] += 1
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize(("branches", "seed"), [(1, 0), (2, 1), (2, 2), (4, 3)])
def test_groups_come_back(branches, seed):
    groups = list(random_groups(np.random.default_rng(seed), 40, 9, branches))
    arrays, stats = pack_groups(groups, 48, branches=branches)
    by_example = {group.example: group for group in groups}
    seen = []
    for row, place in zip(*np.nonzero(arrays["valid"]), strict=True):
        group = by_example[int(arrays["example_ids"][row, place])]
        seen.append(group.example)
        check_group(arrays, row, place, group)
    assert sorted(seen) == sorted(by_example)
    assert stats["packed"] == 40
    assert stats["targets"] == sum(len(b) for g in groups for b in g.branches)
    assert (arrays["example_ids"][arrays["valid"] == 0] == -1).all()
    assert not arrays["lengths"][arrays["valid"] == 0].any()


def check_group(arrays, row, place, group):
    """Prompt + branch k, read from the rows under the attention rule, is the original sequence."""
    column = {name: arrays[name][row] for name in arrays}
    branch_count = len(group.branches)
    for k, branch in enumerate(group.branches):
        inside = (column["segment_ids"] == place + 1) & np.isin(column["branch_ids"], (0, k + 1))
        assert column["tokens"][inside].tolist() == [*group.prompt, *branch]
        n = len(group.prompt) + len(branch)
        assert column["positions"][inside].tolist() == list(range(n))
        assert column["lengths"][place, k] == len(branch)
        assert column["last"][place, k] == np.flatnonzero(inside)[-1]
        slots = (column["sequences"] == place * branch_count + k) & (column["weights"] > 0)
        assert column["targets"][slots].tolist() == list(branch)
        visible = np.flatnonzero(inside)
        expected = visible[len(group.prompt) - 1 : -1]
        assert column["sources"][slots].tolist() == expected.tolist()


def test_hand_packed_group():
    arrays, _ = pack_groups([Group([1, 4, 5], ([7, 2], [8, 9, 2]), 3)], 10, branches=2)
    expected = {
        "tokens": [[1, 4, 5, 7, 2, 8, 9, 2, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0]],
        "segment_ids": [[1] * 8 + [0] * 2],
        "branch_ids": [[0, 0, 0, 1, 1, 2, 2, 2, 0, 0]],
        "sources": [[2, 3, 2, 5, 6, 0, 0, 0]],
        "targets": [[7, 2, 8, 9, 2, 0, 0, 0]],
        "weights": [[1, 1, 1, 1, 1, 0, 0, 0]],
        "sequences": [[0, 0, 1, 1, 1, 0, 0, 0]],
        "last": [[[4, 7]]],
        "lengths": [[[2, 3]]],
        "valid": [[1]],
        "example_ids": [[3]],
        "row_ids": [0],
    }
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.dtype == (np.float32 if name in ("weights", "valid") else np.int32)


def test_stream_rows_predict_every_token_once():
    arrays, stats = pack_stream(range(20), 8)
    assert stats["rows"] == 3 and stats["targets"] == 19
    used = arrays["weights"] > 0
    assert arrays["targets"][used].tolist() == list(range(1, 20))
    sources = np.take_along_axis(arrays["tokens"], arrays["sources"], 1)[used]
    assert sources.tolist() == list(range(19))
    assert arrays["positions"][1].tolist() == list(range(8))


def test_errors():
    with pytest.raises(UserError, match="no examples"):
        pack_documents([], 8)
    with pytest.raises(UserError, match="item 1 has 9 tokens"):
        pack_documents([Document([1], [0]), Document([1] * 9, [0] * 9)], 8)
    with pytest.raises(ValueError, match="0 at index 0"):
        pack_documents([Document([1, 2], [1, 1])], 8)
    with pytest.raises(ValueError, match="no tokens"):
        pack_documents([Document([1], [0]), Document([], [])], 8)
    with pytest.raises(ValueError, match="2 branches"):
        pack_groups([Group([1], ([2],), 0)], 8, branches=2)
    with pytest.raises(ValueError, match="empty"):
        pack_groups([Group([1], ([2], []), 0)], 8, branches=2)
    with pytest.raises(UserError, match="nothing to predict"):
        pack_stream([1], 8)


def test_ids_outside_the_vocabulary_are_an_error():
    arrays, _ = pack_documents([Document([1, 50], [0, 1])], 8)
    check_ids(arrays, 51)
    with pytest.raises(UserError, match="token id 50 is outside the model's vocabulary of 50"):
        check_ids(arrays, 50)
    arrays["targets"][0, 0] = -1
    with pytest.raises(UserError, match="token id -1"):
        check_ids(arrays, 51)
