"""The cache: data, log-probs and compiled code that later runs need not make again."""

from __future__ import annotations

import atexit
import contextlib
import glob
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Where all of it is kept: $RLHF_JAX_CACHE, else ~/.cache/rlhf_jax."""
    return Path(os.environ.get("RLHF_JAX_CACHE") or Path.home() / ".cache" / "rlhf_jax")


_SEAL = ".sha256"  # beside an entry of JAX's: the digest it had when its process ended
_FAILED = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)'")


def keep_compilations() -> None:
    """Lets JAX find what it has compiled before, under `cache_dir()`, in a folder a processor.

    Code for one processor may not run on another that shares the home directory. A damaged entry,
    which JAX would neither use nor write again, is removed. A JAX_COMPILATION_CACHE_DIR that is set
    is left alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_dir() / "compilations" / processor_name()
    if jax.__version_info__ < (0, 12):  # a cache of XLA's own puts the folder's path in every key
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    with contextlib.suppress(OSError):  # a cache that cannot be used costs no run
        _remove_damaged(folder)
    atexit.register(_seal, folder)
    warnings.showwarning = _removing(folder, warnings.showwarning)


def _remove_damaged(folder: Path) -> None:
    """Removes what is not what was sealed: JAX may run it, since zstd keeps no checksum."""
    for seal in folder.glob(f"*{_SEAL}"):
        entry = seal.with_suffix("")
        if not entry.exists() or seal.read_text("utf-8", "replace") != _digest(entry):
            entry.unlink(missing_ok=True)
            seal.unlink(missing_ok=True)


def _seal(folder: Path) -> None:
    """Seals every entry that has no seal yet, this process's and those of killed ones."""
    with contextlib.suppress(OSError):
        for entry in folder.glob("*-cache"):
            seal = entry.with_name(entry.name + _SEAL)
            if not seal.exists():
                seal.write_text(_digest(entry))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _removing(folder: Path, show: Callable) -> Callable:
    """`warnings.showwarning` that removes an entry which JAX says it cannot read or write whole.

    JAX names the module alone, so that all entries of its name go.
    """

    def shown(message, *rest, **named) -> None:
        if failed := _FAILED.match(str(message)):
            for file in folder.glob(f"{glob.escape(failed[1])}-*"):
                with contextlib.suppress(OSError):
                    file.unlink()
        show(message, *rest, **named)

    return shown


def processor_name() -> str:
    """A name of what this host's processor can do, which is what CPU programs round by."""
    can = {platform.machine(), platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        can |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    except OSError:
        pass  # of Linux only
    return hashlib.sha256("\n".join(sorted(can)).encode()).hexdigest()[:12]
