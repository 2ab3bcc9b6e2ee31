"""SIGTERM at any moment of a whole run: it ends with 75, and the same command with the same end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.training.checkpoint import load_params
from rlhf_jax.trees import named_leaves
from tests.stages.conftest import run_main, started

TRIES, SEED = 40, 17
PARENTS = ("pretrain", "sft")


def results(run: Path):
    """(parameters as bytes, lines of metrics without times, what the report shows)."""
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    params, _ = load_params(run / "model")
    texts = [(run / name).read_text() for name in ("samples.jsonl", "evaluation.json")]
    return {n: np.asarray(x).tobytes() for n, x in named_leaves(params).items()}, lines, texts


@pytest.fixture(scope="module")
def whole(experiments, tmp_path_factory):
    """(experiments, a folder with the run and its parents, what it came to)."""
    runs = tmp_path_factory.mktemp("whole")
    done = run_main(f"--config={experiments}/dpo.py", f"--workdir={runs}/dpo")
    assert done.returncode == 0, done.stderr[-3000:]
    return experiments, runs, results(runs / "dpo")


def command(experiments: Path, runs: Path) -> tuple[str, str]:
    return f"--config={experiments}/dpo.py", f"--workdir={runs}/dpo"


def start(experiments: Path, runs: Path) -> subprocess.Popen:
    """The command in a process of its own; what it prints goes to a file."""
    with open(runs / "output", "w") as output:
        return started(*command(experiments, runs), output=output)


def copied(runs: Path, to: Path) -> Path:
    """A folder with the parents alone."""
    for parent in PARENTS:
        shutil.copytree(runs / parent, to / parent)
    return to


def waits_for(process: subprocess.Popen, library: str) -> None:
    """Until the process has loaded a shared library of that name."""
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.005)


@pytest.mark.slow
def test_a_stop_before_the_report_is_no_end(experiments, tmp_path):
    pretrain = f"--config={experiments}/pretrain.py", f"--workdir={tmp_path}/pretrain"
    stopped = run_main(*pretrain, "--config.train.steps=2", fault="report", signal="SIGTERM")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    said = "stopped: SIGTERM received; run the same command to continue"
    assert stopped.stderr.splitlines()[-1] == said
    assert not (tmp_path / "pretrain/report.html").exists()
    done = run_main(*pretrain, "--config.train.steps=2")
    assert done.returncode == 0 and "continuing after step 2" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "pretrain/report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process has loaded")
def test_stopped_in_its_evaluation_an_import_the_report_and_its_last_file(whole, tmp_path):
    experiments, runs, expected = whole
    there = copied(runs, tmp_path)

    def stops(fault: str) -> str:
        stopped = run_main(*command(experiments, there), fault=fault, signal="SIGTERM")
        assert stopped.returncode == 75, stopped.stderr[-3000:]
        return stopped.stdout

    stops("evaluation:12")
    assert not (there / "dpo/model").exists()
    process = start(experiments, there)
    waits_for(process, "ft2font")  # Matplotlib's import has come half its way
    process.terminate()
    assert process.wait(60) == 75, (there / "output").read_text()
    assert "continuing after step 12" in (there / "output").read_text()
    assert not (there / "dpo/report.html").exists()
    stops("report")
    assert not (there / "dpo/report.html").exists()
    stops("summary")
    done = run_main(*command(experiments, there))
    assert done.returncode == 0 and "reusing" in done.stdout, done.stderr[-3000:]
    assert results(there / "dpo") == expected


@pytest.mark.slow
def test_stopped_at_random_moments_of_a_whole_run(whole, tmp_path):
    """40 times, and in every eighth its parents are run as well."""
    experiments, runs, expected = whole
    rng, seconds, codes = random.Random(SEED), {}, []

    def folder(name: str, alone: bool) -> Path:
        (tmp_path / name).mkdir()
        return copied(runs, tmp_path / name) if alone else tmp_path / name

    for alone in (True, False):
        began, there = time.monotonic(), folder(f"whole-{alone}", alone)
        assert start(experiments, there).wait() == 0
        seconds[alone] = time.monotonic() - began
    while len(codes) < TRIES:
        alone = len(codes) % 8 > 0
        there = folder(f"{len(codes)}", alone)
        process = start(experiments, there)
        delay = rng.uniform(0, seconds[alone])
        try:
            process.wait(delay)
            shutil.rmtree(there)  # it was faster than the one that was measured
            continue
        except subprocess.TimeoutExpired:
            process.terminate()
        codes.append(process.wait(120))
        output = (there / "output").read_text()
        # Before the handlers stand nothing is said; once all is said Python itself ends.
        done = output.endswith(f"report: {there}/dpo/report.html\n")
        allowed = 0 if done else 75 if output else -signal.SIGTERM
        assert codes[-1] in (75, allowed), f"after {delay:.2f} s: {output[-3000:]}"
        assert start(experiments, there).wait(300) == 0, (there / "output").read_text()[-3000:]
        assert results(there / "dpo") == expected, f"after {delay:.2f} s: {output[-3000:]}"
        shutil.rmtree(there)
    print({code: codes.count(code) for code in {*codes}})
