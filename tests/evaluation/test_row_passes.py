"""Passes over held-out rows are as large as the tokens of a training step allow, and say so."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Document, Group, pack_documents, pack_groups
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import held_out_answers, row_passes
from rlhf_jax.evaluation.language_loss import language_evaluation
from rlhf_jax.evaluation.row_passes import map_rows, response_logprobs
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.stages import defaults
from rlhf_jax.training import mesh, progress
from rlhf_jax.training.saved_model import Model

CONFIG = ModelConfig(
    vocab_size=300,
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=32,
    max_length=256,
)
PARAMS = init(CONFIG, jax.random.key(0))


def pairs(count=21, length=32):
    random = np.random.default_rng(0)
    groups = [
        Group(*(lambda p, c, r: (p, (c, r)))(*random.integers(8, 200, (3, 8)).tolist()), i)
        for i in range(count)
    ]
    return pack_groups(groups, length, branches=2)[0]


@pytest.mark.parametrize(("tokens", "rows"), [(96, 3), (95, 2), (31, 1), (10**6, 21)])
def test_a_pass_has_as_many_rows_as_its_tokens_allow(tokens, rows):
    seen = []

    def look(params, batch):
        seen.append(batch["tokens"].shape)
        return batch["row_ids"]

    found = map_rows(look, None, pairs(), tokens)
    np.testing.assert_array_equal(found, np.arange(21))
    assert set(seen) == {(rows, 32)} and len(seen) == -(-21 // rows)


def test_every_device_of_a_mesh_has_its_rows_of_a_pass():
    eight = mesh.make_mesh({"data": 2, "fsdp": 4})
    params, parts = mesh.placed(eight, PARAMS), []

    def look(params, batch):
        parts.append({part.data.shape for part in batch["tokens"].addressable_shards})
        return batch["row_ids"]

    np.testing.assert_array_equal(map_rows(look, params, pairs(), 64), np.arange(21))
    assert parts == [{(2, 32)}] * 2
    found = response_logprobs(CONFIG, params, pairs(), 64)
    expected = response_logprobs(CONFIG, PARAMS, pairs(), 64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_the_tokens_of_a_pass():
    rows = pairs()
    whole = response_logprobs(CONFIG, PARAMS, rows, 10**6)
    for tokens in (1, 64, 160):
        found = response_logprobs(CONFIG, PARAMS, rows, tokens)
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    ids = np.random.default_rng(1).integers(8, 200, (5, 32)).tolist()
    packed, _ = pack_documents([Document(x, [0] + [1] * 31) for x in ids], 32)
    wanted, *_ = language_evaluation(CONFIG, packed, tokens=10**6)(PARAMS)
    found, *_ = language_evaluation(CONFIG, packed, tokens=40)(PARAMS)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_data_sets_and_models_that_differ_in_training_alone_share_a_compiled_pass():
    rows = pairs(length=48)
    wider = pad_rows(rows, rows=1, slots=1, groups=rows["last"].shape[1] + 1)
    wanted = response_logprobs(CONFIG, PARAMS, rows, 96)
    count = row_passes._logprobs._cache_size()
    other = dataclasses.replace(CONFIG, remat="dots")
    found = response_logprobs(other, PARAMS, wider, 96)
    assert row_passes._logprobs._cache_size() == count
    np.testing.assert_array_equal(found[:, :-1], wanted)


def test_a_step_s_tokens_are_those_of_a_microbatch_on_a_device(monkeypatch):
    config = defaults.base("sft", data={"row_length": 768}, batch={"rows": 16, "microbatches": 2})
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:1])
    assert mesh.step_tokens(defaults.resolve(config)) == 8 * 768
    config.mesh.fsdp = 2
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:4])
    assert mesh.step_tokens(defaults.resolve(config)) == 2 * 768


@pytest.mark.parametrize(("tokens", "slots"), [(10**6, 64), (300, 16), (1, 1)])
def test_replies_share_a_cache_that_training_has_room_for(monkeypatch, tokens, slots):
    asked = []
    generate = held_out_answers.generate

    def spied(*arguments, **options):
        asked.append(arguments[3].batch_size)
        return generate(*arguments, **options)

    monkeypatch.setattr(held_out_answers, "generate", spied)
    tokenizer = train_bpe(["How are you?", "Fine, thank you."], 300)
    model = Model(CONFIG, PARAMS, tokenizer)
    prompts = [Prompt(str(i), (Message("user", "How are you?" * i),)) for i in (1, 9)]
    longest = max(len(held_out_answers.render_prompt(p.messages, tokenizer)) for p in prompts)
    limit = 150 - longest  # so that a reply and its prompt take 150 tokens at most
    held_out_answers.answer(model, prompts, max_new_tokens=limit, temperature=0.0, tokens=tokens)
    assert asked == [slots]


def test_a_long_pass_says_how_far_it_is_and_a_quick_one_nothing(capsys, monkeypatch):
    assert list(progress.tracked(range(5), "held out", 5)) == [*range(5)]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    assert list(progress.tracked(range(5), "held out", 5)) == [*range(5)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["held out", f"pass {n}/5"] for n in range(1, 5)
    ]
    assert all(line.endswith(" s left") for line in lines)
