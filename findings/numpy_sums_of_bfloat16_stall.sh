#!/usr/bin/env bash
# NumPy 2.4.1 with ml_dtypes 0.5.4 (JAX's bfloat16): sums and means of weights on the host stop at 256.
#
# `np.asarray(weights)` of a bfloat16 array of JAX is an array of ml_dtypes' bfloat16, which computes. A good
# engineer would expect its mean to be rounded to 0.4 %: JAX's own `jnp.mean` is, and so is NumPy's of
# float16, which adds in pairs. Seen: NumPy adds one element after the other and rounds after each, so that
# a sum of ones stays at 256, where adding 1 changes nothing: the mean of 1,000 ones is 0.256, and that of
# 100,000 squares of normal numbers 0.041 in place of 0.99. `std`, `cumsum` and sums along an axis are the
# same; of float8_e4m3fn 100 ones add up to 16. `np.linalg.norm` and products are right. Statistics of weights,
# checks of a checkpoint and averages of models on the host need `.astype(np.float32)` or `dtype=np.float32`.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.1 ml_dtypes==0.5.4
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import ml_dtypes
import numpy as np

squares = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) ** 2
seen = {
    "sum of 1,000 ones": np.ones(1000, ml_dtypes.bfloat16).sum(),
    "its last cumulative sum": np.cumsum(np.ones(1000, ml_dtypes.bfloat16))[-1],
    "mean of 100,000 squares": squares.astype(ml_dtypes.bfloat16).mean(),
    "the same, dtype=np.float32": squares.astype(ml_dtypes.bfloat16).mean(dtype=np.float32),
    "sum of 1,000 ones in float16": np.ones(1000, np.float16).sum(),
    "sum of 100 ones in float8_e4m3fn": np.ones(100, ml_dtypes.float8_e4m3fn).sum(),
}
for what, value in seen.items():
    print(f"{what}: {float(value):.4g}")
ones, last, mean, right, half, eighth = map(float, seen.values())
stalled = ones == last == 256 and mean < 0.1 and eighth == 16
sys.exit(not (stalled and abs(right - 1) < 0.02 and half == 1000))
PYTHON
