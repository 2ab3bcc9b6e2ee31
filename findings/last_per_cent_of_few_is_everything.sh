#!/usr/bin/env bash
# datasets 5.2.0, tensorflow-datasets 4.9.10: the last 1 % of a small split is the whole split.
#
# A per cent in a slice is rounded to the nearest record, and both libraries refuse a slice that rounds to
# nothing. A good engineer who holds out "train[-1%:]" of 40 records would expect that error, as
# "train[99%:]", the same records, gives it. Seen: 1 % of 40 rounds to 0, and what remains of the sign is
# nothing: "[-1%:]" is read as "[0:]" and gives all 40. A model is then evaluated on everything that it was
# trained on, without a word. Its complement "train[:-1%]" is empty (datasets refuses it, TFDS gives a slice
# that ends at 0). So it is of up to 50 records; of 51 it is one record. Count the per cent from the start.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    datasets==5.2.0 tensorflow-datasets==4.9.10
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import sys

import tensorflow_datasets as tfds
from datasets import load_dataset


def of_datasets(count, part):
    with open(f"{count}.jsonl", "w") as file:
        file.writelines(json.dumps({"text": str(i)}) + "\n" for i in range(count))
    try:
        return len(load_dataset("json", data_files=f"{count}.jsonl", split=f"train{part}"))
    except ValueError as error:
        return f"ValueError: {error}"


def of_tfds(count, part):
    whole = {"train": tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0)}
    (read,) = tfds.core.ReadInstruction.from_spec(f"train{part}").to_absolute(whole)
    return len(range(count)[read.from_ : read.to])


for count in (40, 49, 50, 51, 100):
    for part in ("[-1%:]", "[99%:]", "[:-1%]"):
        print(f"{part} of {count}: datasets {of_datasets(count, part)}, tfds {of_tfds(count, part)}")
every = [read(count, "[-1%:]") for read in (of_datasets, of_tfds) for count in (40, 50, 51)]
refused = str(of_datasets(40, "[99%:]")).startswith("ValueError")
sys.exit(every != [40, 50, 1, 40, 50, 1] or not refused or of_tfds(40, "[99%:]") != 0)
PYTHON
