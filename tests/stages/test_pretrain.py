"""Pre-training on windows of one stream."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from rlhf_jax.data.tokenizer import train_bpe, train_chars
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.stages import defaults, pretrain
from rlhf_jax.training.saved_model import Model

TEXTS = ["abab cdcd " * 10, "zzzz yyyy " * 50]


def options(folder, train="texts.jsonl"):
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    config = defaults.base(
        "pretrain",
        data={"train": f"{folder}/{train}", "validation": f"{folder}/texts.jsonl"},
        tokenizer={"kind": "chars"},
        batch={"rows": 4},
    )
    config.data.update(layout="windows", row_length=64)
    return defaults.resolve(config)


def test_every_validation_text_is_evaluated(tmp_path):
    tokenizer = train_chars("".join(TEXTS))
    shape = ModelConfig(tokenizer.vocab_size, 1, 16, 1, 1, 16, 32, 64)
    model = Model(shape, init(shape, jax.random.key(0)), tokenizer)
    equal = jax.tree.map(lambda x: x * 0, model.params)  # each token has the probability 1/V
    evaluated = pretrain.evaluation(options(tmp_path), model)(equal)
    assert evaluated.values["loss"].weights.sum() == sum(map(len, TEXTS)) - 1
    bits = math.log2(tokenizer.vocab_size)
    assert evaluated.metrics["eval/bpb"] == pytest.approx(bits, rel=5e-3)  # all but the first byte


def test_bits_per_byte_are_of_the_texts_that_are_evaluated(tmp_path):
    config = options(tmp_path)
    data = dataclasses.replace(
        config.data, layout="documents", over_long="drop", row_length=len(TEXTS[0]) + 3
    )
    tokenizer = train_bpe([], 263)  # one token a byte
    shape = ModelConfig(tokenizer.vocab_size, 1, 16, 1, 1, 16, 32, 256)
    model = Model(shape, init(shape, jax.random.key(0)), tokenizer)
    equal = jax.tree.map(lambda x: x * 0, model.params)
    evaluated = pretrain.evaluation(dataclasses.replace(config, data=data), model)(equal)
    count = len(TEXTS[0])  # the second text is dropped; a space and an end are targets too
    bits = math.log2(tokenizer.vocab_size) * (count + 2) / count
    assert evaluated.metrics["eval/bpb"] == pytest.approx(bits)


def test_a_stream_has_no_sources_that_weigh(tmp_path):
    config = options(tmp_path, train="texts.jsonl=2")
    with pytest.raises(UserError, match="'windows' is of one stream, in which no source weighs"):
        pretrain.run(config, None, {})
