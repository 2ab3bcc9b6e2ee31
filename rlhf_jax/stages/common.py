"""What the stages share: reading records, and handing a loss to the training loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.data.chat import AnyTokenizer, control_texts
from rlhf_jax.data.chat_formats import chat_template
from rlhf_jax.data.encode import encode_texts
from rlhf_jax.data.hub_data import PREFIX, load_rows
from rlhf_jax.data.hub_tokenizer import HubTokenizer
from rlhf_jax.data.jsonl import SUFFIXES, count_rows, read_jsonl, take_slice
from rlhf_jax.data.packing import Arrays, check_ids, pack_documents
from rlhf_jax.data.pipeline import make_dataset, make_iterator
from rlhf_jax.data.records import Conversation, Pair, Prompt, Text, convert
from rlhf_jax.data.shapes import parse_columns
from rlhf_jax.devices import training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.json_files import SUMMARY_FIELDS, check_fields, read_object
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.fused_attention import check_attention
from rlhf_jax.models.lora import AdapterConfig, has_adapter
from rlhf_jax.tasks.builders import check_name, load_records
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.loop import train
from rlhf_jax.training.mesh import batch_shards, make_mesh, placed
from rlhf_jax.training.model import Model, as_trainable, fingerprint, is_hub_directory, load_model
from rlhf_jax.training.rundir import SUMMARY, RunDirectory, write_json
from rlhf_jax.training.state import release

FEW = 30  # records; a metric of fewer is said to be
Figure = dict[str, Any]  # what `evaluation.plots.draw` draws
Evaluated = tuple[dict[str, float], list[Figure]]


def mesh_of(config: ConfigDict) -> Mesh | None:
    """The mesh the config describes, which must fit the devices; None on one device."""
    devices = training_devices()
    mesh = make_mesh(config.mesh, devices)
    return mesh if len(devices) > 1 else None


def step_tokens(config: ConfigDict) -> int:
    """Tokens that a training step works on at a time on one device.

    A pass without a backward one over as many takes less memory; it has its rows on every device.
    """
    parts = config.batch.microbatches * batch_shards(mesh_of(config))
    return max(1, config.batch.rows // parts) * config.data.row_length


def load_start(config: ConfigDict, directory: Path) -> Model:
    """The model a stage starts from, with the adapter it is to train if there is one."""
    model = load_model(directory, mesh=mesh_of(config), **config.compute)
    tokenizer = with_chat_template(model.tokenizer, config.data.chat_template)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    check_kernel(config, model.config)
    return as_trainable(model, AdapterConfig(**config.adapter), config.seed)


def check_kernel(config: ConfigDict, shape: ModelConfig) -> None:
    """Compares a fused attention kernel with the reference on rows as the run has them.

    Raises:
        UserError: they disagree, or there is no such kernel here.
    """
    if shape.attention != "reference":
        error = check_attention(shape, config.data.row_length)
        print(f"attention: {shape.attention}, within {error:.0e} of the reference", flush=True)


def with_chat_template(tokenizer: AnyTokenizer, name: str) -> AnyTokenizer:
    """The tokenizer under the chat template of that name or file; "": its own.

    Raises:
        UserError: there is no such template, it does not fit, or the format of chats is our own.
    """
    if not name:
        return tokenizer
    if not isinstance(tokenizer, HubTokenizer):
        raise UserError(
            "config: data.chat_template is for models from the Hub; one pre-trained here has the "
            "format of data/chat.py"
        )
    return tokenizer.with_template(chat_template(name))


def check_unrendered(
    what: str, records: Sequence[Conversation | Pair | Prompt], tokenizer: AnyTokenizer
) -> None:
    """Says how many records spell what a chat is rendered with, which there is text like any other.

    Raises:
        UserError: more than half of them are rendered chats already.
    """
    marks = control_texts(tokenizer)
    spelled, rendered = [], 0
    for record in records:
        texts = [text.strip() for text in _texts(record)]
        found = next((mark for mark in marks if any(mark in text for text in texts)), None)
        if found is not None:
            spelled.append((record.id, found))
            rendered += any(text.startswith(marks) or text.endswith(marks) for text in texts)
    if not spelled:
        return
    name, mark = spelled[0]
    said = f"{what}: {len(spelled):,} of {len(records):,} records spell what marks turns in a chat "
    said += f"(first {name!r}: {mark!r})"
    if 2 * rendered > len(records):
        raise UserError(
            f"{said}: they are rendered already, and would be rendered once more; give the "
            "messages alone, without the chat template's text"
        )
    print(f"warning: {said}, which is read and trained as ordinary text", flush=True)


def _texts(record: Conversation | Pair | Prompt) -> list[str]:
    if isinstance(record, Pair):
        return [*(message.content for message in record.prompt), record.chosen, record.rejected]
    return [message.content for message in record.messages]


def say_stripped(what: str, stripped: int, turns: int) -> None:
    """Prints that some of the assistant's turns are left untrained, if they are, and what to do."""
    if stripped:
        print(
            f"warning: {what}: {stripped:,} of {turns:,} replies are left untrained: once the "
            "conversation goes on the chat template writes them otherwise than they are generated "
            "(it strips thoughts, or ends only the last reply); "
            "--config.data.stripped_turns=expand trains them in records of their own",
            flush=True,
        )


