"""Eight fake CPU devices for every test, and a compilation cache that all processes share."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "rlhf_jax_test_cache")
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
