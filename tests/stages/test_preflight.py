"""The preflight: its numbers by hand, what it prints, and what it needs."""

from __future__ import annotations

import io
import json

import pytest

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation.statistics import auc, wilson_interval
from rlhf_jax.stages import defaults
from rlhf_jax.stages.preference_rows import pack_preferences, read_preferences
from rlhf_jax.stages.preflight import (
    choose_example,
    decode_stretches,
    encode_judged,
    encode_prompts,
    encode_whole,
    measure,
    show,
    show_example,
)
from tests.stages.conftest import run_main

TOKENIZER = train_bpe(["x"], 263)  # every byte a token


def user(text):
    return (Message("user", text),)


def measured(records, limit, judged, *, mismatched=False):
    if judged:
        encoded = encode_judged(records, TOKENIZER, limit, "error", mismatched=mismatched)
    elif isinstance(records[0], Prompt):
        encoded = encode_prompts(records, TOKENIZER)
    else:
        encoded, _ = encode_whole(records, TOKENIZER)
    return measure(records, records, encoded, limit, judged=judged)


PAIRS = [
    Pair("0", user("ab"), "long", "no"),
    Pair("1", user("ab"), "no", "long"),
    Pair("2", user("ab"), "long", "no"),
    Pair("3", user("abcd"), "same", "same"),
    Pair("4", user("z"), "longest", ""),
]


def test_pairs_by_hand():
    # A turn is its role, a space and its bytes, and <|end|>; a prompt has BOS and ends in a role.
    found = measured(PAIRS, 20, True)
    assert (found.records, found.sampled) == (5, 5)
    assert found.lengths["prompt"] == [6, 7, 9, 9, 9]
    assert found.lengths["chosen"] == [4, 6, 9, 9, 9]
    assert found.lengths["rejected"] == [1, 4, 6, 6, 6]
    assert found.lengths["whole"] == [16, 17, 21, 21, 21]
    assert found.over_long == 1 / 5
    assert found.trained == pytest.approx((10 + 10 + 10 + 12 + 10) / (17 * 3 + 21 + 16))
    assert (found.duplicates, found.contradictory, found.identical) == (1, 3, 1)
    low, high = wilson_interval(3.5, 5)
    wins = auc([6, 4, 6, 6, 9], [4, 6, 4, 6, 1])
    assert found.length == {"accuracy": 0.7, "low": low, "high": high, "auc": wins}
    # Beside each is the next pair's chosen reply to another prompt, not of a pair of one reply
    # twice: 9 tokens four times, and 6.
    found = measured(PAIRS, 26, True, mismatched=True)
    assert found.lengths["reply to another prompt"] == [6, 9, 9, 9, 9]
    assert found.lengths["whole"] == [22, 26, 30, 30, 30]
    assert found.over_long == 1 / 5
    assert found.trained == pytest.approx((10 + 10 + 10 + 12 + 10) / (26 * 3 + 30 + 22))


def test_conversations_by_hand():
    turns = (*user("a"), Message("assistant", "b"), *user("c"), Message("assistant", "dd"))
    records = [Conversation(str(i), turns, {"label": "true"}) for i in range(3)]
    found = measured(records, 99, False)
    # BOS, then 4, 4, 4 and 5 tokens, of which 3 and 4 are replies and their ends.
    assert found.lengths == {"prompt": [14] * 5, "reply": [4] * 5, "whole": [18] * 5}
    assert found.trained == 7 / 18 and found.over_long == 0
    assert (found.duplicates, found.contradictory, found.identical) == (2, None, None)
    assert found.length == {}
    bad = Conversation("bad", turns, {"label": "0"})
    short = Conversation("short", (*user("a"), Message("assistant", "")), {"label": "false"})
    judged = measured([*records, bad, short], 99, True)
    assert judged.contradictory == 4 and judged.duplicates == 2
    assert judged.trained == (4 * 4 + 1) / (4 * 18 + 7)
    assert judged.length == {"auc": (3 * 0.5 + 3) / 6}


