"""A sweep on the command line: what it refuses, what it runs, and that it survives being killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_jax.sweep import forks as forked
from rlhf_jax.sweep import jobs as pool
from rlhf_jax.sweep.__main__ import main
from rlhf_jax.sweep.engines import on_cores
from rlhf_jax.sweep.forks import forks
from rlhf_jax.sweep.grid import Cell, cell_name, make_cells, parse_grid
from rlhf_jax.sweep.jobs import Job, cores_of, run_jobs
from rlhf_jax.sweep.plan import Jobs, Sweep, make_jobs
from rlhf_jax.training.run_lock import acquire, is_held

ROOT = Path(__file__).resolve().parents[2]


def test_the_grid_is_every_combination_and_the_last_field_varies_fastest():
    grid = parse_grid('loss.beta=0.05, 0.1 ;loss.name=sigmoid,ipo; data.train="a=3,b=1"')
    assert grid == {
        "loss.beta": ["0.05", "0.1"], "loss.name": ["sigmoid", "ipo"], "data.train": ["a=3,b=1"]
    }  # fmt: skip
    cells = make_cells(grid)
    assert [cell.values["loss.name"] for cell in cells] == ["sigmoid", "ipo", "sigmoid", "ipo"]
    assert cells[1].name == "beta=0.05,name=ipo,train=a=3,b=1"
    assert cells[1].flags[0] == "--config.loss.beta=0.05"
    assert [cell.name for cell in make_cells({})] == ["all"]


def test_names_are_whole_where_short_ones_stand_for_two_and_fit_a_directory():
    cells = make_cells(parse_grid("loss.name=ppo; advantage.name=group"))
    assert cells[0].name == "loss.name=ppo,advantage.name=group"
    one, other = (cell_name({"x": "x"}, {"x": text}) for text in ("a/b", "a_b"))
    assert other == "x=a_b" and one.startswith("x=a_b-") and "/" not in one
    assert len(cell_name({"x": "x"}, {"x": "y" * 500})) < 200


def test_parents_are_found_as_those_of_a_run_are(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, jobs = ("--config.init.policy=tiny.py:pretrain",), Jobs()
    sweep = Sweep(f"{tiny}:preference", flags, (Cell("all", {}),), Path("runs/more/abl"))
    make_jobs(sweep, sweep.cells, [0], jobs)
    assert [*jobs.shared] == [f"{tiny}:pretrain"]  # which is beside the config, not here
    (job,) = jobs.shared.values()
    assert job.directory == Path("runs/more/tiny-pretrain")
    Path("runs/tiny-pretrain").mkdir(parents=True)
    Path("runs/tiny-pretrain/config.json").write_text("{}")
    jobs = Jobs()
    make_jobs(sweep, sweep.cells, [0], jobs)
    (job,) = jobs.shared.values()
    assert job.directory == Path("runs/tiny-pretrain")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--grid=loss.betta=1,2"],
            "stage has no loss.betta; did you mean loss.beta?",
        ),
        (["--grid=loss.beta=1,high"], "beta=high"),
        (["--grid=loss.beta=0,1"], "beta must be in (0, inf)"),
        (["--grid=loss.name=sigmoid,simpel"], "did you mean 'simpo'?"),
        (["--grid=train.steps=1,2,3", "--max-cells=2"], "3 cells, more than --max-cells=2"),
        (["--grid=train.steps"], "'train.steps' is no field=value,value"),
        (["--grid=train.steps=1,,2"], "is no field=value,value"),
        (["--grid=train.steps=1; train.steps=2"], "train.steps is named twice"),
        (["--grid=seed=1,2"], "seeds are set by --seeds"),
        (['--grid=data.train="a,b'], "a quote that does not end"),
        (["--grid=train.steps=1,2", "--baseline=steps=3"], "did you mean steps="),
        (["--seeds=0"], "--seeds must be at least 1"),
        (["--seeds=many"], "argument --seeds: invalid int value: 'many'"),
        (["--seeds-from=sft"], "no parent of"),
        (["--metric=eval/response_length"], "whether more or less of eval/response_length is"),
        (["--slurm=timeout_min=5"], "--slurm needs --engine=slurm"),
        (["--storage=shared.journal"], "--storage needs --search"),
        (["--colour=red"], "Unknown command line flag 'colour'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tiny, tmp_path, capsys, flags, message):
    where = tmp_path / "runs"
    assert main([f"--config={tiny}:preference", f"--workdir={where}/abl", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not where.exists() and captured.out == ""


def test_a_file_in_place_of_the_directory_is_told_in_a_line(tiny, tmp_path, capsys):
    (tmp_path / "abl").touch()
    assert main([f"--config={tiny}:preference", f"--workdir={tmp_path}/abl"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/abl: File exists\n"


def test_a_second_sweep_is_told_who_holds_the_directory(tiny, tmp_path, capsys):
    lock = acquire(tmp_path / "lock")
    assert main([f"--config={tiny}:preference", f"--workdir={tmp_path}"]) == 2
    assert f"is held by pid {os.getpid()}" in capsys.readouterr().err
    os.close(lock)


def planned(tiny: str, directory: Path, seeds_from: str = "") -> Jobs:
    sweep = Sweep(f"{tiny}:preference", (), (Cell("all", {}),), directory, seeds_from)
    jobs = Jobs()
    make_jobs(sweep, sweep.cells, (0, 1), jobs)
    return jobs


def test_parents_are_shared_and_a_seed_is_of_the_run_alone(tiny, tmp_path):
    jobs = planned(tiny, tmp_path / "abl")
    assert [job.directory for job in jobs.shared.values()] == [tmp_path / "tiny-pretrain"]
    assert [job.directory.name for job in jobs.seeded] == ["all,seed=0", "all,seed=1"]
    start = f"--config.init.policy={tmp_path / 'tiny-pretrain'}"
    assert all(start in job.flags and not job.needs for job in jobs.seeded)
    assert "--config.seed=1" in jobs.runs["all", 1].flags


def test_whole_chains_have_seeds_where_asked_for(tiny, tmp_path):
    jobs = planned(tiny, tmp_path / "abl", "pretrain")
    assert not jobs.shared
    parents = [job.needs[0] for job in jobs.runs.values()]
    assert [job.name for job in jobs.seeded[:2]] == ["tiny-pretrain,seed=0", "all,seed=0"]
    assert "--config.seed=1" in parents[1].flags
    assert f"--config.init.policy={parents[1].directory}" in jobs.runs["all", 1].flags


def test_seeds_that_are_trained_together_come_after_one_job(tiny, tmp_path):
    sweep = Sweep(f"{tiny}:preference", (), (Cell("all", {}),), tmp_path / "abl", together=True)
    jobs = Jobs()
    make_jobs(sweep, sweep.cells, (0, 1), jobs)
    first, *runs = jobs.seeded
    assert [run.needs for run in runs] == [(first,)] * 2
    words = first.words(["--rerun"])
    assert words[:2] == ["rlhf_jax.sweep.together", f"--workdir={first.directory}"]
    assert words.count("--") == words.count("--rerun") == 2
    assert words[-1] == f"--workdir={runs[1].directory}"


SCRIPT = """
import os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[-1].removeprefix("--workdir="))
folder.mkdir(parents=True, exist_ok=True)
tries = folder / "tries"
tries.write_text((tries.read_text() if tries.exists() else "") + "x")
kind = sys.argv[1]
print("first line")
if kind == "fails":
    print("error: this one fails\\nand says more")
    sys.exit(2)
