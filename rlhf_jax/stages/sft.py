"""Supervised fine-tuning: a base model and conversations → a chat model.

Only the assistant's turns, their `<|end|>` included, are trained. Raw text can be mixed in
(`data.replay`), so that what the conversations do not speak of isn't forgotten: "Experience Replay
for Continual Learning", https://arxiv.org/abs/1811.11682.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.encode import check_trained_share, encode_conversations
from rlhf_jax.data.packing import Arrays, pack_documents
from rlhf_jax.evaluation.before_after import Evaluated
from rlhf_jax.evaluation.chat_evaluation import check_held_out_prompts, evaluate_chat
from rlhf_jax.evaluation.language_loss import language_evaluation
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_cross_entropy
from rlhf_jax.stages.fit import Training, batches_of, fit, pack_texts
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.sources import check_unrendered, parse_sources, read_records
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, save_model


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Fine-tunes `init.policy` and returns the metrics of summary.json."""
    base = load_start(config, parents["policy"])
    trained = training(config, base, parents)
    evaluate = evaluation(config, base)
    check_held_out_prompts(config, base)
    model, metrics, _ = fit(
        config, run, *trained, evaluate, before=lambda params: evaluate(params).values
    )
    save_model(run.path, model)
    tables = console.few_records("held-out conversations", int(metrics["change/loss_records"]))
    return metrics | evaluate_chat(
        config, run.path, model, parents["policy"], further={"tables": tables}
    )


def training(config: Config, base: Model, parents: Mapping[str, Path]) -> Training:
    """What is trained, by which loss and on which batches, where `base` is what it starts from.

    It is called as `preference.training` is, which alone reads `parents`.
    """
    sources = parse_sources(config.data.train)
    rows = {source: _pack(config, source, "train", base.tokenizer) for source in sources}
    replayed = parse_sources(config.data.replay) if config.data.replay else {}
    for source in replayed:
        texts = read_records(config, source, "text", "train")
        what = f"{source} (replay)"
        rows[what], _ = pack_texts(config, what, texts, base.tokenizer, "split")
    batches = batches_of(config, base, rows, [*sources.values(), *replayed.values()])
    return Training(base, partial(loss, config, base.config), batches)


def evaluation(config: Config, model: Model) -> Callable[[Any], Evaluated]:
    """The held-out metrics of replies, as a function of parameters of the model's shape."""
    held_out = _pack(config, config.data.validation, "validation", model.tokenizer)
    return language_evaluation(model.config, held_out, tokens=step_tokens(config))


def loss(config: Config, shape: ModelConfig, params: Any, batch, rng):
    """The cross-entropy of a batch of packed conversations: ((total, weight), metrics)."""
    return target_cross_entropy(
        shape,
        params,
        batch,
        label_smoothing=config.loss.label_smoothing,
        z_loss=config.loss.z_loss,
    )


def _pack(config: Config, source: str, split: str, tokenizer: Tokenizer) -> Arrays:
    what, records = f"{source} ({split})", read_records(config, source, "conversation", split)
    check_unrendered(what, records, tokenizer)
    length, stripped = config.data.row_length, config.data.stripped_turns
    documents, counts = encode_conversations(
        records, tokenizer, length, over_long=config.data.over_long, stripped_turns=stripped,
        last_only=config.data.trained_turns == "last",
    )  # fmt: skip
    share = check_trained_share(documents)
    rows, packing = pack_documents(documents, length)
    console.say_encoded(config, what, counts, packing | {"trained": share})
    console.say_stripped(what, counts["stripped"], counts["turns"])
    return rows
