#!/usr/bin/env bash
# jax 0.10.2, and 0.12: what processes tell each other is cut to 32 bits on the way, without a word.
#
# `multihost_utils.broadcast_one_to_all` and `process_allgather` take NumPy arrays and are what one uses to
# agree on a seed, a time in milliseconds, a file's size or a count of tokens. A good engineer would expect
# an int64 to arrive as it was sent: `jnp.asarray(2**40)` of a Python number raises, and these are not
# arithmetic. Seen, with two processes: NumPy's int64 of 2^40 + 1 arrives as 1, also on the process that
# sent it, 3,000,000,000 tokens are gathered as -1,294,967,296 each, and float64 loses half of its digits.
# Send such numbers as text, as bytes (uint8) or as two halves, or set jax_enable_x64.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$work"
cat >process.py <<'PYTHON'
import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
seed = multihost_utils.broadcast_one_to_all(np.int64(2**40 + 1))
tokens = multihost_utils.process_allgather(np.int64(3_000_000_000))
third = multihost_utils.process_allgather(np.float64(1 / 3))
print(json.dumps([int(seed), tokens.tolist(), float(third[0]) == 1 / 3]))
PYTHON
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
JAX_PLATFORMS=cpu venv/bin/python process.py 1 "$port" >second 2>/dev/null &
JAX_PLATFORMS=cpu venv/bin/python process.py 0 "$port" 2>/dev/null | tail -n 1 >first
wait
first=$(tail -n 1 first) second=$(tail -n 1 second)
echo "of 2^40 + 1, 3,000,000,000 and 1/3 arrive: $first and on the other process: $second"
[ "$first" = '[1, [-1294967296, -1294967296], false]' ] && [ "$second" = "$first" ]
