"""Records as a TFDS data set: ArrayRecord files, prepared and read without TensorFlow."""

from __future__ import annotations

import abc
import dataclasses
import fcntl
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds

from rlhf_jax.data.records import KINDS, Message, Record
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.data_files import fetch
from rlhf_jax.tasks.task import Task


@dataclasses.dataclass
class RecordConfig(tfds.core.BuilderConfig):
    """A variant of a data set; `kind` is a key of `records.KINDS`."""

    kind: str = "text"


class RecordBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """A data set with one kind of record per config.

    A subclass states `BUILDER_CONFIGS` (of `RecordConfig`) and writes `records`.
    """

    VERSION = tfds.core.Version("1.0.0")

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
            features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        splits = self.records(dl_manager)
        return {split: self._generate_examples(records) for split, records in splits.items()}

    def _generate_examples(self, records):
        for record in records:
            yield record.id, {"record": to_json(record)}


def builder_of(task: Task) -> type[RecordBuilder]:
    """The TFDS builder of a task whose records are made from files."""

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        config, left_out = self.builder_config.name, Counter[str]()
        paths = [fetch(file, dl_manager) for file in task.files[config]]
        splits = task.make(config, paths, left_out)
        for reason, count in (+left_out).items():
            logging.warning("%s: left out %d (%s)", self.info.full_name, count, reason)
        self.info.metadata["left_out"] = dict(left_out)
        return splits

    configs = [RecordConfig(name=config, kind=kind) for config, kind in task.kinds.items()]
    name = "".join(map(str.capitalize, task.name.split("_")))  # TFDS makes the set's name of it
    members = {"BUILDER_CONFIGS": configs, "records": records, "__doc__": task.make.__doc__}
    return type(name, (RecordBuilder,), members)


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
    examples = source.__getitems__(range(len(source)))
    return [from_json(kind, example["record"].decode()) for example in examples]


def _locked(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def to_json(record: Record) -> str:
    """A record as one line of JSON."""
    return json.dumps(dataclasses.asdict(record))


def from_json(kind: str, line: str) -> Record:
    """The inverse of `to_json`, for a record of `kind`."""
    fields = json.loads(line)
    for name in fields.keys() & {"messages", "prompt"}:
        fields[name] = tuple(Message(**message) for message in fields[name])
    return KINDS[kind](**fields)
