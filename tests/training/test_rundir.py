"""The run directory: lock, configuration, whole files, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict, config_dict

from rlhf_jax.errors import Preempted, UserError
from rlhf_jax.training.rundir import RunDirectory, config_changes, plain, write_json

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
    assert config_changes(old, new) == {
        "a.c": (2, 3),
        "a.e": ("absent", 4),
        "d": ({}, "absent"),
    }


def test_what_would_change_the_run_is_refused_and_printed(tmp_path, capsys):
    with RunDirectory(tmp_path, CONFIG):
        pass
    with (
        pytest.raises(UserError, match=r"another config \(data.train: 'town' -> 'hh'\)"),
        RunDirectory(tmp_path, changed("data", "train", "hh"), allow_changes=True),
    ):
        pass
    assert "config changed: data.train: 'town' -> 'hh'" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    with RunDirectory(tmp_path, CONFIG):  # the refusal released the lock
        pass


def test_what_changes_no_number_is_free(tmp_path, capsys):
    with RunDirectory(tmp_path, CONFIG):
        pass
    with RunDirectory(tmp_path, changed("train", "log_every", 7)):
        pass
    assert "train.log_every: 2 -> 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["train"]["log_every"] == 7


def test_steps_and_learning_rate_change_when_the_user_says_so(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        pass
    longer = changed("train", "steps", 50)
    with pytest.raises(UserError, match=r"train\.steps: 5 -> 50"), RunDirectory(tmp_path, longer):
        pass
    with RunDirectory(tmp_path, longer, allow_changes=True):
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


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .*file/run"):
        RunDirectory(tmp_path / "file" / "run", CONFIG).__enter__()


def test_a_signal_stops_at_once_or_when_the_loop_is_ready(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM"), RunDirectory(tmp_path, CONFIG):
        os.kill(os.getpid(), signal.SIGTERM)
    with RunDirectory(tmp_path, CONFIG) as run:
        run.defer_stop = True
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process(tmp_path):
    code = """
import os, signal, sys
from rlhf_jax.training.rundir import RunDirectory
with RunDirectory(sys.argv[1], {}) as run:
    run.defer_stop = True
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 130


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
