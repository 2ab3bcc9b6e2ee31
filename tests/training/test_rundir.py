"""The run directory: lock, configuration, whole files, signals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from ml_collections import ConfigDict, config_dict

from rlhf_jax.errors import NoRoom, Preempted, UserError
from rlhf_jax.files import write_json
from rlhf_jax.stopping import stop_asked, stop_point
from rlhf_jax.training.origin import changes, plain, tell_changes
from rlhf_jax.training.rundir import RunDirectory

CONFIG = {
    "seed": 1,
    "data": {"train": "town"},
    "optimizer": {"learning_rate": 0.1},
    "train": {"steps": 5, "log_every": 2},
}


def changed(section, field, value):
    config = json.loads(json.dumps(CONFIG))
    config[section][field] = value
    return config


def test_a_config_dict_is_kept_as_plain_json(tmp_path):
    config = ConfigDict({"a": (1, 2), "b": {"c": config_dict.placeholder(float), "d": 1e-4}})
    assert plain(config) == {"a": [1, 2], "b": {"c": None, "d": 1e-4}}
    with RunDirectory(tmp_path / "run", config) as run:
        assert json.loads((run.path / "config.json").read_text()) == run.config
    with RunDirectory(tmp_path / "run", config):
        pass


def test_changes_are_named_by_dotted_field():
    old = {"a": {"b": 1, "c": 2}, "d": {}}
    new = {"a": {"b": 1, "c": 3, "e": 4}}
    assert changes(old, new) == {
        "a.c": (2, 3),
        "a.e": ("absent", 4),
        "d": ({}, "absent"),
    }


MADE_FROM = {
    "version": "1.0",
    "commit": "abc",
    "code": {"losses/preference.py": "0a"},
    "contents": {"data.train: pairs.jsonl": "0b", "eval.source: prompts.jsonl": "0c"},
    "parents": {"policy": "0d"},
}


def begun(path, made_from=None):
    """A run that has a checkpoint."""
    with RunDirectory(path, CONFIG, made_from) as run:
        (run.path / "checkpoints" / "00000002").mkdir(parents=True)


def test_what_would_change_the_run_is_refused_and_said_once(tmp_path, capsys):
    begun(tmp_path)
    with (
        pytest.raises(UserError, match=r"something else \(data.train: 'town' -> 'hh'\); --rerun"),
        RunDirectory(tmp_path, changed("data", "train", "hh")),
    ):
        pass
    assert not capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert (tmp_path / "lock").read_text() == ""  # which another host may take then
    with RunDirectory(tmp_path, CONFIG):  # the refusal released the lock
        pass


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"version": "2.0"}, r"\(version: '1.0' -> '2.0'\)"),
        ({"code": {"losses/preference.py": "1"}}, r"\(losses/preference.py has changed\)"),
        (
            {"contents": MADE_FROM["contents"] | {"data.train: pairs.jsonl": "1"}},
            r"\(data.train: pairs.jsonl has changed\)",
        ),
        ({"parents": {"policy": "1"}}, r"\(the model of init.policy has changed\)"),
    ],
)
def test_other_inputs_make_another_run(tmp_path, part, said):
    begun(tmp_path, MADE_FROM)
    with pytest.raises(UserError, match=said), RunDirectory(tmp_path, CONFIG, MADE_FROM | part):
        pass


def test_commit_and_prompts_of_the_evaluation_are_free(tmp_path, capsys):
    begun(tmp_path, MADE_FROM)
    contents = MADE_FROM["contents"] | {"eval.source: prompts.jsonl": "1"}
    now = MADE_FROM | {"commit": "def", "contents": contents}
    with RunDirectory(tmp_path, CONFIG, now):
        pass
    assert capsys.readouterr().out == f"{tmp_path}: eval.source: prompts.jsonl has changed\n"
    assert json.loads((tmp_path / "made_from.json").read_text()) == now


def test_another_evaluation_takes_the_older_one_out_of_tensorboard_too(tmp_path):
    begun(tmp_path, MADE_FROM)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval/loss": 0.5}\n')
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    contents = MADE_FROM["contents"] | {"eval.source: prompts.jsonl": "1"}
    with RunDirectory(tmp_path, CONFIG, MADE_FROM | {"contents": contents}):
        pass
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "metrics.1.jsonl").exists()
    assert (tmp_path / "tensorboard.1" / "events").exists()


def test_a_run_that_recorded_no_inputs_is_another(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"stage": "sft"}))
    (tmp_path / "made_from.json").unlink()
    with (
        pytest.raises(UserError, match=r"\(version: 'absent' -> '1.0'\)"),
        RunDirectory(tmp_path, CONFIG | {"stage": "sft"}, MADE_FROM),
    ):
        pass


def test_the_config_of_a_model_from_elsewhere_is_not_overwritten(tmp_path):
    text = '{"model_type": "llama"}'
    (tmp_path / "config.json").write_text(text)
    with (
        pytest.raises(UserError, match="is no run directory"),
        RunDirectory(tmp_path, CONFIG, MADE_FROM, rerun=True),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == text


def test_rerun_keeps_the_old_run_under_the_next_free_name(tmp_path, capsys):
    run = tmp_path / "dpo"
    other = changed("data", "train", "hh")
    begun(run)
    (tmp_path / "dpo.1").mkdir()
    with RunDirectory(run, other, rerun=True):
        assert not (run / "checkpoints").exists()
        with pytest.raises(UserError, match="held by"), RunDirectory(run, other):
            pass
    assert json.loads((run / "config.json").read_text()) == other
    assert json.loads((tmp_path / "dpo.2" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "dpo.2" / "checkpoints" / "00000002").is_dir()
    out = capsys.readouterr().out
    assert out == f"{run}: data.train: 'town' -> 'hh'\n{run} is kept as {run}.2\n"
    begun(run.with_name("same"))
    with RunDirectory(run.with_name("same"), CONFIG, rerun=True):  # nothing differs
        assert (run.with_name("same") / "checkpoints").exists()


def test_a_finished_run_is_another_even_without_checkpoints(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.write_summary({"status": "done"})
    with (
        pytest.raises(UserError, match=r"a finished run .*data\.train"),
        RunDirectory(tmp_path, changed("data", "train", "hh")),
    ):
        pass


def test_the_working_directory_is_not_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun(".")
    with (
        pytest.raises(UserError, match=r"^\. is the working directory"),
        RunDirectory(".", changed("data", "train", "hh"), rerun=True),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "made_from", "said"),
    [
        (changed("train", "log_every", 7), MADE_FROM, r"\(train\.log_every: 2 -> 7\)"),
        (
            CONFIG,
            MADE_FROM | {"contents": MADE_FROM["contents"] | {"eval.source: prompts.jsonl": "1"}},
            r"\(eval\.source: prompts\.jsonl has changed\)",
        ),
    ],
)
def test_a_finished_run_is_not_replaced_whatever_changes(tmp_path, config, made_from, said):
    run = tmp_path / "dpo"
    with RunDirectory(run, CONFIG, MADE_FROM) as held:
        (run / "checkpoints" / "00000005").mkdir(parents=True)
        held.write_summary({"status": "done"})
    with pytest.raises(UserError, match=said), RunDirectory(run, config, made_from):
        pass
    with RunDirectory(run, config, made_from, rerun=True):  # goes on: only its evaluation differs
        assert (run / "checkpoints" / "00000005").exists()
    kept = tmp_path / "dpo.1"
    assert (kept / "summary.json").exists() and (kept / "checkpoints" / "00000005").exists()
    assert json.loads((kept / "config.json").read_text()) == CONFIG
    with RunDirectory(kept, CONFIG, MADE_FROM):
        pass


def test_a_first_try_that_failed_does_not_block_the_next(tmp_path, capsys):
    run = tmp_path / "dpo"
    with RunDirectory(run, CONFIG, MADE_FROM):
        pass
    other = changed("data", "train", "hh")
    with RunDirectory(run, other, MADE_FROM | {"version": "2"}):
        assert json.loads((run / "config.json").read_text()) == other
        assert not capsys.readouterr().out
        (run / "checkpoints" / "00000002.tmp").mkdir(parents=True)
        (run / "before.json").touch()
    with RunDirectory(run, other, MADE_FROM | {"version": "2"}):  # the same goes on
        assert (run / "before.json").exists()
    with RunDirectory(run, CONFIG, MADE_FROM):  # of which nothing may be taken for this one's
        assert not (run / "before.json").exists()
    assert capsys.readouterr().out == f"{run} is kept as {run}.1\n"
    assert (tmp_path / "dpo.1" / "before.json").exists()


def test_what_changes_no_number_is_free(tmp_path, capsys):
    begun(tmp_path)
    with RunDirectory(tmp_path, changed("train", "log_every", 7)):
        pass
    assert "train.log_every: 2 -> 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["train"]["log_every"] == 7


@pytest.mark.parametrize("section, field", [("train", "eval_every"), ("eval", "during")])
def test_evaluations_that_choose_the_model_are_not_free(tmp_path, section, field):
    config = CONFIG | {"eval": {"during": 4}}
    config["train"] = config["train"] | {"best": "eval/loss", "eval_every": 2}
    with RunDirectory(tmp_path, config, MADE_FROM) as run:
        (run.path / "checkpoints" / "00000002").mkdir(parents=True)
    other = config | {section: config[section] | {field: 9}}
    with pytest.raises(UserError, match=rf"{section}\.{field}: . -> 9"):
        RunDirectory(tmp_path, other, MADE_FROM).__enter__()
    contents = MADE_FROM["contents"] | {"eval.source: prompts.jsonl": "1"}
    with pytest.raises(UserError, match=r"eval\.source: prompts\.jsonl has changed"):
        RunDirectory(tmp_path, config, MADE_FROM | {"contents": contents}).__enter__()
    logged = config | {"train": config["train"] | {"log_every": 7}}
    with RunDirectory(tmp_path, logged, MADE_FROM):  # which still is
        pass


def test_a_longer_run_is_another_run(tmp_path):
    begun(tmp_path)
    longer = changed("train", "steps", 50)
    with pytest.raises(UserError, match=r"train\.steps: 5 -> 50"), RunDirectory(tmp_path, longer):
        pass


def test_many_differences_are_counted():
    many = {f"code.{i}.py": ("0", "1") for i in range(8)} | {"seed": (0, 1)}
    many |= {"contents.data.train: x": ("absent", "1")}  # follows from another difference
    assert tell_changes(many, limit=2) == "seed: 0 -> 1, 0.py has changed and 7 more"


@pytest.mark.parametrize("name", ["config.json", "made_from.json"])
@pytest.mark.parametrize("text", ["[1]", "{", "3", "null", '{"code": [], "code": {}}'])
def test_a_file_that_is_no_object_is_a_user_error(tmp_path, name, text):
    begun(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name), RunDirectory(tmp_path, CONFIG):
        pass


@pytest.mark.parametrize("changes", [{"code": []}, {"version": 1}, {"parents": {"policy": []}}])
def test_a_made_from_of_another_shape_is_a_user_error(tmp_path, changes):
    begun(tmp_path, MADE_FROM)
    (tmp_path / "made_from.json").write_text(json.dumps(MADE_FROM | changes))
    (name,) = changes
    said = rf"made_from\.json is not as this package writes it: {name} is of another type"
    with pytest.raises(UserError, match=said), RunDirectory(tmp_path, CONFIG, MADE_FROM):
        pass


def test_a_held_directory_names_its_holder(tmp_path):
    message = f"held by pid {os.getpid()} on host {socket.gethostname()}"
    with RunDirectory(tmp_path, CONFIG), pytest.raises(UserError, match=message):
        RunDirectory(tmp_path, CONFIG).__enter__()
    with RunDirectory(tmp_path, CONFIG):
        pass


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_process_is_taken_over_even_if_its_child_holds_it(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": dead_pid(), "host": socket.gethostname()}))
    code = f"import fcntl, time; f = open({str(lock)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1)"
    orphan = subprocess.Popen(
        [sys.executable, "-uc", code + "; time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        orphan.stdout.readline()
        with RunDirectory(tmp_path, CONFIG):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
            with pytest.raises(UserError, match="held by"), RunDirectory(tmp_path, CONFIG):
                pass
    finally:
        orphan.kill()
        orphan.wait()
        orphan.stdout.close()


def test_the_lock_of_another_host_is_not_taken_over(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(UserError, match=r"pid 1 on host elsewhere.*delete"):
        RunDirectory(tmp_path, CONFIG).__enter__()


def test_the_lock_of_the_same_job_on_another_host_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "job": "7"}))
    with RunDirectory(tmp_path, CONFIG):
        pass
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "job": "6"}))
    with pytest.raises(UserError, match="elsewhere"):
        RunDirectory(tmp_path, CONFIG).__enter__()


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .*file/run"):
        RunDirectory(tmp_path / "file" / "run", CONFIG).__enter__()


def test_a_signal_stops_a_run_at_the_next_point_or_its_end(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM"), RunDirectory(tmp_path, CONFIG):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_asked()
    assert not stop_asked()
    with pytest.raises(Preempted, match="SIGINT"), RunDirectory(tmp_path, CONFIG):
        with RunDirectory(tmp_path / "inner", CONFIG):
            stop_point()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Preempted), RunDirectory(tmp_path / "inner", CONFIG):
            stop_point()
        assert stop_asked()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_are_not_listened_to_from_another_thread(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with RunDirectory(tmp_path, CONFIG):
            stop_point()
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is before


def test_the_wall_time_of_earlier_processes_counts(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.earlier_seconds = 100.0
        assert 100 <= run.wall_seconds() < 110
        run.write_summary({"status": "done"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "done"}


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_there_is_no_room_for_leaves_the_old_file(tmp_path, code, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fsync(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    free = r"\d+ free in " + re.escape(str(tmp_path))
    with pytest.raises(
        NoRoom, match=rf"file\.json \({os.strerror(code)}\): 12 bytes needed, {free}"
    ):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_directory_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full)
        with pytest.raises(NoRoom, match="make room and run the same command"):
            RunDirectory(tmp_path / "run", CONFIG).__enter__()
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.write_summary({"status": "done"})
    (tmp_path / "run" / "samples.jsonl").write_text("{}\n")

    def copy(source, target, **_):
        os.mkdir(target)
        raise shutil.Error([(source, target, f"[Errno 28] {os.strerror(errno.ENOSPC)}")])

    monkeypatch.setattr(shutil, "copytree", copy)
    changed = CONFIG | {"eval": {"count": 9}}
    with pytest.raises(NoRoom, match=r"run\.1\.tmp"):
        RunDirectory(tmp_path / "run", changed, rerun=True).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


def constant(steps, **further):
    optimizer = {"learning_rate": 0.1, "schedule": "constant"}
    return {"optimizer": optimizer, "train": {"steps": steps}} | further


@pytest.mark.parametrize("done", [True, False])
def test_a_run_goes_on_to_more_steps_under_a_constant_rate(tmp_path, done, capsys):
    with RunDirectory(tmp_path / "run", constant(5)) as run:
        (run.path / "checkpoints/00000005").mkdir(parents=True)
        if done:
            run.write_summary({"status": "done"})
    with RunDirectory(tmp_path / "run", constant(9)) as run:
        assert json.loads((run.path / "config.json").read_text())["train"] == {"steps": 9}
        assert not (run.path / "summary.json").exists()
        assert (run.path / "summary-5.json").exists() == done
        assert (run.path / "checkpoints/00000005").is_dir()
    assert "run goes on: train.steps: 5 -> 9" in capsys.readouterr().out
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (constant(3), r"train\.steps: 5 -> 3\); --rerun"),
        (constant(9, seed=2), r"seed: 'absent' -> 2, train\.steps: 5 -> 9\); --rerun"),
    ],
)
def test_a_run_goes_on_to_nothing_else(tmp_path, config, said):
    with RunDirectory(tmp_path / "run", constant(5)) as run:
        run.write_summary({"status": "done"})
    with pytest.raises(UserError, match=said), RunDirectory(tmp_path / "run", config):
        pass
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("section", ["optimizer", "critic"])
def test_a_rate_that_decays_over_the_steps_does_not_go_on(tmp_path, section):
    def config(steps):
        return constant(steps) | {section: {"schedule": "cosine"}}

    with RunDirectory(tmp_path / "run", config(5)) as run:
        run.write_summary({"status": "done"})
    said = rf"train\.steps: 5 -> 9; {section}\.schedule = 'cosine' depends on the number of steps"
    with pytest.raises(UserError, match=said), RunDirectory(tmp_path / "run", config(9)):
        pass
