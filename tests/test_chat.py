"""Talking to a model: what is streamed is what it says, and histories do not mix."""

from __future__ import annotations

import pytest

from rlhf_jax.chat import Speaker, converse, main
from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.held_out_answers import answer
from rlhf_jax.training.saved_model import load_model
from tests.test_export import saved

OPTIONS = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0}


@pytest.fixture(name="run")
def _run(tmp_path):
    return saved(tmp_path, "tiny", max_length=256)[0]


def speaker(run, **options):
    return Speaker("it", load_model(run), "", OPTIONS | options)


def test_what_is_streamed_is_the_answer(run):
    it, pieces = speaker(run, max_new_tokens=40, temperature=1.0), []
    reply = it.answer("What is 12 + 30?", 0, pieces.append)
    assert "".join(pieces) == reply and len(pieces) > 2
    assert it.messages == [Message("user", "What is 12 + 30?"), Message("assistant", reply)]


def test_a_second_message_sees_the_first(run):
    it = speaker(run)
    first = it.answer("One", 0, str)
    second = it.answer("Two", 1, str)
    turns = (Message("user", "One"), Message("assistant", first), Message("user", "Two"))
    (wanted,) = answer(
        it.model, [Prompt("0", turns)], max_new_tokens=12, temperature=0.0, tokens=256
    )
    assert second == wanted.text
    it.start_over()
    assert it.answer("One", 0, str) == first


def test_a_conversation_that_is_too_long_says_so(run):
    it, written = speaker(run), []
    words = iter(["lazy dog " * 400, "/new", "", "One", "/quit", "never"])
    converse([it], lambda: next(words), written.append)
    assert "start over with /new" in written[0]
    assert [m.role for m in it.messages] == ["user", "assistant"]
    assert len(render_prompt(it.messages[:1], it.model.tokenizer)) < 256


def test_the_command(run, monkeypatch, capsys):
    words = iter(["One", "Two"])

    def read(prompt):
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main([f"--workdir={run}", "--max-new-tokens=4", "--temperature=0"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    words = iter(["One"])
    assert main([f"--workdir={run}", f"--compare={run}", "--max-new-tokens=4"]) == 0
    assert "run" in capsys.readouterr().out
    words = iter(["One"])
    assert main([f"--workdir={run}", "--top-p=2"]) == 0  # says what is wrong, and goes on
    assert "top_p = 2" in capsys.readouterr().out
    assert main([f"--workdir={run}/nowhere"]) == 2
