"""Records as a TFDS data set: ArrayRecord files, prepared and read without TensorFlow."""

from __future__ import annotations

import abc
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point


@dataclasses.dataclass
class RecordConfig(tfds.core.BuilderConfig):
    """A variant of a data set; `kind` is a key of `records.KINDS`."""

    kind: str = "text"


class RecordBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """A data set of one kind of record a config.

    A subclass states `VERSION` and `BUILDER_CONFIGS` (of `RecordConfig`) and writes `records`.
    """

    def __init_subclass__(cls, skip_registration: bool = True, **kwargs: Any):
        """Keeps the names of TFDS's own data sets free for it; `load_records` finds ours."""
        super().__init_subclass__(skip_registration=skip_registration, **kwargs)

    code_path = None  # TFDS's own lookup needs importlib_resources, which it does not install

    @abc.abstractmethod
    def records(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Iterable[Record]]:
        """Split name → records of the current config; ids are unique within a split."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(_features(self.builder_config.kind)),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        splits = self.records(dl_manager)
        return {split: self._generate_examples(records) for split, records in splits.items()}

    def _generate_examples(self, records):
        for record in records:
            yield record.id, to_example(record)


def read_records(builder: RecordBuilder, split: str) -> list[Record]:
    """Prepares the data set unless its files are there, and reads a split ("train[:10%]" works).

    Processes that want the same set at once take turns; a killed preparation leaves nothing behind
    that is read later.
    """
    files = Path(builder.data_path)
    if not files.is_dir():
        tfds.disable_progress_bar()
        files.parent.mkdir(parents=True, exist_ok=True)
        with open(files.parent / ".lock", "w") as lock:
            while not _locked(lock):
                stop_point()
                time.sleep(0.1)
            if not files.is_dir():
                builder.download_and_prepare()
    if not builder.info.splits:  # another process was first, after this builder was made
        builder.info.read_from_directory(files)
    try:
        source = builder.as_data_source(split=split)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{builder.name}: no split {split!r}; there are: {known}") from error
    kind = builder.builder_config.kind
    return [from_example(kind, example) for example in source.__getitems__(range(len(source)))]


def _locked(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def to_example(record: Record) -> dict[str, Any]:
    """A record as the nested dict that the features of its kind take."""
    example: dict[str, Any] = {"id": record.id, "meta": json.dumps(dict(record.meta))}
    match record:
        case Text():
            example |= {"text": record.text}
        case Conversation() | Prompt():
            example |= {"messages": _write_messages(record.messages)}
        case Pair():
            example |= {
                "prompt": _write_messages(record.prompt),
                "chosen": record.chosen,
                "rejected": record.rejected,
                "margin": json.dumps(record.margin),
            }
    return example


def from_example(kind: str, example: Mapping[str, Any]) -> Record:
    """The inverse of `to_example`, from an example as a TFDS data source gives it."""
    id, meta = example["id"].decode(), json.loads(example["meta"])
    match kind:
        case "text":
            return Text(id, example["text"].decode(), meta)
        case "conversation":
            return Conversation(id, _read_messages(example["messages"]), meta)
        case "prompt":
            return Prompt(id, _read_messages(example["messages"]), meta)
        case "pair":
            return Pair(
                id,
                _read_messages(example["prompt"]),
                example["chosen"].decode(),
                example["rejected"].decode(),
                json.loads(example["margin"]),
                meta,
            )
    raise ValueError(f"unknown kind of record {kind!r}")


def _write_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    if any(message.more for message in messages):
        raise ValueError("a data set's messages have a role and a content only")
    return [{"role": message.role, "content": message.content} for message in messages]


def _read_messages(columns: Mapping[str, list[bytes]]) -> tuple[Message, ...]:
    turns = zip(columns["role"], columns["content"], strict=True)
    return tuple(Message(role.decode(), content.decode()) for role, content in turns)


def _features(kind: str) -> dict[str, Any]:
    text = tfds.features.Text
    messages = tfds.features.Sequence({"role": text(), "content": text()})
    fields = {
        "text": {"text": text()},
        "conversation": {"messages": messages},
        "prompt": {"messages": messages},
        "pair": {
            "prompt": messages,
            "chosen": text(),
            "rejected": text(),
            "margin": text(),  # JSON, since ArrayRecord examples hold float32 only
        },
    }
    return {"id": text(), "meta": text()} | fields[kind]
