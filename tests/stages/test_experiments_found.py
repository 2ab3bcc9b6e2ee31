"""Where an experiment, its parents and their runs are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.stages.chain import parent_directory
from rlhf_jax.stages.experiments import PACKAGED, find_experiment, names_experiment


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without anything."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("")


def test_a_packaged_experiment_is_found_by_its_name_from_anywhere():
    assert find_experiment("dpo") == f"{PACKAGED}/dpo.py"
    assert find_experiment("dpo:hh") == f"{PACKAGED}/dpo.py:hh"
    assert find_experiment("experiments/dpo.py:hh") == f"{PACKAGED}/dpo.py:hh"
    assert find_experiment("experiments/sft.py", "mine/dpo.py") == f"{PACKAGED}/sft.py"


def test_a_path_is_the_users_own_file():
    write("experiments/dpo.py")
    assert find_experiment("experiments/dpo.py:a") == "experiments/dpo.py:a"
    assert find_experiment("dpo") == f"{PACKAGED}/dpo.py"
    write("elsewhere/experiments/dpo.py")
    assert find_experiment("elsewhere/experiments/dpo.py") == "elsewhere/experiments/dpo.py"


def test_a_parent_is_looked_for_beside_the_config_that_names_it_first():
    for name in ("experiments/sft.py", "copy/experiments/sft.py", "mine/sft.py", "sft.py"):
        write(name)
    assert find_experiment("experiments/sft.py:a", "copy/experiments/dpo.py:b") == (
        "copy/experiments/sft.py:a"
    )
    assert find_experiment("experiments/sft.py", "mine/dpo.py") == "experiments/sft.py"
    assert find_experiment("sft.py", "mine/dpo.py") == "mine/sft.py"
    assert find_experiment("sft.py", "other/dpo.py") == "sft.py"
    packaged = find_experiment("experiments/sft.py", f"{PACKAGED}/dpo.py")
    assert packaged == f"{PACKAGED}/sft.py"


def test_what_is_nowhere_is_told_with_what_there_is():
    with pytest.raises(UserError, match=r"no experiment dp; did you mean dpo\? There are: best_of"):
        find_experiment("dp")
    with pytest.raises(UserError, match=r"a\.py names 'b\.py:c': there is no file b\.py; packaged"):
        find_experiment("b.py:c", "a.py")
    with pytest.raises(UserError, match=r"there is no file other/dpo\.py"):
        find_experiment("other/dpo.py")


def test_the_runs_of_parents_are_beside_or_above_in_runs_or_where_they_are_told_to_be():
    inner = Path("runs/abl/b005")
    assert parent_directory("experiments/sft.py", inner) == Path("runs/abl/sft")
    write("runs/sft/config.json")
    assert parent_directory("experiments/sft.py", inner) == Path("runs/sft")
    assert parent_directory("experiments/sft.py:hh", inner) == Path("runs/abl/sft-hh")
    write("runs/abl/sft/config.json")
    assert parent_directory("experiments/sft.py", inner) == Path("runs/abl/sft")
    other = Path("other")
    assert parent_directory("experiments/sft.py", inner, other) == Path("other/sft")
    # Above what is not in runs/ anything may lie.
    write("sft/config.json")
    assert parent_directory("experiments/sft.py", Path("mine/b005")) == Path("mine/sft")


def test_a_directory_is_no_experiment_whatever_its_path_holds():
    assert names_experiment("experiments/sft.py") and names_experiment("mine.py:variant")
    assert not names_experiment("/home/me/.pyenv/models/sft")
    assert not names_experiment("runs/my.python/sft")
    assert not names_experiment("")
