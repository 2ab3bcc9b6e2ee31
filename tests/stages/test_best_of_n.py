"""Which prompts the best-of-n stage trains on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.stages import best_of_n, defaults
from rlhf_jax.tasks.prompts import PromptSet
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


def test_a_tenth_of_every_source_is_held_out(monkeypatch):
    first, second = range(100, 150), range(200, 250)  # tokens by which a prompt is known
    prompts = PromptSet([None] * 100, [[token] for token in (*first, *second)])
    answers = SimpleNamespace(
        prompts=prompts,
        finished=np.ones(100, bool),
        completions=[SimpleNamespace(tokens=[1])] * 100,
    )
    scores = SimpleNamespace(valid=np.ones(100, bool), total=np.zeros(100))
    monkeypatch.setattr(best_of_n, "_blocks", lambda *_: iter([(answers, scores)]))
    config = defaults.resolve(defaults.best_of_n(best_of_n={"n": 1}, data={"row_length": 64}))

    def split():
        parts = best_of_n.winners(config, None, prompts, None)
        return [{*part["tokens"].ravel().tolist()} - {0, 1} for part in parts]

    train, held_out = split()
    assert [len(held_out & {*source}) for source in (first, second)] == [5, 5]
    assert not train & held_out and train | held_out == {*first, *second}
    assert split() == [train, held_out]
