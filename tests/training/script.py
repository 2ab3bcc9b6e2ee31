"""A whole training run of the stand-in model, for tests of faults: workdir, key=value…

The environment says what goes wrong: see `alter` and `rundir.fault_point`. With TENSORBOARD set
event files are written too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.errors import EXIT_RESUMABLE, EXIT_USER, Preempted, UserError
from rlhf_jax.training.checkpoint import save_params
from rlhf_jax.training.loop import Loop, Train
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step
from tests.training import model

STEPS = 12


def fill(directory: Path, left: int = 0) -> Path:
    """Fills a disk but for `left` bytes, and returns the file that does."""
    path = directory / "filler"
    with open(path, "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - left))
    return path


def alter(number: int, batch):
    """Step 6 has a NaN weight, SIGTERM=k sends the signal while batch k is prepared, for PAUSE s.

    FULL=k:left:directory fills that disk when batch k is prepared and the last checkpoint is whole.
    """
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if number == 6:
        batch["weights"][1, 0] = np.nan
    if os.environ.get("SIGTERM") == str(number):
        os.kill(os.getpid(), signal.SIGTERM)
    step, left, disk = os.environ.get("FULL", "0:0:").split(":")
    if number == int(step):
        while any(Path(sys.argv[1], "checkpoints").glob("*.tmp")):
            time.sleep(0.01)
        fill(Path(disk), int(left))
    return batch


def main(workdir: str, *changes: str) -> None:
    train_config = {"steps": STEPS, "log_every": 2, "checkpoint_every": 4, "checkpoint_minutes": 0}
    config = {"seed": 0, "train": train_config, "optimizer": {"name": "adamw"}}
    for change in changes:
        name, value = change.split("=")
        config["train" if name in config["train"] else "optimizer"][name] = json.loads(value)
    with RunDirectory(workdir, config) as run:
        optimizer, schedule = make_optimizer(config["optimizer"], STEPS)
        state = init_state(model.init(), optimizer, ema=True)
        step = make_step(
            model.loss_fn,
            optimizer,
            microbatches=2,
            max_grad_norm=1.0,
            ema_decay=0.9,
            schedule=schedule,
        )
        evaluate = jax.jit(
            lambda params: model.loss_fn(params, model.make_batch(0), jax.random.key(1))
        )

        def evaluation(state):
            (total, weight), _ = evaluate(state.ema_params)
            return {"eval/loss": float(total / weight)}

        options = Train(**config["train"], eval_every=5, tensorboard="TENSORBOARD" in os.environ)
        batches = model.Batches(alter)
        loop = Loop(options, run, step, batches, evaluation, tokenizer_hash="town")
        state, _ = loop.train(state)
        save_params(run.path / "params", {"p": state.params, "ema": state.ema_params}, {"a": 1})
        run.write_summary({"stage": "script", "status": "done", "steps": int(state.step)})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)
    except Preempted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(EXIT_RESUMABLE)
