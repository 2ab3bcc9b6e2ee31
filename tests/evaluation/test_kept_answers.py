"""Answers of a model that is not trained: sampled once, and again wherever anything differs."""

from __future__ import annotations

import json

import jax
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import held_out_answers
from rlhf_jax.evaluation.held_out_answers import answer, kept_answers
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.training.saved_model import Model, save_model

OPTIONS = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "tokens": 256}
ASKED = ("How are you?", "Who is it?", "Fine.")
PROMPTS = [Prompt("p", (Message("user", text),)) for text in ASKED]


@pytest.fixture
def model(tmp_path):
    tokenizer = train_bpe(["How are you? Fine, thank you. Who is it? A friend."], 280)
    sizes = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=64, init_std=0.5, **sizes)
    model = Model(config, init(config, jax.random.key(0)), tokenizer)
    save_model(tmp_path, model)
    summary = {"stage": "sft", "status": "done", "config_hash": "", "parents": {}}
    summary |= {"wall_seconds": 0.0, "metrics": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return model


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
