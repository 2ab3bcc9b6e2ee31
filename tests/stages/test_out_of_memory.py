"""A lack of memory, the host's or a device's, ends in one line that names what lowers it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.commands import Parser
from rlhf_jax.commands import run as run_command
from rlhf_jax.config import leaves
from rlhf_jax.errors import UserError, lack_of_memory
from rlhf_jax.stages.defaults import STAGES
from rlhf_jax.stages.memory import naming_memory
from tests.fields import fields_of
from tests.stages.conftest import ROOT

HUGE = 1 << 50  # numbers: more than a process can address


def no_fork():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def chained():
    raise RuntimeError(
        "INTERNAL: Error dispatching computation: Out of memory allocating 8192 bytes.\nMore"
    )


def lacking(allocate, *context):
    """What is said when it cannot."""
    with pytest.raises(UserError) as error, naming_memory(*context):
        allocate()
    return str(error.value)


LACKS = {
    "NumPy": (lambda: np.ones(HUGE), r"Unable to allocate 8\.00 PiB for an array with shape"),
    "Python": (lambda: [0] * HUGE, "Python could not allocate"),
    "XLA": (lambda: jnp.ones(HUGE), f"Out of memory allocating {4 * HUGE} bytes"),
    "XLA, a chain of computations": (chained, r"Out of memory allocating \d+ bytes"),
    "system": (no_fork, "Cannot allocate memory"),
}


@pytest.mark.parametrize("kind", LACKS)
def test_what_was_asked_for_is_said(kind, capsys):
    allocate, said = LACKS[kind]
    error = lacking(allocate, fields_of("sft"))
    assert re.match(f"memory ran out: {said}", error)
    assert "\n" not in error
    assert run_command(Parser(), lambda _: allocate(), []) == 2
    assert capsys.readouterr().err.startswith("error: memory ran out: ")


@pytest.mark.parametrize(
    "error",
    [
        UserError("Out of memory"),
        ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device"),
        RuntimeError("INTERNAL: memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_other_errors_are_not_of_memory(error):
    assert lack_of_memory(error) is None
    with pytest.raises(type(error)) as raised, naming_memory(fields_of("sft")):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("stage", STAGES)
def test_the_fields_are_those_the_stage_has(stage):
    config = fields_of(stage)
    words = lacking(no_fork, config).replace("=", " ").split()
    named = {word.removeprefix("--config.") for word in words if word.startswith("--config.")}
    assert named and named <= set(leaves(config))
    if stage != "oracle":
        assert {"batch.microbatches", "batch.rows", "data.row_length"} <= named
        assert ("model.remat" if stage == "pretrain" else "compute.remat") in named
    assert ("rollout.slots" in named) == ("rollout" in config)


def test_what_lowers_nothing_more_is_not_named(tmp_path):
    config = fields_of("sft")
    config.batch.microbatches, config.compute.remat = config.batch.rows, "full"
    said = lacking(no_fork, config, tmp_path)
    assert "microbatches" not in said and "remat" not in said
    assert said.endswith("has no checkpoint yet: the run begins anew")
    for name in ("00000004", "00000008", "00000012.tmp", "00000016.corrupt"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "keeps its checkpoint of step 8: " in lacking(no_fork, config, tmp_path)


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
runpy.run_module("rlhf_jax.main", run_name="__main__", alter_sys=True)
"""
AT_STEP_6 = """
import sys
import jax.numpy as jnp
from rlhf_jax.training import loop
from rlhf_jax.main import main
place, taken = loop.shard_batch, []
def shard_batch(mesh, batch):
    taken.append(batch)
    return place(mesh, batch) if len(taken) < 6 else jnp.ones(1 << 50)
loop.shard_batch = shard_batch
sys.exit(main(sys.argv[1:]))
"""


def run(experiments, workdir, *arguments, code=LIMITED):
    config = f"--config={experiments}/pretrain.py"
    command = [sys.executable, "-c", code, config, f"--workdir={workdir}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (f"--config.model.width={1 << 24}", "Out of memory allocating"),  # of the device
        pytest.param(
            f"--config.data.row_length={1 << 36}",  # of the host
            "Python could not allocate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_asks_for_too_much_ends_in_a_line(experiments, tmp_path, argument, said):
    done = run(experiments, tmp_path / "run", argument)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: memory ran out: {said}")
    assert argument.replace("=", " (now ") in line and "no checkpoint" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_same_command_goes_on_after_memory_ran_out(experiments, tmp_path):
    lacked = run(experiments, tmp_path, code=AT_STEP_6)
    assert lacked.returncode == 2
    assert f"memory ran out: Out of memory allocating {1 << 52} bytes" in lacked.stderr
    assert "keeps its checkpoint of step 4" in lacked.stderr
    again = run(experiments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "continuing after step 4" in again.stdout
