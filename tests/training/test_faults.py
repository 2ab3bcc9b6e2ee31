"""Promises under faults: real processes are killed, and the files they leave are damaged."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.training.checkpoint import load_params
from rlhf_jax.trees import named_leaves
from tests.training.script import STEPS, fill

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.training.script"]


def environment(**variables: str) -> dict[str, str]:
    faults = ("FAULT", "SIGTERM", "FULL", "TENSORBOARD")
    clean = {k: v for k, v in os.environ.items() if k not in faults}
    return clean | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables


def run(workdir: Path, *changes: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, str(workdir), *changes],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def results(workdir: Path):
    """(final parameters as bytes, metrics lines without wall-clock fields)."""
    assert json.loads((workdir / "summary.json").read_text())["status"] == "done"
    params, _ = load_params(workdir / "params")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return {name: np.asarray(x).tobytes() for name, x in named_leaves(params).items()}, lines


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    params, lines = results(workdir)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]  # every 2, evaluated, last
    assert [line["train/skipped"] for line in lines] == [0, 0, 0, 1, 1, 1, 1]
    assert [line["step"] for line in lines if "eval/loss" in line] == [5, 10, 12]
    assert lines[3]["train/loss"] == "NaN"
    return params, lines


def continue_and_compare(workdir: Path, expected, *changes: str) -> str:
    done = run(workdir, *changes)
    assert done.returncode == 0, done.stderr
    assert results(workdir) == expected
    assert not list(workdir.rglob("*.tmp"))
    return done.stdout


POINTS = [
    "step:1",
    "step:7",
    "checkpoint:begun:8",
    "checkpoint:arrays:8",
    "checkpoint:sealed:4",
    "checkpoint:renamed:8",
    "checkpoint:removing",
    "checkpoint:removed:12",
    "metrics:5",
    "metrics:10",
    "evaluation:10",
    "evaluation:12",
    "summary",
]
QUICK = ("metrics:10",)


@pytest.mark.parametrize(
    "point", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in POINTS]
)
def test_killed_at_a_point_and_restarted_is_bitwise_the_same(point, expected, tmp_path):
    killed = run(tmp_path, FAULT=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "summary.json").exists()
    continue_and_compare(tmp_path, expected)


@pytest.mark.slow
def test_killed_again_and_again_is_bitwise_the_same(expected, tmp_path):
    for point in ("step:3", "checkpoint:sealed:4", "metrics:6", "checkpoint:begun:8", "step:11"):
        assert run(tmp_path, FAULT=point).returncode == -signal.SIGKILL
    continue_and_compare(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_killed_at_any_moment_is_bitwise_the_same(delay, expected, tmp_path):
    process = subprocess.Popen([*COMMAND, str(tmp_path)], cwd=ROOT, env=environment())
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None, "it ended before it wrote a line"
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()
    continue_and_compare(tmp_path, expected)


def test_sigterm_saves_exits_75_and_resumes(expected, tmp_path):
    stopped = run(tmp_path, SIGTERM="7")
    assert stopped.returncode == 75, stopped.stderr
    assert "saved at step 7" in stopped.stderr
    assert "00000007" in os.listdir(tmp_path / "checkpoints")
    assert "continuing after step 7" in continue_and_compare(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_sigterm_at_other_steps(step, expected, tmp_path):
    assert run(tmp_path, SIGTERM=str(step)).returncode == 75
    continue_and_compare(tmp_path, expected)


@pytest.mark.parametrize(
    ("point", "saved"),
    [
        ("evaluation:10", 10),  # where no checkpoint was due
        pytest.param("evaluation:5", 5, marks=pytest.mark.slow),
        pytest.param("evaluation:12", 12, marks=pytest.mark.slow),
        pytest.param("checkpoint:begun:8", 8, marks=pytest.mark.slow),
        pytest.param("checkpoint:sealed:8", None, marks=pytest.mark.slow),
    ],
)
def test_sigterm_at_a_point_saves_what_is_complete(point, saved, expected, tmp_path):
    stopped = run(tmp_path, FAULT=point, FAULT_SIGNAL="SIGTERM")
    assert stopped.returncode == 75, stopped.stderr
    said = re.fullmatch(
        rf"stopped: {tmp_path} is saved at step (\d+); run the same command to continue\n",
        stopped.stderr,
    )
    assert said and saved in (None, int(said[1])), stopped.stderr
    assert f"{int(said[1]):08d}" in os.listdir(tmp_path / "checkpoints")
    assert f"continuing after step {said[1]}" in continue_and_compare(tmp_path, expected)


@pytest.mark.slow
def test_the_last_state_is_whole_before_its_evaluation_begins(expected, tmp_path):
    never = "checkpoint_every=100"
    killed = run(tmp_path, never, FAULT="evaluation:12")
    assert killed.returncode == -signal.SIGKILL
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 10
    assert "continuing after step 12" in continue_and_compare(tmp_path, expected, never)


@pytest.mark.slow
def test_checkpoints_go_by_time_as_well(expected, tmp_path):
    often = "checkpoint_every=100", "checkpoint_minutes=1e-9"
    killed = run(tmp_path, *often, FAULT="step:12", PAUSE="0.15")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = sorted(int(n) for n in os.listdir(tmp_path / "checkpoints") if n.isdigit())
    assert kept and kept[-1] < STEPS
    assert re.search(r"checkpoint of step 1: [\d.]+ MB, copied in .* s, written", killed.stdout)
    output = continue_and_compare(tmp_path, expected, *often)
    assert f"continuing after step {kept[-1]}" in output


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(checkpoint: Path) -> Path:
    arrays = (p for p in (checkpoint / "arrays").rglob("*") if p.is_file())
    return max(arrays, key=lambda p: p.stat().st_size)


DAMAGE = {
    "truncated array": lambda c: truncate(largest(c)),
    "flipped bit": lambda c: flip(largest(c)),
    "flipped bit in data.json": lambda c: flip(c / "data.json"),
    "missing file": lambda c: largest(c).unlink(),
    "extra file": lambda c: (c / "arrays" / "extra").touch(),
    "empty manifest": lambda c: (c / "manifest.json").write_text(""),
    "missing manifest": lambda c: (c / "manifest.json").unlink(),
}


@pytest.mark.parametrize(
    "damage", [d if d == "flipped bit" else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGE]
)
def test_a_damaged_newest_checkpoint_is_set_aside(damage, expected, tmp_path):
    assert run(tmp_path, FAULT="checkpoint:begun:12").returncode == -signal.SIGKILL
    DAMAGE[damage](tmp_path / "checkpoints" / "00000008")
    output = continue_and_compare(tmp_path, expected)
    assert "00000008 is damaged" in output and "set aside as 00000008.corrupt" in output
    assert "continuing after step 4" in output
    assert (tmp_path / "checkpoints" / "00000008.corrupt").is_dir()


def stopped_for_lack_of_room(workdir: Path, what: str, *changes: str, **variables: str) -> None:
    """Runs into a full disk, which is said in one line that says how many bytes are missing."""
    done = run(workdir, *changes, **variables)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if "is dropped" not in line]
    said = re.fullmatch(
        rf"stopped: no room for {workdir}/{what} \(No space left on device\): (\d+) bytes "
        rf"needed, (\d+) free in {workdir}[/\w]*; make room and run the same command to continue",
        "\n".join(lines),
    )
    assert said and int(said[1]) > int(said[2]), done.stderr
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert not list(workdir.rglob("*.tmp"))


EACH_STEP = "log_every=1"  # more than the blocks of a full disk that the file has already


@pytest.fixture(scope="module")
def expected_of_each_step(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("each")
    assert run(workdir, EACH_STEP).returncode == 0
    return results(workdir)


@pytest.mark.slow
def test_a_disk_that_fills_while_metrics_are_written(disk, expected_of_each_step):
    """With TensorBoard's files on it too; checkpoints have no room either."""
    workdir = disk / "run"
    full = {"FULL": f"7:0:{disk}", "TENSORBOARD": "1"}
    stopped_for_lack_of_room(workdir, r"checkpoints/0000\d+", EACH_STEP, **full)
    assert os.listdir(workdir / "checkpoints") == ["00000004"]
    stopped_for_lack_of_room(workdir, r"made_from\.json", EACH_STEP)  # still
    (disk / "filler").unlink()
    output = continue_and_compare(workdir, expected_of_each_step, EACH_STEP)
    assert "continuing after step 4" in output


