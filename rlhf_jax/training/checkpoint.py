"""Checkpoints: Orbax writes the arrays, a manifest written last says the whole is there.

    checkpoints/00000100/arrays/         Orbax, one array per "/"-joined name
                         data.json       the data iterator's state
                         meta.json       step, config, tokenizer hash, versions, shapes
                         manifest.json   size and SHA-256 of every other file

A checkpoint is built as `00000100.0.tmp` and renamed when its manifest is durable: a name without a
suffix means complete. Every file is verified before anything is loaded. Nothing is pickled.

Of several processes each writes and reads the parts of arrays that its devices hold, in a directory
that all share; the first one does all the rest.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rlhf_jax import hosts
from rlhf_jax.errors import NoRoom, UserError, lack_of_room
from rlhf_jax.files import (
    check_fields,
    json_text,
    parse_object,
    read_object,
    room_for,
    sync_directory,
    write_json,
)
from rlhf_jax.training.mesh import shardings
from rlhf_jax.training.rundir import fault_point
from rlhf_jax.trees import named_leaves

FORMAT = 1
MANIFEST = "manifest.json"
MAX_FAILED_SAVES = 3
_KEPT = 2  # checkpoints; an older one goes only after a newer one is verified
SMALL_FILES, DESCRIBED = 2**16, 2**11  # bytes that a checkpoint, an array takes beside its own
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Restored(NamedTuple):
    """A loaded checkpoint: the state on the target's devices, and the JSON beside it."""

    state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are; leftovers of a killed process are removed here.
      report: called with a line of text when something deserves the user's attention.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        report: Callable[[str], None] = print,
    ):
        self.directory = Path(directory).absolute()
        hosts.by_first(self._prepare)
        self._report = report
        self._orbax = _async_checkpointer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0
        self._told = False  # what one costs
        self._tried: tuple[Path, int] = self.directory, 0  # where, and the bytes it takes

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        numbered = (p.name for p in self.directory.iterdir() if p.name.isdecimal())
        return sorted(int(name) for name in numbered if name == f"{int(name):08d}")

    def save(
        self,
        step: int,
        state,
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Copies the state to the host and writes it in the background; at most one is in flight.

        A write that fails is reported, and the run goes on without that checkpoint.

        Args:
          wait: returns when the checkpoint is complete; a write that fails is tried again.

        Raises:
          NoRoom: the second write in a row for which the disk has no room.
          UserError: the third failed write in a row.
        """
        self.wait()
        final = self.directory / f"{step:08d}"
        arrays = named_leaves(state)
        self._tried = final, hosts.by_first(lambda: max(_bytes(arrays), self._size_of_newest()))
        documents = {"data": dict(data), "meta": {"step": step} | dict(meta)}
        start = time.monotonic()
        while not hosts.by_first(final.exists):
            # A name of its own: some of a failed one's writes may still be on their way.
            temporary = final.with_suffix(f".{self._failures}.tmp")
            try:
                _begin(self._orbax, temporary, arrays, documents)
            except (OSError, ValueError) as error:
                self._failed(error)
            else:
                fault_point("checkpoint:begun", step)
                copied = time.monotonic() - start
                args = (step, temporary, final, copied)
                self._thread = threading.Thread(target=self._finish, args=args)
                self._thread.start()
            if not wait:
                return
            self.wait()

    def _size_of_newest(self) -> int:
        return sum(_on_disk(self.directory / f"{step:08d}") for step in self.steps()[-1:])

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def lacks_room(self) -> bool:
        """Whether the newest write has just failed because the disk is full."""
        return self._error is not None and lack_of_room(self._error) is not None

    def wait(self) -> None:
        """Returns when the checkpoint in flight, if any, is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._error = _of_any(self._error)
            if self._error is None:
                self._failures = 0
        if self._error is not None:
            error, self._error = self._error, None
            self._failed(error)

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        self.wait()
        try:
            self._orbax.close()
        except OSError as error:  # of the save that failed, which `wait` has raised or reported
            if lack_of_room(error) is None:
                raise
        if hosts.is_first():
            self._remove_leftovers()

    def restore(self, target) -> Restored | None:
        """Loads the newest checkpoint that is whole, onto the shardings of `target`.

        One that is not whole is reported and set aside as `<step>.corrupt`.

        Args:
          target: tree of arrays, or of ShapeDtypeStructs with shardings: names, shapes and places.

        Returns:
          None when there is no checkpoint.

        Raises:
          UserError: none is whole, or the arrays are not those of the target.
        """
        step = hosts.by_first(self._newest_whole)
        if step is None:
            return None
        path = self.directory / f"{step:08d}"
        data, meta = _documents(path)
        for name, now in _environment().items():
            if meta.get(name) != now:
                text = f"{path} was written with {name} {meta.get(name)}, this is {now}"
                self._report(f"{text}: the run goes on, but not bit for bit")
        return Restored(_load(self._orbax, path, target), data, meta)

    def _newest_whole(self) -> int | None:
        """The step of the newest checkpoint that is whole; sets aside those that are not."""
        for step in reversed(self.steps()):
            path = self.directory / f"{step:08d}"
            problem = verify(path)
            if problem is None:
                return step
            aside = _unused(path, ".corrupt")
            os.rename(path, aside)
            sync_directory(self.directory)
            self._report(f"checkpoint {path} is damaged ({problem}): set aside as {aside.name}")
        if any(self.directory.glob("*.corrupt*")):
            raise UserError(
                f"no whole checkpoint is left in {self.directory}; delete it to start again"
            )
        return None

    def _finish(self, step: int, temporary: Path, final: Path, copied: float) -> None:
        start = time.monotonic()
        try:
            self._orbax.wait_until_finished()
            if not hosts.is_first():
                return
            fault_point("checkpoint:arrays", step)
            seal(temporary)
            fault_point("checkpoint:sealed", step)
            os.rename(temporary, final)
            sync_directory(self.directory)
            fault_point("checkpoint:renamed", step)
            problem = verify(final)
            if problem:
                raise OSError(f"{final} does not read back: {problem}")
            if not self._told:
                self._told = True
                print(
                    f"checkpoint of step {step}: {self._tried[1] / 1e6:,.1f} MB, copied in "
                    f"{copied:.1f} s, written meanwhile in {time.monotonic() - start:.1f} s",
                    flush=True,
                )
            for old in self.steps()[:-_KEPT]:
                _remove(self.directory / f"{old:08d}")
            fault_point("checkpoint:removed", step)
        except BaseException as error:  # raised again, in the main thread, by wait()
            self._error = error

    def _failed(self, error: BaseException) -> None:
        for leftover in self.directory.glob("*.tmp") if hosts.is_first() else ():
            _remove_failed(leftover)
        self._failures += 1
        reason = lack_of_room(error)
        if reason is not None:
            # Its frames hold coroutines of Orbax's other writes. If they lived until Python exits,
            # each would print a traceback there.
            error.__traceback__ = None
            gc.collect()
            full = NoRoom(*self._tried, reason)
            if self._failures > 1:
                raise full from error
            self._report(f"warning: {full.shortage}; it is tried once more")
            return
        text = f"checkpoint not written ({error})"
        if self._failures >= MAX_FAILED_SAVES:
            raise UserError(f"{text}; {self._failures} in a row, the older ones are intact")
        self._report(text)

    def _remove_leftovers(self) -> None:
        for leftover in self.directory.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def save_params(directory: str | os.PathLike, params, document: Mapping[str, Any]) -> None:
    """Writes the final parameters of a stage, in place of older ones if there are any.

    Args:
      directory: becomes `<directory>/{arrays, data.json, meta.json, manifest.json}`.
      params: nested dict of arrays.
      document: JSON to keep with them: the model's config, the tokenizer's hash.

    Raises:
      NoRoom: the disk is full; older ones are still there.
    """
    final = Path(directory).absolute()
    temporary = final.with_name(final.name + ".tmp")
    hosts.by_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
    arrays = named_leaves(params)

    def finish() -> None:
        seal(temporary)
        if final.exists():
            _remove(final, ".old.tmp")
        os.rename(temporary, final)
        sync_directory(final.parent)

    with room_for(final, _bytes(arrays)):
        try:
            orbax = _async_checkpointer()
            _begin(orbax, temporary, arrays, {"data": dict(document), "meta": {}})
            orbax.wait_until_finished()
            orbax.close()
            hosts.by_first(finish)
        except BaseException:
            if hosts.is_first():
                _remove_failed(temporary)
            raise


def load_params(
    directory: str | os.PathLike, *, mesh: Mesh | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (params, document) as `save_params` wrote them, on the mesh by `TRANSFORMER_RULES`.

    Raises:
      UserError: nothing there, or not whole.
    """
    path = Path(directory).absolute()
    problem = hosts.by_first(
        lambda: verify(path) if path.is_dir() else "there is no such directory"
    )
    if problem:
        raise UserError(f"cannot load parameters from {directory}: {problem}")
    document, meta = _documents(path)
    target: dict[str, Any] = {}
    for name, (dtype, shape) in meta["arrays"].items():
        *parents, leaf = name.split("/")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, dtype)
    if mesh is not None:
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            *(target, shardings(mesh, target)),
        )
    orbax = _async_checkpointer()
    params = _load(orbax, path, target)
    orbax.close()
    return params, document


def load_document(directory: str | os.PathLike) -> dict[str, Any]:
    """The JSON that `save_params` kept with the parameters, which are not looked at.

    Raises:
      UserError: nothing there, or not whole.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise UserError(f"cannot load parameters from {directory}: there is no such directory")
    try:
        files = read_object(path / MANIFEST)["files"]
        if files["data.json"] != _fingerprint(path / "data.json"):
            raise UserError("data.json is not what was written")
        return read_object(path / "data.json")
    except UserError as error:
        raise UserError(f"cannot load parameters from {directory}: {error}") from error
    except (OSError, KeyError, TypeError) as error:
        text = f"{MANIFEST} or data.json is missing or not valid"
        raise UserError(f"cannot load parameters from {directory}: {text}") from error


def seal(path: Path) -> None:
    """Writes the manifest of every file under `path`, after making them durable."""
    files = {}
    for name in _files(path):
        with open(path / name, "rb") as file:
            os.fsync(file.fileno())
        files[name] = _fingerprint(path / name)
        sync_directory((path / name).parent)
    write_json(path / MANIFEST, {"format": FORMAT, "files": files})


def verify(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, naming the file; None if nothing is.

    Raises:
      UserError: it was written by a newer format of this package.
    """
    try:
        text = (path / MANIFEST).read_text("utf-8")
        manifest = parse_object(text)
        version, expected = manifest["format"], manifest["files"]
        if not isinstance(version, int) or not isinstance(expected, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or not valid"
    if version != FORMAT:
        raise UserError(f"{path} has format {version}; this version of rlhf_jax reads {FORMAT}")
    if text != json_text(manifest):  # no digest is kept of it
        return f"{MANIFEST} is not what was written"
    present = set(_files(path)) - {MANIFEST}
    for name in sorted(present ^ set(expected)):
        return f"{name} is {'missing' if name in expected else 'not in the manifest'}"
    try:
        for name, fingerprint in expected.items():
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what was written"
        meta = _documents(path)[1]
    except (OSError, UserError) as error:
        return str(error)
    if path.name.isdecimal() and meta.get("step") != int(path.name):
        return f"its meta.json is of step {meta.get('step')}"
    return None


def _async_checkpointer():
    import orbax.checkpoint as ocp  # half a second

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
    # Said of the other writes of a save that failed, whose error is raised anyway.
    never = "coroutine 'async_serialize.*' was never awaited"
    warnings.filterwarnings("ignore", never, RuntimeWarning)
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())


def _is_news(record: logging.LogRecord) -> bool:
    """False for a full disk's tracebacks: each thread's is logged, and what matters is raised."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or lack_of_room(error) is None


class _Unraisable:
    """A `sys.unraisablehook` that doesn't print what a failed save's other writes come to.

    TensorStore only says that Orbax has closed their event loop. Orbax's own coroutines of them
    raise when they are garbage-collected.
    """

    def __init__(self, before: Callable[[Any], object]):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        where, text = unraisable.object, str(unraisable.exc_value)
        of_orbax = getattr(where, "__qualname__", "").startswith("async_serialize")
        if not of_orbax and (where is not None or text != "Event loop is closed"):
            self._before(unraisable)


def _begin(orbax, path: Path, arrays: dict, documents: dict[str, Any]) -> None:
    """Writes the JSON files and starts writing the arrays, which are copied before this returns."""
    import orbax.checkpoint as ocp

    documents["meta"] |= {
        "arrays": {name: (str(x.dtype), x.shape) for name, x in arrays.items()},
        **_environment(),
    }

    def write() -> None:
        path.mkdir(parents=True)
        for name, document in documents.items():
            (path / f"{name}.json").write_text(json.dumps(document))

    hosts.by_first(write)
    orbax.save(path / "arrays", args=ocp.args.StandardSave(arrays))


def _load(orbax, path: Path, target):
    """Loads the arrays into the tree, onto the devices, of `target`."""
    import orbax.checkpoint as ocp

    expected = {name: (str(np.dtype(x.dtype)), x.shape) for name, x in named_leaves(target).items()}
    stored = {n: (d, tuple(s)) for n, (d, s) in _documents(path)[1]["arrays"].items()}
    for name in {**expected, **stored}:
        if expected.get(name) != stored.get(name):
            raise UserError(
                f"{path} does not fit: {name} is {stored.get(name, 'absent')} there, "
                f"{expected.get(name, 'absent')} here"
            )
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in named_leaves(target).items()
    }
    loaded = orbax.restore(path / "arrays", args=ocp.args.StandardRestore(abstract))
    return jax.tree.unflatten(jax.tree.structure(target), [loaded[name] for name in abstract])


def _of_any(error: BaseException | None) -> BaseException | None:
    """The error of this process's part of a write, or else what another one says of its own."""
    told = hosts.exchange(None if error is None else f"{hosts.name()}: {error}")
    return error or next((OSError(text) for text in told if text is not None), None)


def _documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data, meta = (read_object(path / f"{name}.json") for name in ("data", "meta"))
    check_fields(path / "meta.json", meta, {"arrays": {"name": list}})
    return data, meta


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir())


def _bytes(arrays: Mapping[str, Any]) -> int:
    """The bytes that a checkpoint of the arrays takes, about."""
    return SMALL_FILES + sum(DESCRIBED + x.nbytes for x in arrays.values())


def _on_disk(path: Path) -> int:
    return sum(512 * (path / name).stat().st_blocks for name in _files(path))


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _remove(path: Path, suffix: str = ".tmp") -> None:
    """Deletes a directory so that no half of it keeps its name."""
    doomed = path.with_name(path.name + suffix)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    fault_point("checkpoint:removing")
    shutil.rmtree(doomed)


def _remove_failed(path: Path) -> None:
    """Deletes the directory of a write that failed, until it has stayed away for half a second.

    TensorStore's threads may still be at other files of it, and make the directory again for them.
    """
    absent = 0
    for _ in range(200):
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)
        absent = 0 if path.exists() else absent + 1
        if absent == 10:
            return


def _unused(path: Path, suffix: str) -> Path:
    names = (path.with_name(f"{path.name}{suffix}{n or ''}") for n in range(1000))
    return next(p for p in names if not p.exists())


def _environment() -> dict[str, Any]:
    """Whatever must be the same for a resumed run to be the same bit for bit."""
    return {
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