def test_prompts_have_nothing_to_train():
    found = measured([Prompt("0", user("a"))], 5, False)
    assert found.lengths == {"prompt": [6] * 5} and (found.trained, found.over_long) == (0, 1)
    out = io.StringIO()
    show("mine.jsonl", found, "over rollout.max_prompt_tokens = 5: left out", file=out)
    assert "tokens trained: those of answers, when they are drawn\n" in out.getvalue()


def test_what_is_printed(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out = io.StringIO()
    show("mine.jsonl", measured(PAIRS, 20, True), "over data.row_length = 20: dropped", file=out)
    show_example(encode_judged(PAIRS[:1], TOKENIZER, 64, "error")[0], TOKENIZER, file=out)
    text = " ".join(out.getvalue().replace("\u00a0", " ").split())
    for expected in (
        "mine.jsonl: 5 of 5 records",
        "over data.row_length = 20: dropped, 20.0 %",
        "exact duplicates: 1",
        "contradicted by another: 3",
        "both replies the same, left out: 20.0 %",
        "the longer reply is the chosen one: 70.0 % (",
        "<|bos|><|user|> ab<|end|><|assistant|>[[ long<|end|>]][[ no<|end|>]]",
    ):
        assert expected in text, text


@pytest.mark.parametrize("paired", [True, False])
def test_what_is_shown_of_kto_is_what_is_packed(tmp_path, paired):
    replies = {"chosen": "long", "rejected": "no"} if paired else {"completion": "c", "label": True}
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"prompt": p} | replies) + "\n" for p in ("ab", "ab", "z")))
    data = {"row_length": 64, "over_long": "drop"}
    config = defaults.base("preference", data=data, loss={"name": "kto"})
    rows = pack_preferences(config, str(path), "train", TOKENIZER, mismatched=True)
    records = read_preferences(config, str(path), "train")
    encoded = encode_judged(records, TOKENIZER, 64, "drop", mismatched=True)
    for i, each in enumerate(encoded):
        (row,), (place,) = (rows["example_ids"] == i).nonzero()
        tokens = [token for part in each.values() for token in part.tokens]
        assert tokens == rows["tokens"][row][rows["segment_ids"][row] == place + 1].tolist()
        targets = [target for part in each.values() for target in part.is_target]
        assert sum(targets) == rows["lengths"][row, place, :-1].sum()
        assert len(targets) == len(tokens)


def test_the_example_is_one_that_is_read():
    encoded = encode_judged(PAIRS[2:], TOKENIZER, 64, "error")
    # Of 17, 21 and 16 tokens; the second one is left out.
    assert choose_example(encoded, 64) is encoded[0]
    assert choose_example(encoded[1:], 64) is encoded[2]
    assert choose_example(encoded, 16) is encoded[2]
    assert choose_example(encoded[1:2], 64) is encoded[1]


def test_every_stretch_is_marked():
    turns = (*user("a"), Message("assistant", "b"), *user("c"), Message("assistant", "d"))
    (encoded,), _ = encode_whole([Conversation("0", turns)], TOKENIZER)
    assert decode_stretches(encoded, TOKENIZER) == [
        ("<|bos|><|user|> a<|end|><|assistant|>", False),
        (" b<|end|>", True),
        ("<|user|> c<|end|><|assistant|>", False),
        (" d<|end|>", True),
    ]


def test_the_flag_shows_and_runs_nothing(experiments, tmp_path):
    command = (f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo", "--preflight")
    result = run_main(*command)
    assert result.returncode == 2
    assert "needs the tokenizer" in result.stderr and "run it first" in result.stderr
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/summary.json").write_text(json.dumps({"status": "done"}))
    TOKENIZER.save(tmp_path / "sft")
    result = run_main(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pairs.jsonl: 80 of 80 records" in result.stdout and "[[" in result.stdout
    assert "data.row_length = 512: an error" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    result = run_main(f"--config={experiments}/pretrain.py", "--preflight")
    assert result.returncode == 2 and "for stages that start from a model" in result.stderr
