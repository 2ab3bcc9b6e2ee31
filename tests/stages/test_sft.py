"""What is wrong with an SFT run's evaluation is said before it trains."""

from __future__ import annotations

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.stages import defaults, sft
from tests.chat_model import make_chat_model


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"source": "broken.jsonl"}, "invalid JSON"),
        ({"max_new_tokens": 64}, "leaves no held-out prompt room"),
        ({"max_new_tokens": 40}, r"chats.jsonl:1.*with what opens it.*eval\.max_new_tokens = 40"),
    ],
)
def test_a_mistake_in_the_evaluation_costs_no_training(tmp_path, monkeypatch, evaluation, message):
    monkeypatch.chdir(tmp_path)
    make_chat_model(tmp_path / "start")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "Who?", "completion": "I."}\n' * 4)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": \n')
    (tmp_path / "mine.py").write_text(
        "class Env:\n"
        "    def reset(self, row, seed):\n"
        "        return [{'role': 'system', 'content': 'Be kind. ' * 4}, *row['prompt']]\n"
        "    def step(self, text):\n"
        "        return [], 0.0, True\n"
    )
    config = defaults.base(
        "sft",
        environment={"file": "mine.py:Env"},
        init={"policy": "start"},
        data={"train": "chats.jsonl", "validation": "chats.jsonl", "row_length": 64},
        eval={"source": "chats.jsonl", "count": 2, "max_new_tokens": 8} | evaluation,
        batch={"rows": 1},
    )
    monkeypatch.setattr(sft, "fit", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(UserError, match=message):
        sft.run(defaults.resolve(config), None, {"policy": tmp_path / "start"})
