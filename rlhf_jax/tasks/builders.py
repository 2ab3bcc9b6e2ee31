"""Data sets by name: `load_records`, and `task_of`, which says what a name stands for.

`public_sets` and `town.dataset` list the names. Files are looked for under $RLHF_JAX_DATA, then in
`../shared/data` beside the repository, and downloaded from their public address where there is one.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from rlhf_jax.cache import cache_dir
from rlhf_jax.data.jsonl import SUFFIXES
from rlhf_jax.data.records import Conversation, Pair, Prompt, Record
from rlhf_jax.digests import code_digest
from rlhf_jax.errors import UserError
from rlhf_jax.tasks import data_files
from rlhf_jax.tasks.call_sets import CALL_SETS
from rlhf_jax.tasks.public_sets import PUBLIC_SETS
from rlhf_jax.tasks.record_builder import builder_of, read_records
from rlhf_jax.tasks.refusals import REFUSAL_SETS
from rlhf_jax.tasks.task import Task, Verdict
from rlhf_jax.tasks.town.dataset import MEMORY, PERSONA, QUESTIONS, SAFETY, TOWN, TOWN_TOOLS

_TOWN = (MEMORY, PERSONA, QUESTIONS, SAFETY, TOWN, TOWN_TOOLS)
_ALL = (*PUBLIC_SETS, *REFUSAL_SETS, *CALL_SETS, *_TOWN)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_of(name: str) -> Task:
    """The task of "set" or "set/config"; UserError if there is no such data set."""
    set_name = name.partition("/")[0]
    if set_name not in TASKS:
        what = f"unknown data set {set_name or name!r}; known"
        if Path(name).exists():
            what = f"{name} is no data set, and no file of a kind that is read; these are"
        raise UserError(
            f"{what}: {', '.join(TASKS)}, hf:owner/name, and files named *{', *'.join(SUFFIXES)}"
        )
    return TASKS[set_name]


def verifier_of(records: Sequence[Prompt | Pair | Conversation]) -> Task | None:
    """The task whose verifier can judge replies to each of the records, wherever they come from."""
    for task in TASKS.values():
        if records and all(task.verifies(record.meta) for record in records):
            return task
    return None


def verify(record: Prompt | Pair | Conversation, reply: str) -> Verdict:
    """The verdict on a reply of the first task whose verifier can judge it.

    Raises:
        UserError: there is none.
    """
    task = verifier_of([record])
    if task and task.verify:
        return task.verify(record, reply)
    raise UserError(
        "the record has nothing to verify a reply by: neither the town's meta['expectation'] nor a "
        "number as meta['answer']"
    )


def load_records(name: str, split: str, *, kind: str | None = None) -> list[Record]:
    """The records of a data set's split; real sets are prepared on first use under `cache_dir()`.

    `name` is "set/config", "set/kind", which is the first config of that kind, or "set": the first
    config of `kind`, or the first of all. `split` may be sliced ("train[:10%]"). The prepared files
    are keyed by the content of the source files and by the code that reads them, so neither is
    mistaken for an older one. Raises UserError for unknown names and for files that cannot be had.
    """
    task, stated = task_of(name), name.partition("/")[2]
    of_kind = (config for config, its in task.kinds.items() if its == (stated or kind))
    first = None if stated else next(iter(task.kinds))
    config = stated if stated in task.kinds else next(of_kind, first)
    if config is None:
        raise UserError(
            f"data set {task.name!r} has no config {stated!r}; there are: {[*task.kinds]}"
        )
    if not task.files:
        return _make_slice(task, config, split)
    made_from = f"{data_files.digest(task.files[config])}-{code_digest(__name__)}"
    folder = cache_dir() / "datasets" / made_from
    builder = builder_of(task)(config=config, data_dir=folder, file_format="array_record")
    return read_records(builder, split)


def _make_slice(task: Task, config: str, split: str) -> list[Record]:
    """The records of a task without files; `split` may be sliced as TFDS does."""
    name = split.partition("[")[0]
    records = _make(task.name, config, name)
    whole = tfds.core.SplitInfo(name=name, shard_lengths=[len(records)], num_bytes=0)
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    except (KeyError, ValueError) as error:
        raise UserError(f"{task.name}: cannot read {split!r}: {error}") from error
    return list(records[part.from_ : part.to])


@functools.cache
def _make(name: str, config: str, split: str) -> tuple[Record, ...]:
    splits = TASKS[name].make(config, [], Counter())
    if split not in splits:
        raise UserError(f"{name}: no split {split!r}; there are: {', '.join(splits)}")
    return tuple(splits[split])


def sources_digest(name: str) -> str:
    """A digest of the files a data set is made from, of all its configs if none is named.

    "" for a set that is made from no file or is unknown.
    """
    set_name, _, config = name.partition("/")
    files = TASKS[set_name].files if set_name in TASKS else {}
    chosen = [files[config]] if config in files else files.values()
    return data_files.digest(itertools.chain.from_iterable(chosen))
