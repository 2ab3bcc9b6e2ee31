"""The reference's log-probs of packed preferences, computed once and kept on disk.

They depend on the model and the data only, so a restart, or a run with another β, finds them. A
file is used only if it is whole and of exactly this model, tokenizer, template and data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.cache import cache_dir
from rlhf_jax.data import packing
from rlhf_jax.data.packing import Arrays
from rlhf_jax.digests import code_digest
from rlhf_jax.errors import NoRoom
from rlhf_jax.evaluation.row_passes import response_logprobs
from rlhf_jax.files import write_whole
from rlhf_jax.training.saved_model import Model, fingerprint


def reference_logprobs(
    reference: Model, directory: Path, arrays: Arrays, tokens: int
) -> np.ndarray:
    """log π_ref of every response of packed groups: f32 [B, P, K] nats.

    Read from `cache_dir()` if they are there, else computed and kept. A file that is damaged or of
    something else is said in a line and replaced; one that cannot be written costs nothing but
    the next run's time.

    Args:
      directory: where `reference` was loaded from.
      tokens: per forward pass.
    """
    key = cache_key(reference, directory, arrays, tokens)
    path = cache_dir() / "reference_logprobs" / f"{key}.npz"
    cached = _read(path, key, arrays["last"].shape)
    everywhere = all(hosts.exchange(cached is not None))
    if cached is not None and everywhere:
        return cached
    logprobs = response_logprobs(
        reference.config, reference.params, arrays, tokens, name="reference"
    )
    try:
        _write(path, key, logprobs)
    except (OSError, NoRoom) as error:
        print(f"the reference's log-probs are not kept: {error}", flush=True)
    return logprobs


def cache_key(reference: Model, directory: Path, arrays: Arrays, tokens: int) -> str:
    """SHA-256 of all that decides the numbers, to the last bit.

    That is this code, the weights and their adapter, the model's config, the tokenizer with its
    template, the packed data, and what rounds them: the library, the devices and the tokens of a
    pass.
    """
    document: dict[str, Any] = {
        "code": code_digest(__name__),
        "weights": fingerprint(directory),
        "adapter": reference.adapter and dataclasses.asdict(reference.adapter),
        "base": reference.base and (reference.base.fingerprint, reference.base.form),
        "config": dataclasses.asdict(reference.config),
        "tokenizer": reference.tokenizer.hash,
        "data": packing.fingerprint(arrays),
        "rounding": (jax.__version__, str(jax.devices()), tokens),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads what `_write` wrote; None where that is not whole."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            logprobs, stated = kept["logprobs"], str(kept["checksum"])
        whole = stated == _checksum(key, logprobs)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        whole = False
    if whole and logprobs.shape == shape:
        print(f"the reference's log-probs are those in {path}", flush=True)
        return logprobs
    print(f"{path} is damaged: the reference's log-probs are computed again", flush=True)
    return None


def _write(path: Path, key: str, logprobs: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez(file, logprobs=logprobs, checksum=np.array(_checksum(key, logprobs)))
    write_whole(path, file.getvalue(), shared=True)


def _checksum(key: str, logprobs: np.ndarray) -> str:
    """A digest of the numbers, their type, their shape and the key they are kept under."""
    content = np.ascontiguousarray(logprobs)
    return hashlib.sha256(
        f"{key} {content.dtype.str} {content.shape}\n".encode() + content.tobytes()
    ).hexdigest()
