#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, and 0.12: a process that joins others no longer hears SIGTERM.
#
# A good engineer would set a handler, as everywhere, to save when a cluster asks for the machine, and
# call jax.distributed.initialize after it. Seen: the signal is swallowed. JAX's preemption service
# installs a handler of its own in C++ in place of Python's, of which `signal.getsignal` does not know
# and says that ours is in place. With jax_enable_preemption_service=False ours is called.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$work"
cat > joins.py <<'PYTHON'
import os
import signal
import socket
import sys
import time

import jax

heard = []


def hear(*_):
    heard.append("SIGTERM")


signal.signal(signal.SIGTERM, hear)
jax.config.update("jax_enable_preemption_service", sys.argv[1] == "on")
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
assert signal.getsignal(signal.SIGTERM) is hear
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
print(len(heard))
PYTHON
on=$(JAX_PLATFORMS=cpu "$work/venv/bin/python" joins.py on 2> /dev/null)
off=$(JAX_PLATFORMS=cpu "$work/venv/bin/python" joins.py off 2> /dev/null)
echo "signals heard with the service: $on, without: $off"
[ "$on" = 0 ] && [ "$off" = 1 ]
