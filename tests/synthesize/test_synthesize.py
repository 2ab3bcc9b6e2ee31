"""What a random model says to seeds: every answer is counted, traced and repeatable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.filter.records import Item
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.synthesize import sampling
from rlhf_jax.synthesize.__main__ import main
from rlhf_jax.training.saved_model import Model, save_model

TOKENIZER = train_bpe(["Where does Ann live? On Elm Lane."] * 20, 300)
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1,
                     head_dim=8, mlp_width=32, max_length=512, init_std=0.3)  # fmt: skip
SCORER = """
def long(prompts, responses):
    return [len(response) for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the run of a random model, seeds and a scorer."""
    folder = tmp_path_factory.mktemp("synthesize")
    for head in ("lm", "scalar"):
        config = dataclasses.replace(CONFIG, head=head)
        (folder / head).mkdir()
        save_model(folder / head, Model(config, init(config, jax.random.key(0)), TOKENIZER))
    asked = ["Where?", "Who?", "When?", "x" * 600, "What is it?"]
    lines = [json.dumps({"prompt": text, "topic": "t"}) for text in asked]
    (folder / "seeds.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(SCORER)
    return folder


def synthesize(folder: Path, out: Path, *options: str) -> tuple[list[str], dict]:
    """The lines of kept.jsonl, and report.json."""
    given = [f"--workdir={folder / 'lm'}", f"--seeds={folder / 'seeds.jsonl'}", f"--out={out}"]
    assert main([*given, "--max-new-tokens=8", *options]) == 0
    report = json.loads((out / "report.json").read_text())
    return (out / "kept.jsonl").read_text().splitlines(), report


def test_every_answer_is_kept_or_went_and_says_whence_it_came(folder, tmp_path):
    scored = ("--samples=3", f"--scorer={folder / 'mine.py'}:long", "--score=50%..")
    kept, report = synthesize(folder, tmp_path / "one", *scored)
    counts = {each["reason"]: each["gone"] for each in report["reasons"]}
    assert counts["not read"] == 1 and counts["score"] > 0  # the prompt of 600 letters
    assert report["read"] == 4 * 3 + 1 == report["kept"] + sum(counts.values())

    records = read_jsonl(tmp_path / "one" / "kept.jsonl", "conversation")
    lineage = [json.loads(x) for x in (tmp_path / "one" / "lineage.jsonl").read_text().splitlines()]
    lines = {fate["kept"]: fate for fate in lineage if "kept" in fate}
    for number, record in enumerate(records, 1):
        assert record.meta["topic"] == "t" and record.meta["model"] == str(folder / "lm")
        assert record.meta["finish_reason"] in ("stop", "length")
        assert record.id.startswith(f"seeds.jsonl:{lines[number]['line']}#")
    assert synthesize(folder, tmp_path / "two", *scored)[0] == kept
    assert synthesize(folder, tmp_path / "three", *scored, "--seed=1")[0] != kept


def test_what_was_said_of_a_seeds_own_answer_is_not_said_of_the_new_one(folder, tmp_path):
    rated = {"prompt": "Who?", "completion": "Ann.", "label": True, "labeler": "bo", "topic": "t"}
    (tmp_path / "rated.jsonl").write_text(json.dumps(rated) + "\n")
    options = (f"--seeds={tmp_path / 'rated.jsonl'}", "--samples=1")
    (line,), _ = synthesize(folder, tmp_path / "out", *options)
    assert "label" not in json.loads(line)
    (record,) = read_jsonl(tmp_path / "out" / "kept.jsonl", "conversation")
    assert not {"label", "labeler"} & record.meta.keys()
    stated = {"seed_label": "true", "seed_labeler": "bo", "topic": "t"}
    assert {name: record.meta.get(name) for name in stated} == stated


def test_why_a_written_prompt_is_none_is_said_of_each(monkeypatch):
    texts = ["Where?", "", "How so", "a\0b", "How many?"]
    ended = [True, True, False, True, True]
    replies = [
        Completion(TOKENIZER.encode(text), np.zeros(0), finished)
        for text, finished in zip(texts, ended, strict=True)
    ]
    monkeypatch.setattr(sampling, "_generate", lambda *_: replies)
    asked = [Prompt(text, (Message("user", text),)) for text in ("Where?", "Who?", "When?")]
    seeds = [Item(prompt, "seeds.jsonl", i) for i, prompt in enumerate(asked, 1)]
    model = Model(CONFIG, {}, TOKENIZER)
    made, bad = sampling.write_prompts(model, "run", seeds, 5, sampling.Draw(8, 1.0, 0))
    assert [item.record.messages[0].content for item in made] == ["How many?"]
    assert [(each.line, each.why.partition(" is ")[2]) for each in bad] == [
        (1, "there already: 'Where?'"), (2, "empty: ''"), (3, "without an end: 'How so'"),
        (4, "with a NUL character: 'a\\x00b'"),
    ]  # fmt: skip


def test_a_seed_that_cannot_be_rendered_is_named():
    prompt = Prompt("0", (Message("tool", "42"),))
    with pytest.raises(UserError, match=r"record 'seeds.jsonl:7': messages\[0\]: role 'tool'"):
        sampling.sample_answers(
            Model(CONFIG, {}, TOKENIZER), "run", [Item(prompt, "seeds.jsonl", 7)], 1,
            sampling.Draw(8, 1.0, 0),
        )  # fmt: skip


@pytest.mark.slow
def test_written_prompts_are_answered_and_name_their_seeds(folder, tmp_path):
    kept, report = synthesize(folder, tmp_path / "out", "--count=1", "--samples=1", "--write=6")
    written = [json.loads(line) for line in kept if '"written-' in line]
    lost = report["reasons"][0]["gone"] if report["reasons"][0]["reason"] == "not read" else 0
    assert report["read"] == 1 + 6 and len(written) + lost <= 6
    for record in written:
        seeds = record["meta"]["seeds"].split(", ")
        assert len(set(seeds)) == 3 and all("seeds.jsonl:" in seed for seed in seeds)
        assert len(record["messages"]) == 2 and record["messages"][0]["content"]


def test_mistakes_end_in_one_line(folder, tmp_path, capsys):
    seeds = folder / "seeds.jsonl"
    given = [f"--workdir={folder / 'lm'}", f"--seeds={seeds}", f"--out={tmp_path / 'out'}"]
    for options, what in (
        ([f"--workdir={folder / 'scalar'}"], "is a reward model; it does not speak"),
        (["--samples=0"], "--samples must be at least 1"),
        (["--count=6"], "--count=6: there are 5 seeds in "),
        (["--temperature=-1"], "temperature = -1.0"),
        (["--write=2", f"--seeds={seeds}[:2]"], "--write needs 3 prompts"),
        (["--score=1.."], "--score and --scorer need each other"),
        (["--score=1..", "--scorer=gold"], "nothing to verify"),
        (["--seeds=nowhere.jsonl"], "nowhere.jsonl"),
        (["--max-new-tokens=512"], "no records are left of 5: 5 not read"),
    ):
        assert main([*given, *options]) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
