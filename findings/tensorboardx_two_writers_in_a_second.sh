#!/usr/bin/env bash
# tensorboardX 2.6.5: of two writers that begin in one second only the last one's events are left.
#
# A writer begins an event file of its own in the directory that it is given, so a good engineer would
# expect two of them (a training and an evaluation loop, or two processes that start together) to be
# shown together, as TensorBoard merges the files of a directory. Seen: the file is named after the whole
# second and the host, and not after the process, and is opened for writing anew. The second writer
# truncates what the first had written, and if both stay open their records are written over each other.
# Nothing is said. Give each writer a `filename_suffix` of its own, such as the process's number.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorboardX==2.6.5 tensorboard==2.20.0
cd "$work"
venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter


def written(suffixes):
    """Files and curves that are left of writers of a curve each, begun within one second."""
    directory = tempfile.mkdtemp()
    while time.time() % 1 > 0.1:
        time.sleep(0.01)
    for name, suffix in suffixes.items():
        with SummaryWriter(directory, filename_suffix=suffix) as writer:
            writer.add_scalar(name, 1.0, 1)
    events = EventAccumulator(directory)
    events.Reload()
    return len([*Path(directory).iterdir()]), events.Tags()["scalars"]


alike = written({"train": "", "evaluation": ""})
apart = written({"train": ".1", "evaluation": ".2"})
print("as they are: files and curves", *alike)
print("with suffixes: files and curves", *apart)
sys.exit(alike != (1, ["evaluation"]) or apart != (2, ["train", "evaluation"]))
PYTHON