if kind == "killed" and len(tries.read_text()) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "cores").write_text(str(sorted(os.sched_getaffinity(0))))
(folder / "done").touch()
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A module that stands for `rlhf_jax.main`; its runs are done with a file "done"."""
    (tmp_path / "scripted_run.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(pool, "MODULE", "scripted_run")
    monkeypatch.setattr(Job, "is_done", lambda job: (job.directory / "done").exists())


@pytest.mark.parametrize(
    "engines", [forks, pytest.param(lambda: nullcontext(on_cores), marks=pytest.mark.slow)]
)
def test_the_pool_goes_on_after_kills_and_says_why_one_failed(scripted, tmp_path, engines):
    killed = Job("killed", ("killed",), tmp_path / "killed")
    after = Job("after", ("runs",), tmp_path / "after", (killed,))
    fails = Job("fails", ("fails",), tmp_path / "fails")
    never = Job("never", ("runs",), tmp_path / "never", (fails,))
    told: list[Job] = []
    with engines() as engine:
        jobs = [killed, after, fails, never]
        failed = run_jobs(jobs, 2, tmp_path / "logs", told.append, engine=engine)
    assert told == [killed, after]
    why = "error: this one fails"
    assert failed == {fails: why, never: f"fails failed: {why}"}
    assert (tmp_path / "logs" / "fails.log").read_text() == f"first line\n{why}\nand says more\n"
    assert not never.directory.exists()
    tries = {job.name: (job.directory / "tries").read_text() for job in (killed, after, fails)}
    assert tries == {"killed": "xxx", "after": "x", "fails": "x"}
    pinned = [(job.directory / "cores").read_text() for job in told]
    assert all(text in map(str, map(sorted, cores_of(2))) for text in pinned)


def test_runs_that_are_not_trained_together_are_run_one_by_one(
    scripted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pool, "TOGETHER", "no_such_module")
    alone = [Job(str(seed), ("runs",), tmp_path / str(seed)) for seed in range(2)]
    first = Job("both", (), tmp_path / "both", runs=tuple(alone))
    jobs, told = [first, *(replace(job, needs=(first,)) for job in alone)], list[Job]()
    assert run_jobs(jobs, 2, tmp_path / "logs", told.append) == {}
    assert sorted(told, key=lambda job: job.name) == jobs[1:]  # two at a time, either ends first
    printed = capsys.readouterr().out
    assert "both, one by one: " in printed and "No module named no_such_module" in printed


WAITS = """
import json, os, sys, threading, time
from pathlib import Path
from jax._src import xla_bridge
from rlhf_jax.training.run_lock import acquire

