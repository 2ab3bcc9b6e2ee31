"""How far people agree who rate replies one by one, each on a scale of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.labelers.__main__ import main
from rlhf_jax.labelers.ratings import alphas, read_ratings, rows


def rating(reply, labeler, label):
    return {"prompt": "Who?", "completion": reply, "labeler": labeler, "label": label}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_ratings_become_a_table_and_the_first_of_a_reply_counts(tmp_path):
    lines = [rating("a", "ann", 0.25), rating("b", "ann", 1), rating("a", "bob", 0.5)]
    names, table = read_ratings(write(tmp_path / "r.jsonl", [*lines, rating("a", "ann", 0.75)]))
    assert names == ["ann", "bob"]
    np.testing.assert_array_equal(table, [[0.25, 1.0], [0.5, np.nan]])


def test_who_agrees_but_for_an_offset_agrees_on_a_scale_of_their_own():
    ann = np.array([0.0, 0.25, 0.5, 0.25, 0.0])
    found = alphas(np.stack([ann, ann + 0.5]))
    assert found["own scale"].value == pytest.approx(1)
    # By hand, of 10 values: D_o = 0.25, D_e = 2 · 10/9 · their variance, 0.035 + 0.0625.
    assert found["interval"].value == pytest.approx(1 - 0.25 / (2 * 10 / 9 * 0.0975))
    assert found["nominal"].of == 5 and found["nominal"].value < 0
    contrary = rows(["ann", "bob"], np.stack([ann, 1 - ann]))
    assert [row[-1] for row in contrary] == ["\u22121.00", "\u22121.00"]
    assert [row[-2] for row in contrary] == ["–", "–"]  # alone nobody agrees


def test_the_command_says_how_far_the_towns_people_agree(capsys):
    assert main(["--ratings", "town/ratings"]) == 0
    said = capsys.readouterr().out
    values = {
        line.partition("α, ")[2].partition(":")[0]: float(line.partition(": ")[2].partition(",")[0])
        for line in said.splitlines()
        if "α, " in line
    }
    assert values["nominal"] < values["ordinal"] < values["own scale"] < 1
    spammer = next(line for line in said.splitlines() if "spammer" in line)
    assert abs(float(spammer.split()[-1].replace("\u2212", "-"))) < 0.1


@pytest.mark.parametrize("line", [rating("a", "", 1), {"prompt": "a", "completion": "b"}])
def test_what_is_no_rating_is_refused_in_one_line(tmp_path, capsys, line):
    assert main(["--ratings", write(tmp_path / "r.jsonl", [line])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "is no rating" in said
