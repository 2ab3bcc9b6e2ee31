"""JSON files are read strictly, and what they must hold is compared."""

from __future__ import annotations

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.files import check_fields, parse_object, read_object

FIELDS = {"name": str, "seconds": int | float, "parents": {"role": str}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"null", "not a NoneType"),
        (b'{"a": 1, "b": 2, "a": 1}', "names 'a' twice"),
        (b'{"a": [{"b": 1, "\\u0062": 2}]}', "names 'b' twice"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        parse_object(text)
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.json .*{said}"):
        read_object(tmp_path / "x.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*x\.json: No such file"):
        read_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"more": []}, None),
        ({"seconds": 1, "parents": {}}, None),
        ({"seconds": "1"}, "seconds is of another type"),
        ({"name": None}, "name is of another type"),
        ({"parents": []}, "parents is of another type"),
        ({"parents": {"policy": 1}}, "parents is of another type"),
    ],
)
def test_fields_are_of_their_types(tmp_path, changes, said):
    value = {"name": "x", "seconds": 0.5, "parents": {"policy": "y"}} | changes
    for required in (True, False):
        if said is None:
            check_fields(tmp_path, value, FIELDS, required=required)
            continue
        with pytest.raises(UserError, match=said):
            check_fields(tmp_path, value, FIELDS, required=required)


def test_fields_may_be_missing_only_where_they_may(tmp_path):
    check_fields(tmp_path, {}, FIELDS, required=False)
    with pytest.raises(UserError, match="it has no name"):
        check_fields(tmp_path, {}, FIELDS)
