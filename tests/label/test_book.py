"""Votes as they are stored, read again and read by the reward and preference stages."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.records import Message, Pair
from rlhf_jax.errors import UserError
from rlhf_jax.label.book import AGAIN, CHECK_EVERY, Refused
from rlhf_jax.label.files import SKIPS, VOTES, LabelFiles, make_comparison
from rlhf_jax.label.retrain import split_votes
from rlhf_jax.tasks.sources import read_records
from tests.label.canned import open_book

READING = ConfigDict({"data": {"max_bad_fraction": 0.0, "columns": ""}})


def better(shown) -> str:
    """The key that prefers the answer that says it is good."""
    return "1" if shown["answers"][0].startswith("good") else "2"


def vote(book, name, count, choose=better):
    """Answers what is shown, and returns what was."""
    seen = []
    for _ in range(count):
        shown = book.showing(name)["shown"]
        assert book.answer(name, shown["id"], choose(shown), 1.5)
        seen.append(shown)
    return seen


def lines_of(folder, name=VOTES):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_vote_is_a_line_that_states_all_there_is(tmp_path):
    book = open_book(tmp_path)
    (shown,) = vote(book, "Ann", 1)
    first = shown["answers"][0].startswith("good")
    assert lines_of(tmp_path) == [
        {
            "prompt": shown["turns"][0]["content"],
            "chosen": shown["answers"][not first],
            "rejected": shown["answers"][first],
            "order": "chosen_first" if first else "rejected_first",
            "models": {"chosen": "runs/a", "rejected": "runs/b"},
            "seed": 7,
            "select": "random",
            "meta": {"topic": "numbers"},
            "labeler": "Ann",
            "seconds": 1.5,
            "pair": shown["id"],
            "number": 0,
        }
    ]
    assert not {"models", "seed", "candidate"} & shown.keys()  # blind


def test_the_stages_read_the_file_as_it_is_and_leave_ties_out(tmp_path, capsys):
    book = open_book(tmp_path, repeat_every=0)
    vote(book, "Ann", 4)
    vote(book, "Ann", 1, lambda shown: "0")
    vote(book, "Ann", 1, lambda shown: "s")
    pairs = read_records(READING, str(tmp_path / VOTES), "preference", "train")
    assert "4 records of {'chosen', 'prompt', 'rejected'}" in (said := capsys.readouterr().out)
    assert "ties left out: 1" in said
    assert [type(each) for each in pairs] == [Pair] * 4
    for pair, line in zip(pairs, lines_of(tmp_path), strict=False):
        assert pair.prompt == (Message("user", line["prompt"]),)
        assert (pair.chosen, pair.rejected) == (line["chosen"], line["rejected"])
        assert pair.chosen.startswith("good") and pair.rejected.startswith("bad")
        assert pair.meta["labeler"] == "Ann" and pair.meta["topic"] == "numbers"
        assert json.loads(pair.meta["models"]) == line["models"]
    assert (
        len(read_records(READING, str(tmp_path / VOTES), "prompt", "train")) == 5
    )  # the tie's too
    tie = lines_of(tmp_path)[-1]
    assert tie["tie"] is True and tie["order"] == "chosen_first"
    assert len(lines_of(tmp_path, SKIPS)) == 1


@pytest.mark.parametrize(("tie", "wrong"), [('"yes"', "bad tie"), ("true", "ties alone")])
def test_a_file_of_ties_alone_or_of_other_ties_is_refused(tmp_path, tie, wrong):
    line = f'{{"prompt": "p", "chosen": "a", "rejected": "b", "tie": {tie}}}\n'
    (tmp_path / "votes.jsonl").write_text(line)
    with pytest.raises(UserError, match=wrong):
        read_records(READING, str(tmp_path / "votes.jsonl"), "pair", "train")


def test_another_process_goes_on_where_the_first_one_was_killed(tmp_path):
    vote(open_book(tmp_path), "Ann", 7)
    shown = open_book(tmp_path).showing("Ann")
    assert shown["yours"] == 7
    alone = tmp_path / "alone"
    alone.mkdir()
    unbroken = open_book(alone)
    vote(unbroken, "Ann", 7)
    assert unbroken.showing("Ann") == shown


def test_an_answer_that_is_sent_twice_is_stored_once(tmp_path):
    book = open_book(tmp_path)
    (shown,) = vote(book, "Ann", 1)
    for again in (book, open_book(tmp_path)):
        assert again.answer("Ann", shown["id"], better(shown), 9.0)  # the same
        assert not again.answer("Ann", shown["id"], "0", 9.0)  # another, which is not taken
    assert len(lines_of(tmp_path)) == 1


def test_a_torn_last_line_is_cut_off_and_another_one_is_the_users(tmp_path, capsys):
    vote(open_book(tmp_path), "Ann", 2)
    whole = (tmp_path / VOTES).read_bytes()
    (tmp_path / VOTES).write_bytes(whole + whole[:40])
    assert open_book(tmp_path).showing("Ann")["yours"] == 2
    assert "not written to its end" in capsys.readouterr().out
    assert (tmp_path / VOTES).read_bytes() == whole
    (tmp_path / VOTES).write_bytes(b"{]\n" + whole)
    with pytest.raises(UserError, match=r"votes.jsonl:1 is not JSON"):
        open_book(tmp_path)


def test_a_vote_that_the_disk_did_not_take_is_not_in_the_file(tmp_path, monkeypatch):
    book = open_book(tmp_path)
    vote(book, "Ann", 1)

    def fail(_):
        raise OSError(5, "Input/output error")

    shown = book.showing("Ann")["shown"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr("rlhf_jax.label.files.os.fsync", fail)
        book.answer("Ann", shown["id"], "1", 1.0)
    assert len(lines_of(tmp_path)) == 1
    assert book.answer("Ann", shown["id"], "2", 1.0) and len(lines_of(tmp_path)) == 2


def test_undo_takes_back_the_last_answers_one_by_one(tmp_path):
    book = open_book(tmp_path)
    first, second = vote(book, "Ann", 2)
    vote(book, "Ben", 1)
    with pytest.raises(Refused, match="only the last"):
        book.undo("Ann", first["id"])
    for _ in range(2):  # the second time as when the answer to the first one was lost
        book.undo("Ann", second["id"])
        assert book.showing("Ann")["shown"]["id"] == second["id"]
    assert [line["labeler"] for line in lines_of(tmp_path)] == ["Ann", "Ben"]
    book = open_book(tmp_path)
    assert book.showing("Ann")["last"] == first["id"]
    book.undo("Ann", first["id"])
    assert [line["labeler"] for line in lines_of(tmp_path)] == ["Ben"]
    assert book.answer("Ann", first["id"], "2", 1.0)


def test_every_kth_pair_comes_again_with_its_sides_swapped(tmp_path):
    book = open_book(tmp_path, repeat_every=5)
    seen = {shown["id"]: shown for shown in vote(book, "Ann", 24)}
    again = [name for name in seen if name.endswith(AGAIN)]
    assert [[*seen].index(name) for name in again] == [5, 11, 17, 23]
    for name in again:
        assert seen[name]["answers"] == seen[name.removesuffix(AGAIN)]["answers"][::-1]
    assert [line.get("repeat", False) for line in lines_of(tmp_path)].count(True) == 4
    assert book.showing("Ann")["repeats"] == [4, 4]
    vote(book, "Ann", 6, lambda shown: "1")
    assert book.showing("Ann")["repeats"] == [4, 5]  # who takes the first one contradicts himself


def test_another_k_after_a_restart_asks_for_no_pair_a_third_time(tmp_path):
    vote(open_book(tmp_path, repeat_every=10), "Ann", 22)
    seen = vote(open_book(tmp_path, repeat_every=5), "Ann", 10)  # asserts that each is stored
    again = [shown["id"] for shown in seen if shown["id"].endswith(AGAIN)]
    lines = lines_of(tmp_path)
    assert len(lines) == 32 and len({(each["pair"], "repeat" in each) for each in lines}) == 32
    firsts = [line["pair"] for line in lines if "repeat" not in line]
    # The first and the eleventh were asked for before.
    assert again == [firsts[i] + AGAIN for i in (5, 15, 20)]


def test_sides_are_drawn_by_lot(tmp_path):
    book = open_book(tmp_path, pairs=200, overlap=2, repeat_every=0)
    for name in ("Ann", "Ben"):
        firsts = sum(s["answers"][0].startswith("good") for s in vote(book, name, 200))
        assert 70 < firsts < 130  # of 200; beyond with a probability of 2e-5
    lines = lines_of(tmp_path)
    orders = {(line["labeler"], line["pair"]): line["order"] for line in lines}
    same = sum(orders["Ann", pair] == orders["Ben", pair] for _, pair in orders) / 2
    assert 70 < same < 130


def test_gold_checks_come_between_and_say_whether_they_were_seen(tmp_path):
    checks = [
        make_comparison(
            (Message("user", f"Check {i}"),), (f"good check {i}", f"bad check {i}"), {},
            models=("gold.jsonl", "gold.jsonl"), seed=None, check=True,
        )
        for i in range(3)
    ]  # fmt: skip
    book = open_book(tmp_path, repeat_every=0, checks=checks)
    seen = vote(book, "Ann", 2 * CHECK_EVERY + 2)
    places = [i for i, s in enumerate(seen) if s["turns"][0]["content"].startswith("Check")]
    assert places == [CHECK_EVERY, 2 * CHECK_EVERY + 1]
    vote(book, "Ann", CHECK_EVERY)
    vote(book, "Ann", 1, lambda shown: "0")  # the third one
    said = [line["check"] for line in lines_of(tmp_path) if "check" in line]
    assert said == [True, True, False] and book.showing("Ann")["checks"] == [2, 3]
    assert not any("check" in line for part in split_votes(book.votes()) for line in part)


def test_labelers_share_the_pairs_and_each_pair_gets_its_votes(tmp_path):
    book = open_book(tmp_path, pairs=40, overlap=2, repeat_every=0)
    names = ["Ann", "Ben", "Cid"]

    def work(name):
        while (said := book.showing(name))["shown"]:
            book.answer(name, said["shown"]["id"], better(said["shown"]), 1.0)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = lines_of(tmp_path)
    assert len({(line["labeler"], line["pair"]) for line in lines}) == len(lines)
    votes = Counter(line["pair"] for line in lines)
    # One of two that vote at the same time may be one too many; none is one too few.
    assert len(votes) == 40 and min(votes.values()) == 2 and sum(votes.values()) <= 82
    assert book.showing("Ann")["state"] == "done"


def test_a_pair_before_one_labeler_is_not_given_to_another_while_there_are_others(tmp_path):
    book = open_book(tmp_path, pairs=3, repeat_every=0)
    ann, ben = (book.showing(name)["shown"]["id"] for name in ("Ann", "Ben"))
    assert ann != ben and book.showing("Ann")["shown"]["id"] == ann
    (third,) = vote(book, "Ben", 1)
    vote(book, "Ben", 1)
    assert third["id"] == ben
    assert book.showing("Ben")["shown"]["id"] == ann  # Ann may never come back


def test_other_settings_are_another_directory(tmp_path):
    open_book(tmp_path)
    with pytest.raises(UserError, match=r"was begun with made = 'by hand'.*--out"):
        LabelFiles(tmp_path, {"made": "otherwise"})


def test_a_round_holds_out_whole_prompts_and_counts_no_vote_twice(tmp_path):
    book = open_book(tmp_path, pairs=60, overlap=2)
    vote(book, "Ann", 50)
    vote(book, "Ben", 20)
    train, held_out = split_votes(book.votes())
    assert not {v["prompt"] for v in train} & {v["prompt"] for v in held_out}
    assert 4 <= len({v["prompt"] for v in held_out}) <= 20
    firsts = [v for v in book.votes() if not v.get("repeat")]
    assert len(train) + len(held_out) == len(firsts) < 70
