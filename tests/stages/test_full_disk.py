"""A disk that fills after training: exit code 75, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import json
import re
import shutil

import pytest

from rlhf_jax.commands import Parser
from rlhf_jax.commands import run as run_command
from rlhf_jax.errors import NoRoom
from tests.stages.conftest import run_main
from tests.training.script import fill

# Fills a disk before the first call of a function, when the config is read.
FILLING = """
import importlib, os, pathlib, sys
sys.path.insert(0, os.getcwd())
from tests.training.script import fill

if "FULL" in os.environ:
    module, name, left, disk = os.environ["FULL"].split(":")
    module = importlib.import_module(module)
    before = getattr(module, name)

    def filling(*arguments, **options):
        if not os.path.exists(f"{disk}/filler"):
            fill(pathlib.Path(disk), int(left))
        return before(*arguments, **options)

    setattr(module, name, filling)
"""
WHEN = {
    "model": "rlhf_jax.stages.sft:save_model:16384",
    "samples.jsonl": "rlhf_jax.evaluation.chat_evaluation:write_jsonl:0",
    "evaluation.json": "rlhf_jax.evaluation.chat_evaluation:write_evaluation:0",
    "report.html": "rlhf_jax.stages.chain:write_report:65536",
}


@pytest.fixture(scope="module")
def killed(experiments, tmp_path_factory):
    """(arguments for an experiment that fills a disk if told to, what a run of it left)."""
    folder = tmp_path_factory.mktemp("killed")
    parent = f"{folder}/pretrain"
    done = run_main(f"--config={experiments}/pretrain.py", f"--workdir={parent}")
    assert done.returncode == 0, done.stderr
    (folder / "filling.py").write_text(FILLING + (experiments / "sft.py").read_text())
    arguments = f"--config={folder}/filling.py", f"--config.init.policy={parent}"
    done = run_main(*arguments, f"--workdir={folder}/run", fault="summary")
    assert done.returncode == -9, done.stderr
    for name in ("samples.jsonl", "evaluation.json", "report.html"):
        (folder / "run" / name).unlink()
    return arguments, folder / "run"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoRoom("/compare.html", 9, "No space left on device"), r"no room for /.* 9 bytes needed,"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room: No space left on device;"),
    ],
)
def test_a_small_command_says_what_has_no_room(error, said, capsys):
    def command(given):
        raise error

    assert run_command(Parser(), command, []) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"stopped: {said}", line) and line.endswith("; make room and run it again")


@pytest.mark.slow
@pytest.mark.parametrize("what", [*WHEN, "made_from.json"])
def test_a_disk_that_fills_after_training(what, killed, disk, monkeypatch):
    arguments, left = killed
    run = shutil.copytree(left, disk / "run")
    command = *arguments, f"--workdir={run}"
    with monkeypatch.context() as environment:
        if what in WHEN:
            environment.setenv("FULL", f"{WHEN[what]}:{disk}")
        else:
            fill(disk)
        done = run_main(*command)
    assert done.returncode == 75, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert re.fullmatch(
        rf"stopped: no room for {run}/{what} \(No space left on device\): \d+ bytes needed, "
        rf"\d+ free in {run}; make room and run the same command to continue",
        *lines,
    )
    assert not list(run.rglob("*.tmp"))
    assert (run / "metrics.jsonl").read_text() == (left / "metrics.jsonl").read_text()

    (disk / "filler").unlink()
    done = run_main(*command)
    assert done.returncode == 0 and "continuing after step 12" in done.stdout, done.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    assert (run / "metrics.jsonl").read_text() == (left / "metrics.jsonl").read_text()
