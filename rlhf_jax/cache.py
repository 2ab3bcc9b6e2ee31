"""What later runs need not prepare, score or compile again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Where all of it is kept: $RLHF_JAX_CACHE, else ~/.cache/rlhf_jax."""
    return Path(os.environ.get("RLHF_JAX_CACHE") or Path.home() / ".cache" / "rlhf_jax")


def keep_compilations() -> None:
    """Lets JAX find what it has compiled before, under `cache_dir()`, in a folder a processor.

    Code for one processor may not run on another that shares the home directory. A
    JAX_COMPILATION_CACHE_DIR that is set is left alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_dir() / "compilations" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A name of what the processor can do."""
    can = {platform.machine(), platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        can |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    except OSError:
        pass  # of Linux only
    return hashlib.sha256("\n".join(sorted(can)).encode()).hexdigest()[:12]
