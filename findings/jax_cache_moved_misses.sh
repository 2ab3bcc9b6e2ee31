#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2: a compilation cache that is moved has none of its entries any more.
#
# A good engineer would copy the folder to another machine, or mount it elsewhere, and expect hits:
# the key is said to be of the program, the compiler's options and the backend. Seen: the same
# program gets another key, because the options name a folder of XLA's own caches inside the cache's.
# With jax_persistent_cache_enable_xla_caches="none" the keys are the same.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$work"
cat > compiles.py <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if len(sys.argv) > 2:
    jax.config.update("jax_persistent_cache_enable_xla_caches", sys.argv[2])
jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))).block_until_ready()
PYTHON
keys() {
  JAX_PLATFORMS=cpu "$work/venv/bin/python" compiles.py "$work/$1" ${2:-}
  find "$work/$1" -name 'jit__lambda*-cache' -printf '%f\n'
}
here=$(keys here)
there=$(keys there)
plain_here=$(keys plain_here none)
plain_there=$(keys plain_there none)
echo "by default: $here and $there"
echo "without XLA's caches: $plain_here and $plain_there"
[ "$here" != "$there" ] && [ "$plain_here" = "$plain_there" ]