def parse_sources(spec: str) -> dict[str, float]:
    """ "a=3,b=1" → {"a": 3.0, "b": 1.0}; a name alone has weight 1."""
    sources: dict[str, float] = {}
    for part in spec.split(","):
        name, _, weight = part.strip().partition("=")
        if name in sources:
            raise UserError(f"data: {name!r} is named twice in {spec!r}")
        try:
            sources[name] = float(weight or 1)
        except ValueError:
            sources[name] = math.nan
        if not 0 < sources[name] < math.inf:
            raise UserError(f"data: the weight of {name!r} is no number above 0: {weight!r}")
    return sources


class Source(NamedTuple):
    """A source's parts; `split` and `part`, a slice with its brackets, are "" where not stated."""

    name: str
    split: str
    part: str

    @property
    def is_hub(self) -> bool:
        """Whether the package `datasets` loads it."""
        return self.name.startswith(PREFIX)

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not a data set."""
        return not self.is_hub and Path(self.name).suffix in SUFFIXES


def parse_source(source: str) -> Source:
    """ "gsm8k@test[:50%]" → ("gsm8k", "test", "[:50%]"); an "@" in a file's name is its own."""
    name, bracket, part = source.partition("[")
    whole = Source(name, "", bracket + part)
    if whole.is_file:
        return whole
    name, _, split = name.partition("@")
    return Source(name, split, bracket + part)


def read_records(config: ConfigDict, source: str, kind: str, split: str) -> list[Any]:
    """The records of a source, as records of `kind` (see `records.convert`).

    A source is a JSON, JSONL or Parquet file, with a slice if wanted, or a data set with, as far as
    wanted, a config, a split of its own in place of `split`, and a slice: "mine.jsonl[:95%]",
    "town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]", "hf:owner/name@train". Several,
    "a.jsonl,b.jsonl", are read one after the other.
    """
    return [r for each in source.split(",") for r in _read_source(config, each, kind, split)]


def _read_source(config: ConfigDict, source: str, kind: str, split: str) -> list[Any]:
    name, own_split, part = parsed = parse_source(source)
    if parsed.is_file or parsed.is_hub:
        rows = load_rows(name, own_split or split) if parsed.is_hub else None
        bad = config.data.max_bad_fraction
        columns = parse_columns(config.data.get("columns", ""))
        records = read_jsonl(name, kind, max_bad_fraction=bad, rows=rows, columns=columns)
        return take_slice(records, part, name) if part else records
    kind = "pair" if kind == "preference" else kind  # no data set has unpaired records
    records = load_records(name, (own_split or split) + part, kind=kind)
    if not records:
        raise UserError(f"data: {source!r} has no records in its split {own_split or split!r}")
    return [convert(record, kind) for record in records]


def settle_sources(config: ConfigDict) -> ConfigDict:
    """A copy in which an empty data.validation or eval.source has become what it stands for.

    Without a data.validation the last 5 % of each of the user's files and "hf:" data sets in
    data.train, at least one record, are held out, which is said; eval.source is then the same.

    Raises:
        UserError: there is nothing to hold out from: a data set, or a file that is sliced already.
    """
    config = config.copy_and_resolve_references()
    if config.stage == "oracle":  # which reads nothing
        return config
    if not config.data.train:
        raise UserError("config: data.train is empty; set --config.data.train=mine.jsonl")
    if not config.data.validation:
        kept, held_out = [], []
        for source in config.data.train.split(","):
            name, equals, weight = source.strip().partition("=")
            begin, rest = _hold_out(name)
            kept.append(begin + equals + weight)
            held_out.append(rest)
        config.data.train, config.data.validation = ",".join(kept), ",".join(held_out)
    if config.eval.get("source") == "":
        config.eval.source = config.data.validation
    return config


