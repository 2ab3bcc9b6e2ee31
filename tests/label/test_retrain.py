"""A reward model from the votes: as a run of its own, with agreement before and after."""

from __future__ import annotations

import time

import pytest

from rlhf_jax.files import write_json
from rlhf_jax.label.book import Refused
from rlhf_jax.label.retrain import Retraining
from rlhf_jax.training.rundir import SUMMARY
from tests.label.test_book import open_book, vote
from tests.test_export import saved


def wait(rounds: Retraining) -> dict:
    """What a round has come to."""
    while (status := rounds.status())["state"] == "running":
        time.sleep(0.2)
    return status


def test_too_few_votes_are_refused_and_a_failed_round_says_why(tmp_path):
    rounds = Retraining(tmp_path / "rounds", tmp_path / "nowhere", ())
    assert rounds.status() == {"state": "none"}
    book = open_book(tmp_path, pairs=30)
    with pytest.raises(Refused, match="too few votes: 0 to train on and 0 held out"):
        rounds.start(book.votes())
    vote(book, "Ann", 30)
    rounds.start(book.votes())
    with pytest.raises(Refused, match="already"):
        rounds.start(book.votes())
    status = wait(rounds)
    assert status["state"] == "failed" and "nowhere" in status["why"]


def test_a_round_that_was_killed_before_it_began_has_failed(tmp_path):
    (tmp_path / "rounds" / "round-1").mkdir(parents=True)
    status = Retraining(tmp_path / "rounds", tmp_path, ()).status()
    assert status["state"] == "failed" and status["why"] == "it ended without a word"


@pytest.mark.slow
def test_a_second_round_is_compared_with_the_first_on_the_same_votes(tmp_path):
    run, *_ = saved(tmp_path, "tiny", max_length=256)
    summary = {"stage": "sft", "status": "done", "config_hash": "0", "parents": {}, "metrics": {}}
    write_json(run / SUMMARY, summary | {"wall_seconds": 1.0})
    options = ["train.steps=3", "optimizer.warmup_steps=1", "optimizer.learning_rate=1e-3",
               "batch.rows=2", "data.row_length=256", "normalize.prompts=8",
               "normalize.max_new_tokens=8"]  # fmt: skip
    flags = [f"--config.{option}" for option in options]
    book = open_book(tmp_path / "labels", pairs=60)
    vote(book, "Ann", 30)
    rounds = Retraining(tmp_path / "labels" / "rounds", run, flags)
    rounds.start(book.votes())
    first = wait(rounds)
    assert first["state"] == "done" and first["against"] == "untrained", first
    vote(book, "Ann", 20)
    rounds.start(book.votes())
    # Another server, as after a kill: the run goes on, and the comparison is made all the same.
    second = wait(Retraining(tmp_path / "labels" / "rounds", run, flags))
    assert second["state"] == "done" and second["against"] == "round 1", second
    assert second["held_out"] > first["held_out"] and second["trained"] > first["trained"]
    low, high = second["interval"]
    assert 0 <= low <= second["after"] <= high <= 1 and 0 <= second["before"] <= 1
