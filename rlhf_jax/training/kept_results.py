"""What follows from a saved model and data alone, computed once and kept on disk.

A restart, or another run on the same model and data, finds it. A file is used only if it is whole
and of exactly this code, model, tokenizer, template and data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.cache import cache_dir, processor_name
from rlhf_jax.digests import code_digest
from rlhf_jax.errors import NoRoom
from rlhf_jax.files import write_whole
from rlhf_jax.training.mesh import mesh_under
from rlhf_jax.training.saved_model import Model, fingerprint


def kept_result(
    kind: str, what: str, key: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of `compute`, read from `cache_dir()` if they are there, else computed and kept.

    A file that is damaged or of something else is said in a line and replaced; one that cannot be
    written costs nothing but the next run's time.

    Args:
      kind: the folder of the cache. what: what messages call the arrays.
      key: see `result_key`.
    """
    path = cache_dir() / kind / f"{key}.npz"
    kept = _read(path, what, key)
    everywhere = all(hosts.exchange(kept is not None))
    if kept is not None and everywhere:
        return kept
    arrays = compute()
    try:
        _write(path, key, arrays)
    except (OSError, NoRoom) as error:
        print(f"{what} are not kept: {error}", flush=True)
    return arrays


def result_key(module: str, model: Model, directory: Path, tokens: int, data: Any) -> str:
    """SHA-256 of all that decides a result, to the last bit.

    That is the code, the weights and their adapter, the model's config, the tokenizer with its
    template, the data, and what rounds: the library, the host's processor, the kinds of the
    devices, the mesh that the model lies on and the tokens of a pass.

    Args:
      module: the name of the module that computes. directory: where `model` was loaded from.
      data: what the model is asked, or a digest of it, as JSON has it.
    """
    mesh, kinds = mesh_under(model.params), [each.device_kind for each in jax.devices()]
    document: dict[str, Any] = {
        "code": code_digest(module),
        "weights": fingerprint(directory),
        "adapter": model.adapter and dataclasses.asdict(model.adapter),
        "base": model.base and (model.base.fingerprint, model.base.form),
        "config": dataclasses.asdict(model.config),
        "tokenizer": model.tokenizer.hash,
        "data": data,
        "rounding": (jax.__version__, processor_name(), kinds, mesh and dict(mesh.shape), tokens),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(path: Path, what: str, key: str) -> dict[str, np.ndarray] | None:
    """Reads what `_write` wrote; None where that is not whole."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        if str(arrays.pop("checksum")) == _checksum(key, arrays):
            print(f"{what} are those in {path}", flush=True)
            return arrays
    # zipfile says RuntimeError or its NotImplementedError of damage that looks like encryption or
    # a method of compression that it does not know.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        pass
    print(f"{path} is damaged: {what} are computed again", flush=True)
    return None


def _write(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    checksum = np.array(_checksum(key, arrays))
    np.savez(file, **arrays, checksum=checksum)  # type: ignore[arg-type]
    write_whole(path, file.getvalue(), shared=True)


def _checksum(key: str, arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of the numbers, their types, their shapes and the key they are kept under."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        content = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {content.dtype.str} {content.shape}\n".encode())
        digest.update(content.tobytes())
    return digest.hexdigest()