def _hold_out(source: str) -> tuple[str, str]:
    """(what is trained on, what is held out) of a source."""
    name, split, part = parsed = parse_source(source)
    if not (parsed.is_file or parsed.is_hub or part):
        check_name(name)
    if not (parsed.is_file or parsed.is_hub) or part:
        why = "is sliced already" if part else "is no file of yours"
        raise UserError(
            f"config: data.validation is empty and {source!r} {why}; name what is held out with "
            "--config.data.validation=…"
        )
    if parsed.is_hub:
        split = split or "train"  # what is held out must not be another split
        count = len(load_rows(name, split))
        name = f"{name}@{split}"
    else:
        count = count_rows(name)
    few = round(0.95 * count) == count
    print(f"held out: the last {'record' if few else '5 %'} of {name}", flush=True)
    return (f"{name}[:-1]", f"{name}[-1:]") if few else (f"{name}[:95%]", f"{name}[95%:]")


def pack_texts(
    config: ConfigDict, what: str, records: Sequence[Text], tokenizer: AnyTokenizer, over_long: str
) -> Arrays:
    """Raw text as packed rows in which every token is a target; says what became of the records."""
    documents, counts = encode_texts(
        records, tokenizer, config.data.row_length, over_long=over_long
    )
    rows, packing = pack_documents(documents, config.data.row_length)
    say_encoded(config, what, counts, packing)
    return rows


def say_encoded(
    config: ConfigDict, what: str, counts: Mapping[str, int], further: Mapping[str, Any]
) -> None:
    """`say`, and as a warning how many records did not fit; counts are those of `data.encode`."""
    shown = {name: count for name, count in counts.items() if name != "keeps_95"}
    say(what, shown | dict(further))
    policy = config.data.get("over_long", "split")  # of raw text beside prompts, which loses none
    for fate in ("dropped", "truncated"):
        warn_over_long(
            what, counts[fate], counts["records"], counts.get("keeps_95", 0),
            f"{fate}, longer than data.row_length = {config.data.row_length} tokens "
            f"(data.over_long = {policy!r})",
        )  # fmt: skip


def warn_over_long(what: str, lost: int, records: int, keeps_95: int, why: str) -> None:
    """A warning of its own about records that do not fit; nothing where all do."""
    if lost:
        logging.warning(
            "%s: %s of %s records (%.1f %%) are %s; %s would keep 95 %%",
            what, f"{lost:,}", f"{records:,}", 100 * lost / records, why, f"{keeps_95:,}",
        )  # fmt: skip


def few_records(what: str, count: int) -> list[dict[str, Any]]:
    """The report's table, also said as a warning, where a metric is of fewer than FEW records."""
    if count >= FEW:
        return []
    note = f"Measured on {count} {what}, fewer than {FEW}: the numbers may be chance."
    logging.warning("%s", note)
    return [{
        "section": "changes",
        "title": f"Few {what}",
        "columns": ["of", "records"],
        "rows": [[what, count]],
        "note": note,
    }]  # fmt: skip


