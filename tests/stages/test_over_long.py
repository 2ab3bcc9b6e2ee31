"""What does not fit is a warning of its own, and metrics of few records say that they are."""

from __future__ import annotations

import json
import logging

import pytest

from rlhf_jax import console
from rlhf_jax.data.encode import length_of_share
from rlhf_jax.data.records import Text
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.rl import rollouts
from rlhf_jax.stages import defaults, preference_rows, sft
from rlhf_jax.stages.fit import pack_texts

WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([WORDS] * 10, 300)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def config_of(stage, **data):
    return defaults.base(stage, data={"row_length": 64, "over_long": "drop"} | data)


LONG = " ".join([WORDS] * 40)
PROMPTS = [LONG, *["hi"] * 3]


def warned(caplog, name, config):
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    message = record.getMessage()
    assert message.startswith(name) and "1 of 4 records (25.0 %) are " in message
    assert message.endswith(" would keep 95 %")
    return message


def test_length_of_share():
    assert length_of_share([*range(1, 101)]) == 95
    assert length_of_share([7]) == 7
    assert length_of_share([1, 2, 3, 9]) == 9


@pytest.mark.parametrize("kind", ["pairs", "labelled", "kto", "kto labelled", "sft", "text"])
def test_what_is_dropped_is_a_warning(tmp_path, tokenizer, caplog, kind):
    stages = {"pairs": "preference", "labelled": "reward", "sft": "sft", "text": "pretrain"}
    config = config_of(stages.get(kind, "preference"))
    path = tmp_path / "f.jsonl"
    match kind:
        case "pairs":
            config.loss = {"name": "dpo"}
            rows = [{"prompt": p, "chosen": "yo", "rejected": "no"} for p in PROMPTS]
            preference_rows.pack_pairs(config, write(path, rows), "train", tokenizer)
        case "labelled":
            rows = [{"prompt": p, "completion": "yo", "label": True} for p in PROMPTS]
            preference_rows.pack_labelled(config, write(path, rows), "train", tokenizer)
        case "kto" | "kto labelled":  # the second one's reply to another prompt does not fit
            config.loss = {"name": "kto"}
            judged, reply = {"rejected": "no"}, "chosen"
            if kind == "kto labelled":
                judged, reply = {"label": True}, "completion"
            texts = {"hi": "yo", "ho": f"{WORDS} {WORDS}", "ha": " ".join([WORDS] * 4), "hu": "yo"}
            rows = [{"prompt": p, reply: text} | judged for p, text in texts.items()]
            made = preference_rows.pack_preferences(
                config, write(path, rows), "train", tokenizer, mismatched=True
            )
            assert sorted(made["example_ids"][made["valid"] > 0]) == [0, 2, 3]
        case "sft":
            rows = [{"prompt": p, "completion": "yo"} for p in PROMPTS]
            sft._pack(config, write(path, rows), "train", tokenizer)
        case "text":
            texts = [Text(f"{i}", p) for i, p in enumerate(PROMPTS)]
            pack_texts(config, "texts", texts, tokenizer, "drop")
    message = warned(caplog, "texts" if kind == "text" else f"{path} (train)", config)
    assert "dropped, longer than data.row_length = 64 tokens (data.over_long = 'drop')" in message
    config.data.row_length = 64 if kind == "labelled" else int(message.split()[-5])
    caplog.clear()
    if kind == "pairs":
        preference_rows.pack_pairs(config, str(path), "train", tokenizer)
        assert caplog.text == ""


def test_truncated_prompts_are_a_warning_too(tmp_path, tokenizer, caplog):
    config = config_of("sft", over_long="truncate_prompt_left")
    rows = [{"prompt": p, "completion": "yo"} for p in PROMPTS]
    sft._pack(config, write(tmp_path / "f.jsonl", rows), "train", tokenizer)
    assert "1 of 4 records (25.0 %) are truncated, longer than" in caplog.text


def test_long_prompts_are_a_warning(tmp_path, tokenizer, caplog):
    config = config_of("policy")
    config.rollout = {"max_prompt_tokens": 64}
    path = write(tmp_path / "f.jsonl", [{"prompt": p} for p in PROMPTS])
    kept = rollouts.read_prompts(config, tokenizer, path, "train")
    assert len(kept.records) == 3
    message = warned(caplog, f"{path} (train) prompts", config)
    assert "left out, longer than rollout.max_prompt_tokens = 64" in message


def test_the_error_names_the_length_that_keeps_most(tmp_path, tokenizer):
    config = config_of("sft", over_long="error")
    path = write(tmp_path / "f.jsonl", [{"prompt": p, "completion": "yo"} for p in PROMPTS])
    with pytest.raises(UserError, match=r"1 of 4 records are longer .* \d+ keep 95 %"):
        sft._pack(config, path, "train", tokenizer)


def test_few_records_are_said_and_in_the_report(caplog):
    assert console.few_records("held-out prompts", 30) == [] and caplog.text == ""
    (table,) = console.few_records("held-out prompts", 6)
    assert "Measured on 6 held-out prompts, fewer than 30" in caplog.text
    assert table["note"] in caplog.text and table["rows"] == [["held-out prompts", 6]]


def test_raw_text_beside_prompts_is_split(tokenizer):
    config = defaults.on_policy("ppo", data={"row_length": 64})
    rows, _ = pack_texts(config, "texts (ptx)", [Text("0", LONG)], tokenizer, "split")
    assert len(rows["tokens"]) > 1