print(json.dumps([threading.active_count(), [*xla_bridge._backends], os.getpgrp() == os.getpid()]))
folder = Path(sys.argv[-1].removeprefix("--workdir="))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "tries").open("a") as tries:  # before the lock, by which the test knows of this run
    tries.write("x")
lock = acquire(folder / "lock")
while not (folder / "go").exists():
    time.sleep(0.02)
(folder / "done").touch()
"""


@pytest.mark.slow
def test_a_fork_is_a_process_of_its_own(scripted, tmp_path, monkeypatch):
    (tmp_path / "scripted_run.py").write_text(WAITS)
    job, log = Job("all", (), tmp_path / "all"), tmp_path / "all.log"
    lock, (cores,) = job.directory / "lock", cores_of(1)
    with forks() as engine:
        ended = engine(["scripted_run", f"--workdir={job.directory}"], log, cores)
        wait_for(lambda: is_held(lock))
        first = parent_of(holder(lock))
        ended.send_signal(signal.SIGTERM)
        assert ended.wait() == -signal.SIGTERM
        monkeypatch.setattr(forked, "_package_files", dict)  # code has changed, and is loaded again

        def forked_and_killed(words, log, cores):
            """Kills what a run was forked from once that holds its directory."""
            fork = engine(words, log, cores)
            wait_for(lambda: is_held(lock))
            parent = parent_of(holder(lock))
            assert parent != first and not Path(f"/proc/{first}").exists()
            os.kill(parent, signal.SIGKILL)
            assert fork.wait() == -signal.SIGKILL
            fork.send_signal(signal.SIGTERM)  # is of no one
            (job.directory / "go").touch()
            return fork

        # The run lives, and is waited for.
        assert run_jobs([job], 1, tmp_path, lambda job: None, engine=forked_and_killed) == {}
    assert (job.directory / "tries").read_text() == "xx"
    # No thread and no backend of JAX's was there to be forked, and Ctrl-C is for the sweep.
    assert json.loads(log.read_text()) == [1, [], True]


def test_runs_on_the_same_cores_are_told_apart(scripted, tmp_path, monkeypatch):
    (tmp_path / "unloaded.py").write_text(
        "from rlhf_jax.sweep import forks\nif request := forks._serve(): forks._become(**request)"
    )
    monkeypatch.setattr(forked, "__name__", "unloaded")  # the program, without its seconds of load
    (cores,) = cores_of(1)
    with forks() as engine:
        good, bad = (
            engine(
                ["scripted_run", kind, f"--workdir={tmp_path / kind}"],
                tmp_path / f"{kind}.log",
                cores,
            )
            for kind in ("runs", "fails")
        )
        assert (bad.wait(), good.wait()) == (2, 0)  # the one that was started last is asked first


def test_a_run_that_another_process_holds_is_waited_for(tmp_path, monkeypatch):
    job = Job("held", ("runs",), tmp_path / "held")
    job.directory.mkdir()
    lock = job.directory / "lock"
    code = (
        "import sys, time; from pathlib import Path; from rlhf_jax.training.run_lock import *\n"
        f"acquire(Path({str(lock)!r})); print('held', flush=True); time.sleep(1)\n"
        f"Path({str(job.directory / 'done')!r}).touch()"
    )
    monkeypatch.setattr(Job, "is_done", lambda job: (job.directory / "done").exists())
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n" and is_held(lock)
    assert run_jobs([job], 1, tmp_path / "logs", lambda job: None) == {}
    assert holder.wait() == 0 and not is_held(lock) and not (tmp_path / "logs").exists()


def sweeping(*arguments: str) -> subprocess.Popen:
    """A sweep in a process of its own; its runs share a cache with the other tests."""
    cache = os.path.join(tempfile.gettempdir(), "rlhf_jax_test_derived")
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax.sweep", *arguments],
        cwd=ROOT,
        env={"RLHF_JAX_CACHE": cache} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.01)


def holder(lock: Path) -> int:
    """The process that holds a lock."""
    return json.loads(lock.read_text())["pid"]


def parent_of(process: int) -> int:
    """The process that has started a process."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children_in(folder: Path) -> list[int]:
    """The processes of the runs in a folder, and those that they were forked from."""
    found = set()
    for lock in folder.rglob("*,seed*/lock"):
        with suppress(ValueError, OSError):  # it is let go
            process = holder(lock)
            found |= {process, parent_of(process)}
    return [each for each in sorted(found) if b"sweep.forks" in words_of(each)]


