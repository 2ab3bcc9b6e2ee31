"""Answers of a model that is not trained: sampled once, and again wherever anything differs."""

from __future__ import annotations

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation import held_out_answers
from rlhf_jax.evaluation.held_out_answers import answer, kept_answers
from tests.chat_model import make_chat_model

OPTIONS = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "tokens": 256}
ASKED = ("How are you?", "Who is it?", "Fine.")
PROMPTS = [Prompt("p", (Message("user", text),)) for text in ASKED]


@pytest.fixture
def model(tmp_path):
    return make_chat_model(tmp_path)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The numbers of prompts that were really answered."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    asked = []

    def counted(model, prompts, **options):
        asked.append(len(prompts))
        return answer(model, prompts, **options)

    monkeypatch.setattr(held_out_answers, "answer", counted)
    return asked


def test_they_are_sampled_once_and_are_those_of_the_model(model, asked, tmp_path):
    expected = answer(model, PROMPTS, **OPTIONS)
    assert len({each.tokens for each in expected}) > 1
    assert {each.finished for each in expected} <= {True, False}
    for seed in (0, 1):  # greedy answers are those of every seed
        assert kept_answers(model, tmp_path, PROMPTS, **OPTIONS | {"seed": seed}) == expected
    assert asked == [3]


def test_no_prompts_are_no_answers(model, asked, tmp_path):
    assert kept_answers(model, tmp_path, [], **OPTIONS) == []
    assert kept_answers(model, tmp_path, [], **OPTIONS) == []


def test_what_decides_them_decides_whether_they_are_sampled_again(model, asked, tmp_path):
    sampled = OPTIONS | {"temperature": 1.0}
    cases = [
        (PROMPTS, OPTIONS),
        (PROMPTS[:2], OPTIONS),
        (PROMPTS[::-1], OPTIONS),
        (PROMPTS, OPTIONS | {"max_new_tokens": 5}),
        (PROMPTS, OPTIONS | {"tokens": 512}),
        (PROMPTS, sampled),
        (PROMPTS, sampled | {"seed": 1}),
    ]
    for prompts, options in [*cases, *cases]:
        kept_answers(model, tmp_path, prompts, **options)
    assert asked == [len(prompts) for prompts, _ in cases]