@pytest.mark.slow
def test_what_was_trained_since_is_saved_where_there_is_room(disk, expected_of_each_step, tmp_path):
    workdir = disk / "run"
    workdir.mkdir()
    (tmp_path / "roomy").mkdir()
    (workdir / "checkpoints").symlink_to(tmp_path / "roomy")
    stopped_for_lack_of_room(workdir, r"metrics\.jsonl", EACH_STEP, FULL=f"7:0:{disk}")
    saved = max(int(path.name) for path in (tmp_path / "roomy").iterdir())
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) < saved - 1
    stopped_for_lack_of_room(workdir, r"made_from\.json", EACH_STEP)
    (disk / "filler").unlink()
    output = continue_and_compare(workdir, expected_of_each_step, EACH_STEP)
    assert f"continuing after step {saved}" in output


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, marks=pytest.mark.slow),  # as the limit below, before any checkpoint
        7,
        pytest.param(12, marks=pytest.mark.slow),
    ],
)
def test_a_disk_without_room_for_a_checkpoint(step, disk, expected):
    """It has room for metrics. The first, the second and the last one, which fills it."""
    workdir = disk / "run"
    stopped_for_lack_of_room(workdir, r"checkpoints/0000\d+", FULL=f"{step}:{2**15}:{disk}")
    assert len(os.listdir(workdir / "checkpoints")) == {2: 0, 7: 1, 12: 2}[step]
    (disk / "filler").unlink()
    continue_and_compare(workdir, expected)


