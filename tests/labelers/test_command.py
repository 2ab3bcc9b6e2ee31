"""`python -m rlhf_jax.labelers`: what it reads, says and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from rlhf_jax.labelers.__main__ import main
from rlhf_jax.labelers.read import arrays_of, read_votes


def vote(prompt, chosen, rejected, labeler, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "labeler": labeler, **more}


def write(path, votes):
    path.write_text("".join(json.dumps(each) + "\n" for each in votes))
    return str(path)


VOTES = [
    vote("Hi?", "Hello there you", "No", "ann", order="chosen_first", pair="x"),
    vote("Hi?", "No", "Hello there you", "bob", order="chosen_first", pair="x", repeat=False),
    vote("Ho?", "Yes", "Never ever", "bob", order="chosen_first", tie=True, seconds=1.5),
    vote("Ho?", "Never ever", "Yes", "ann"),
]


def test_votes_become_arrays(tmp_path):
    votes = arrays_of(read_votes(write(tmp_path / "votes.jsonl", VOTES)), judged=True)
    assert votes.labelers == ("ann", "bob") and votes.quality is None
    assert votes.labeler.tolist() == [0, 1, 1, 0] and votes.pair.tolist() == [0, 0, 1, 1]
    # Which side is a is nobody's choice: the votes about a pair are of opposite sides, or tied.
    assert votes.wins[0] + votes.wins[1] == 1 and votes.wins[2] == 0.5
    assert votes.first[0] == (1 if votes.wins[0] else -1)
    assert votes.first[1] == (1 if votes.wins[1] else -1) and votes.first[3] == 0
    assert abs(votes.features[0, 0]) == 2 and abs(votes.features[1, 0]) == 1


def test_the_command_writes_a_page_and_names_what_cannot_be_told(tmp_path, capsys):
    votes = VOTES + [
        vote(f"{i}?", "</script><b>a", "b c", name, order="chosen_first")
        for i in range(6)
        for name in ("ann", "<i>cyd")
    ]
    out = tmp_path / "page.html"
    assert main([write(tmp_path / "votes.jsonl", votes), f"--out={out}"]) == 0
    said, page = capsys.readouterr().out, out.read_text()
    assert "16 votes by 3 labelers about 8 pairs of replies" in said
    assert "<i>cyd" not in page and "&lt;i&gt;cyd" in page
    assert page.count("<figure>") == 3 and "cannot be told" in page


def test_a_slice_of_a_file_is_as_many_votes(tmp_path, capsys):
    path = write(tmp_path / "votes.jsonl", VOTES)
    assert len(read_votes(f"{path}[:3]")) == 3 and len(read_votes(f"{path}[75%:]")) == 1
    assert main([f"{path}[:9]"]) == 2
    assert "there are only 4 records" in capsys.readouterr().err


def test_who_compares_a_reply_with_itself_says_nothing(tmp_path, capsys):
    votes = [
        vote(f"{i}?", "one reply", "one reply", who, pair=f"same-{i}")
        for i in range(20)
        for who in ("ann", "bob", "cyd")
    ]
    out = f"--out={tmp_path / 'page.html'}"
    assert main([write(tmp_path / "votes.jsonl", [*votes, *VOTES]), out]) == 0
    said = capsys.readouterr().out
    assert "60 votes on the same reply twice are left out" in said
    assert "4 votes by 2 labelers about 2 pairs" in said


def test_a_name_that_is_null_is_none(tmp_path):
    votes = [vote(prompt, "b", "c", "ann", pair=None, order=None) for prompt in ("one", "two")]
    read = read_votes(write(tmp_path / "votes.jsonl", votes))
    assert len(arrays_of(read, judged=False).features) == 2


@pytest.mark.parametrize(
    ("votes", "line"),
    [
        ([vote("a", "b", "c", "")], "no labeler"),
        ([vote("a", "b", "c", None)], "no labeler"),
        ([vote("a", "b", "b", "ann")], "each of 1 votes is on the same reply twice"),
        ([vote("a", "b", "c", "ann", order="left")], "order is one of"),
        ([vote("a", "b", "c", "ann", tie="yes")], "'tie' must be true or false"),
        ([vote("a", "b", "c", "ann", pair="x"), vote("a", "b", "d", "ann", pair="x")], "other"),
        ([{"prompt": "a", "chosen": "b", "labeler": "ann"}], "missing"),
        ([vote("a", "b", "c", "ann", truth="sharp")], "an object of numbers"),
    ],
)
def test_what_is_no_vote_is_refused_in_one_line(tmp_path, capsys, votes, line):
    assert main([write(tmp_path / "votes.jsonl", votes)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and line in said


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("town/pair", "has no labeler"),
        ("town/votes[:0]", "has 0 records, of which 0 are pairs"),
        ("town/arithmetic[:3]", "has 3 records, of which 0 are pairs"),
    ],
)
def test_a_set_without_votes_is_refused(capsys, source, line):
    assert main([source]) == 2
    assert line in capsys.readouterr().err
