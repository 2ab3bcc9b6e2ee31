"""The constitution that comes with the package, and what is said of one that is none."""

from __future__ import annotations

import json

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.judges.constitution import DEFAULT, Principle, choose, read_constitution

ONE = {"name": "kind", "question": "Which?", "critique": "What?", "revision": "Again."}


def test_the_packaged_one_stands_for_every_component_of_the_town():
    from rlhf_jax.tasks.town.gold import WEIGHTS

    principles = read_constitution(DEFAULT)
    assert [each.gold for each in principles] == ["total", *WEIGHTS]
    assert choose(principles, "") == principles
    assert [each.name for each in choose(principles, "safe, polite,safe")] == ["safe", "polite"]
    with pytest.raises(UserError, match="there is no 'save'; did you mean 'safe'"):
        choose(principles, "save")


def test_gold_may_be_unknown(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"principles": [ONE]}))
    assert read_constitution(tmp_path / "mine.json") == [Principle(**ONE, gold="")]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "mine.json"),
        ({"principles": []}, "a list of one at least"),
        ({"principles": [ONE], "more": 1}, "a list of one at least"),
        ({"principles": ["be kind"]}, r"principles\[0\] is no object"),
        ({"principles": [ONE, ONE]}, "two principles are named 'kind'"),
        ({"principles": [ONE | {"critic": "x"}]}, "'critic'; did you mean 'critique'"),
        ({"principles": [ONE | {"question": " "}]}, "'question' must be a text"),
        ({"principles": [ONE | {"gold": None}]}, "'gold' must be a text"),
        ({"principles": [{"name": "kind"}]}, "lacks the field 'question'"),
    ],
)
def test_another_file_is_named_in_one_line(tmp_path, document, said):
    (tmp_path / "mine.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=said) as caught:
        read_constitution(tmp_path / "mine.json")
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)
