"""Pre-training: raw text → a tokenizer and a base model that predicts the next token.

`data.layout` says how text becomes rows: "documents" packs whole documents, "windows" takes random
windows of one stream of characters as nanoGPT does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.config import Config
from rlhf_jax.data.batches import make_iterator, make_windows
from rlhf_jax.data.packing import pack_stream
from rlhf_jax.data.tokenizer import OwnTokenizer, train_bpe, train_chars
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.before_after import Evaluated
from rlhf_jax.evaluation.language_loss import language_evaluation
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_cross_entropy
from rlhf_jax.stages.fit import Batches, batches_of, fit, pack_texts
from rlhf_jax.stages.start import check_kernel
from rlhf_jax.tasks.sources import parse_sources, read_records
from rlhf_jax.training.mesh import check_width, step_tokens
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, save_model


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Trains from scratch and returns the metrics of summary.json."""
    sources = parse_sources(config.data.train)
    train = [read_records(config, source, "text", "train") for source in sources]
    texts = [record.text for records in train for record in records]
    tokenizer = _train_tokenizer(config, texts)

    shape = config.model.model(tokenizer.vocab_size)
    check_width(config, shape.width)
    check_kernel(config, shape.validate())
    model = Model(shape, transformer.init(shape, jax.random.key(config.seed)), tokenizer)
    length = config.data.row_length
    if config.data.layout == "windows":
        if any(weight != 1 for weight in sources.values()):
            raise UserError("data: layout = 'windows' is of one stream, in which no source weighs")
        stream = tokenizer.encode("".join(texts))
        drawn = make_iterator(make_windows(stream, length, config.batch.rows, seed=config.seed))
        batches = Batches(drawn, {"": max(1, len(stream) // length)}, [1.0])
    else:
        policy = config.data.over_long
        rows = {
            source: pack_texts(config, "training text", records, tokenizer, policy)[0]
            for source, records in zip(sources, train, strict=True)
        }
        batches = batches_of(config, model, rows, [*sources.values()])

    loss_fn = partial(loss, config, shape)
    model, metrics, _ = fit(config, run, model, loss_fn, batches, evaluation(config, model))
    save_model(run.path, model)
    return metrics


def evaluation(config: Config, model: Model) -> Callable[[Any], Evaluated]:
    """The held-out metrics of text, as a function of parameters of the model's shape."""
    validation = read_records(config, config.data.validation, "text", "validation")
    if config.data.layout == "windows":
        stream = model.tokenizer.encode("".join(record.text for record in validation))
        held_out, _ = pack_stream(stream, config.data.row_length)
        text_bytes = sum(len(record.text.encode()) for record in validation)
    else:
        held_out, counts = pack_texts(
            config, "validation text", validation, model.tokenizer, config.data.over_long
        )
        text_bytes = counts["bytes"]  # without those of records that are dropped
    return language_evaluation(
        model.config,
        held_out,
        text_bytes=text_bytes,
        tokens=step_tokens(config),
    )


def loss(config: Config, shape: ModelConfig, params: Any, batch, rng):
    """The cross-entropy of a batch of packed text: ((total, weight), metrics)."""
    return target_cross_entropy(shape, params, batch, z_loss=config.loss.z_loss)


def _train_tokenizer(config: Config, texts: list[str]) -> OwnTokenizer:
    vocabulary = config.tokenizer
    if vocabulary.kind == "chars":
        return train_chars("".join(texts))
    spaced = [f" {text}" for text in texts]
    return train_bpe(spaced, vocabulary.vocab_size, digits=vocabulary.digits)
