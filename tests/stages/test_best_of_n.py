"""Which prompts the best-of-n stage trains on."""

from __future__ import annotations

import pytest

from rlhf_jax.stages import best_of_n, defaults
from tests.chat_model import make_chat_model


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("a.jsonl", {"a": 10}),
        ("a.jsonl=1,b.jsonl=9", {"a": 1, "b": 9}),
        ("a.jsonl=1,b.jsonl=1,a.jsonl[:5]=1", {"a": 3 + 3, "b": 4}),
    ],
)
def test_sources_are_taken_by_their_weights(tmp_path, monkeypatch, train, expected):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        lines = (f'{{"prompt": "{name}{i}"}}\n' for i in range(20))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = defaults.best_of_n(
        data={"train": train, "validation": "a.jsonl"}, best_of_n={"prompts": 10}
    )
    taken = best_of_n.training_prompts(defaults.resolve(config), make_chat_model(tmp_path / "m"))
    texts = [record.messages[-1].content for record in taken.records]
    assert {name: sum(text[0] == name for text in texts) for name in expected} == expected
    assert texts[0] == "a0"


def test_a_source_with_fewer_prompts_than_asked_for_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 3)
    config = defaults.best_of_n(
        data={"train": "a.jsonl", "validation": "a.jsonl"}, best_of_n={"prompts": 10}
    )
    taken = best_of_n.training_prompts(defaults.resolve(config), make_chat_model(tmp_path / "m"))
    assert len(taken.records) == 3
    assert "a.jsonl: 3 prompts, all there are of 10 asked for" in capsys.readouterr().out
