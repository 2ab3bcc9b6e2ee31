"""Characters of Shakespeare: nanoGPT's CPU recipe beside ours, interleaved, imports and all.

    python benchmarks/shakespeare.py --nanogpt=DIR --torch-python=PYTHON [--rounds=3]

DIR is a checkout of https://github.com/karpathy/nanoGPT whose data/shakespeare_char is prepared;
PYTHON is an interpreter with torch. Prints one JSON line a run, then the medians: wall seconds of
the whole process and its validation loss in nats a character.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From nanoGPT's README, "I only have a macbook", but for --device and --compile as it says there.
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def nanogpt(folder: str, python: str) -> float:
    """Trains nanoGPT's recipe; returns its last estimate of the validation loss (240 windows)."""
    done = _run([python, "train.py", *RECIPE.split()], folder)
    return float(re.findall(r"val loss ([\d.]+)", done)[-1])


def ours(variant: str) -> float:
    """Trains a variant of experiments/pretrain.py; returns the loss over the validation split."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/{variant}"
        command = f"-m rlhf_jax.main --config=experiments/pretrain.py:{variant} --workdir={run}"
        _run([sys.executable, *command.split()], ROOT)
        return json.loads(Path(run, "summary.json").read_text())["metrics"]["eval/loss"]


def _run(command: list[str], folder: str | Path) -> str:
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {
        "nanogpt": lambda: nanogpt(options.nanogpt, options.torch_python),
        "shakespeare_char": lambda: ours("shakespeare_char"),
        "shakespeare_char_best": lambda: ours("shakespeare_char_best"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            losses[name].append(run())
            seconds[name].append(time.perf_counter() - start)
            line = {"run": name, "seconds": round(seconds[name][-1], 1), "loss": losses[name][-1]}
            print(json.dumps(line), flush=True)
    for name in runs:
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds["nanogpt"])
        loss = statistics.median(losses[name])
        print(f"{name:22} {median:6.1f} s  {ratio:.2f} of nanoGPT's  loss {loss:.3f}")


if __name__ == "__main__":
    main()