@pytest.mark.slow
def test_tensorboard_on_a_full_disk_costs_one_warning(disk, expected, tmp_path):
    fill(disk)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "tensorboard").symlink_to(disk)
    done = run(workdir, TENSORBOARD="1")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "TensorBoard is dropped, the run goes on without it: OSError: [Errno 28]" in line
    assert results(workdir) == expected


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_as_a_full_disk(expected, tmp_path):
    """Which is tried wherever no disk can be mounted, too."""
    limited = ["bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", *COMMAND, str(tmp_path)]  # KiB
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"stopped: no room for .*/checkpoints/0\d+ \(File too large\): \d+ bytes", line)
    assert os.listdir(tmp_path / "checkpoints") == []
    continue_and_compare(tmp_path, expected)


def test_a_log_on_a_full_disk_loses_lines_and_ends_nothing(tmp_path):
    code = """
import resource, sys
from rlhf_jax.files import tolerate_full_logs
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
tolerate_full_logs()
for number in range(1000):
    print(f"line {number}", flush=number % 2)
    print(f"line {number}", file=sys.stderr)
"""
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, cwd=ROOT)
    assert done.returncode == 0
    assert (tmp_path / "log").read_text().startswith("line 0\nli")


def test_a_log_that_nobody_reads_any_more_ends_nothing():
    """As in `… | tee log`, of which Ctrl-C ends both."""
    code = """
import sys
from rlhf_jax.files import tolerate_full_logs
tolerate_full_logs()
sys.stdin.read()
for number in range(1000):
    print(f"line {number}", flush=number % 2)
    print(f"line {number}", file=sys.stderr)
sys.exit(75)
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    for pipe in (process.stdout, process.stderr, process.stdin):
        pipe.close()
    assert process.wait(60) == 75


def test_a_second_run_and_a_changed_config_exit_2(tmp_path):
    holds = environment(FAULT="checkpoint:renamed:4", FAULT_SIGNAL="SIGSTOP")
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path)], cwd=ROOT, env=holds, stdout=subprocess.DEVNULL
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        second = run(tmp_path)
        assert second.returncode == 2
        assert f"held by pid {process.pid} on host {socket.gethostname()}" in second.stderr
    finally:
        process.kill()
        process.wait()
    changed = run(tmp_path, "warmup_steps=3")
    assert changed.returncode == 2
    assert "made from something else (optimizer.warmup_steps: 'absent' -> 3)" in changed.stderr
