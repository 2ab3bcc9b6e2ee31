#!/usr/bin/env bash
# Grain 0.2.18: how many workers read decides which records form a batch, and how many are dropped.
#
# `worker_count` of `DataLoader` and `num_workers` of `mp_prefetch` look like options of speed, and results
# are said to be deterministic. A good engineer would expect the same batches for any number. Seen: each
# worker takes every n-th record and forms batches of its own. Of 20 records in batches of 3 with
# drop_remainder a DataLoader gives 18 with no worker, one and two, in other batches, and 12 with four. The
# same holds for what filters, packs or batches after `to_iter_dataset()`. So a run repeated on a machine
# with more cores is another run. A `MapDataset` that is batched before it is made an iterator gives the
# same batches for any number of workers.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grain==0.2.18
cd "$work"
cat >batches.py <<'PYTHON'
import sys

import grain
from absl import flags

BATCH = {"batch_size": 3, "drop_remainder": True}


def loader(workers):
    sampler = grain.samplers.IndexSampler(20, num_epochs=1, seed=0)
    operations = [grain.transforms.Batch(**BATCH)]
    return grain.DataLoader(
        data_source=range(20), sampler=sampler, operations=operations, worker_count=workers
    )


def filtered(workers):
    records = grain.MapDataset.source(range(20)).to_iter_dataset()
    return prefetched(records.filter(lambda x: x % 5 != 0).batch(**BATCH), workers)


def batched_first(workers):
    return prefetched(grain.MapDataset.source(range(20)).batch(**BATCH).to_iter_dataset(), workers)


def prefetched(batches, workers):
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
    return batches.mp_prefetch(options) if workers else batches


if __name__ == "__main__":
    flags.FLAGS(sys.argv)  # workers read flags of Grain's
    counts = {}
    for way in (loader, filtered, batched_first):
        batches = [[batch.tolist() for batch in way(workers)] for workers in (0, 1, 2, 4)]
        counts[way.__name__] = [sum(map(len, each)) for each in batches]
        same = [each == batches[0] for each in batches]
        print(way.__name__, "records", counts[way.__name__], "the same batches", same)
        counts[way.__name__] += same
    expected = {
        "loader": [18, 18, 18, 12, True, True, False, False],
        "filtered": [15, 15, 12, 12, True, True, False, False],
        "batched_first": [18, 18, 18, 18, True, True, True, True],
    }
    sys.exit(counts != expected)
PYTHON
venv/bin/python -W ignore batches.py