def words_of(process: int) -> bytes:
    """The command line of a process, b"" of one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


@pytest.mark.slow
@pytest.mark.parametrize("together", [(), ("--vmap-seeds",)])
def test_whatever_is_killed_the_table_is_the_same_to_the_last_bit(tiny, tmp_path, together):
    """The driver is killed six times, its children at least four times."""
    grid = "--grid=loss.beta=0.1,0.5; optimizer.learning_rate=1e-2,1e30"  # the last one diverges
    flags = [f"--config={tiny}:preference", grid, "--seeds=2", *together]
    flags.append("--metric=eval/gold_reward")
    whole, killed = tmp_path / "whole" / "abl", tmp_path / "killed" / "abl"
    done = sweeping(*flags, f"--workdir={whole}")
    output, _ = done.communicate(timeout=1200)
    assert done.returncode == 0, output

    dice, kills = random.Random(0), {"driver": 0, "child": 0}
    while True:
        process = sweeping(*flags, f"--workdir={killed}")
        if kills["driver"] >= 6 and kills["child"] >= 4:
            output, _ = process.communicate(timeout=1200)
            assert process.returncode == 0, output
            break
        time.sleep(dice.uniform(3, 12))
        for pid in children_in(killed.parent)[: dice.randint(0, 2)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills["child"] += 1
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)
        kills["driver"] += 1
    for name in ("cells.csv", "outcomes.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
