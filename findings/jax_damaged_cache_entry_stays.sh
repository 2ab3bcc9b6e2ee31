#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2: a damaged entry of the compilation cache is never replaced.
#
# A good engineer would expect a cache to heal: what cannot be read is compiled again, and written
# over. Seen: an entry that was cut in half is compiled again and warned of in every process, since a
# key that exists is never written; the file keeps its half. So a full disk or a kill in the middle
# of a write costs that compilation for good, until somebody deletes the file.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$work"
cat > compiles.py <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", "cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(sum("persistent compilation cache entry" in str(w.message) for w in caught))
PYTHON
run() { JAX_PLATFORMS=cpu "$work/venv/bin/python" compiles.py; }
run > first
"$work/venv/bin/python" - <<'PYTHON'
import pathlib

for entry in pathlib.Path("cache").glob("jit__lambda*-cache"):
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
PYTHON
sizes() { stat -c %s cache/jit__lambda*-cache; }
cut=$(sizes)
second=$(run)
third=$(run)
echo "warnings: whole $(cat first), cut $second, again $third; bytes of the cut entry: $cut, after two more runs $(sizes)"
[ "$second" -gt 0 ] && [ "$third" -gt 0 ] && [ "$(sizes)" = "$cut" ]