class Ties:
    """Warns, once, where all that a reward has judged so far are ties.

    That is once FEW have been judged, or at `close` if they stay fewer.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._apart: set[str] = set()
        self._said = False

    def add(self, what: str, count: int, apart: bool) -> None:
        """`count` more were judged; `what` says of them that they tie, unless some are `apart`."""
        self._counts[what] = self._counts.get(what, 0) + count
        if apart:
            self._apart.add(what)
        self._say(FEW)

    def close(self) -> None:
        """There will be no more."""
        self._say(2)

    def _say(self, least: int) -> None:
        for what, count in self._counts.items():
            if count >= least and what not in self._apart and not self._said:
                self._said = True
                logging.warning(
                    "reward: all %s %s so far: ties teach nothing; see reward.scorers",
                    f"{count:,}", what,
                )  # fmt: skip


def say(subject: str, counts: Mapping[str, Any]) -> None:
    """Prints one line of counts: what was read, packed, dropped."""
    shown = (
        f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {v:,}" for k, v in counts.items() if v
    )
    print(f"{subject}: {', '.join(shown)}", flush=True)


def fit(
    config: ConfigDict,
    run: RunDirectory,
    model: Model,
    loss_fn: Callable,
    batches: Any,
    evaluate: Callable[[Any], Evaluated],
    *,
    keeps_start: bool = False,
) -> tuple[Model, dict[str, float], list[Figure]]:
    """Trains the model; returns (it, its evaluation's metrics and the loop's rates, its figures).

    The parameters of `model` are gone afterwards: training holds one copy, the one it changes.
    `keeps_start` lets them live. Under an adapter they do anyway, since what is frozen is shared.

    Args:
        loss_fn: (params, batch, rng) → ((total, weight), metrics).
        batches: an iterator of host batches whose state can be saved.
        evaluate: params → (metrics, figures), every `train.eval_every` steps and at the end.
    """
    mesh = mesh_of(config)
    start = placed(mesh, model.params)
    learner = make_learner(
        config,
        config.optimizer,
        start,
        loss_fn,
        updates=config.train.steps,
        mesh=mesh,
        ema_decay=config.train.ema_decay,
    )
    evaluated: Evaluated | None = None

    def evaluation(state):
        nonlocal evaluated
        evaluated = evaluate(learner.params(state))
        return evaluated[0]

    state = learner.init()
    if not keeps_start and not has_adapter(start):
        release((model.params, start))
    state, rates = train_loop(
        config,
        run,
        state,
        learner.step,
        batches,
        evaluation,
        mesh=mesh,
        flops_per_token=model.flops_per_token(),
        tokenizer_hash=model.tokenizer.hash,
    )
    # None where the run was interrupted after its last evaluation.
    metrics, figures = evaluated or evaluate(learner.params(state))
    made = dataclasses.replace(model, params=learner.params(state), normalization=None)
    return made, metrics | rates, figures


def is_evaluated(config: ConfigDict, step: int) -> bool:
    """Whether `train_loop` evaluates the state after that step."""
    every = config.train.eval_every or config.train.steps
    return step % every == 0 or step == config.train.steps


def train_loop(
    config: ConfigDict,
    run: RunDirectory,
    state: Any,
    step: Callable,
    batches: Any,
    evaluation: Callable[[Any], Mapping[str, float]],
    **options: Any,
) -> tuple[Any, dict[str, float]]:
    """`training.loop.train` as `config.train` describes it; `options` are its other arguments."""
    return train(
        state,
        step,
        batches,
        steps=config.train.steps,
        run=run,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        checkpoint_minutes=config.train.checkpoint_minutes,
        keep_last=config.train.keep_last,
        evaluations=[(config.train.eval_every or config.train.steps, evaluation)],
        max_skipped=config.train.max_skipped,
        tensorboard=config.train.tensorboard,
        wandb=config.train.wandb or None,
        **options,
    )


def batches_of(config: ConfigDict, model: Model, rows: Sequence[Arrays], weights: Sequence[float]):
    """An endless iterator of batches over the packed rows of each source, mixed by weight."""
    for arrays in rows:
        check_ids(arrays, model.config.vocab_size)
    mixed = weights if len(rows) > 1 else None
    return make_iterator(make_dataset(rows, config.batch.rows, seed=config.seed, weights=mixed))


def read_summary(workdir: Path, *, whole: bool = True) -> dict[str, Any]:
    """summary.json of a finished run, or of a Hugging Face directory what stands for it.

    Raises:
        UserError: it is neither, or its summary.json is damaged, or if `whole` lacks a field.
    """
    if is_hub_directory(workdir):
        return {
            "stage": "hub",
            "status": "done",
            "config_hash": fingerprint(workdir),
            "parents": {},
            "wall_seconds": 0.0,
            "metrics": {},
        }
    path = workdir / SUMMARY
    summary = read_object(path) if path.exists() else {}
    if not summary or summary.get("status", "done") != "done":
        raise UserError(f"{workdir} is not the directory of a finished run")
    check_fields(path, summary, SUMMARY_FIELDS, required=whole)
    return summary


def ancestry(workdir: Path) -> list[Path]:
    """The runs a model comes from, oldest first, itself last."""
    parent = read_summary(workdir)["parents"].get("policy")
    return [*(ancestry(Path(parent)) if parent else []), workdir]


def write_evaluation(
    run: Path, tables: Sequence[Any] = (), plots: Sequence[Any] = (), **further: Any
) -> None:
    """Writes evaluation.json, which the report draws; `further` are other keys it knows."""
    document = {"tables": list(tables), "plots": list(plots), **further}
    write_json(run / "evaluation.json", document)


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, so that the file is the old one or the new one."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(path, "".join(lines).encode())
