"""Perplexities and scores of a random model's, beside its logits and hidden states themselves."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from rlhf_jax.data.conversation import render_turns
from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.data.records import Conversation, Message, Text
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.filter.__main__ import main
from rlhf_jax.filter.models import perplexities, scores
from rlhf_jax.filter.records import Item, to_json
from rlhf_jax.models import ModelConfig, apply, init
from rlhf_jax.models.transformer import logits
from rlhf_jax.models.transformer import scores as head
from rlhf_jax.training.saved_model import Model, save_model

CONFIG = ModelConfig(vocab_size=300, layers=1, width=16, heads=2, kv_heads=1, head_dim=8,
                     mlp_width=32, max_length=64, init_std=0.3)  # fmt: skip
TOKENIZER = train_bpe(["Where does Ann live? On Elm Lane."] * 20, 300)
SAID = ("On Elm Lane.", "Ann!", "Where? Where? Where?")
CHATS = [
    Conversation(str(n), (Message("user", f"Where {n}?"), Message("assistant", said)))
    for n, said in enumerate(SAID)
]


def items(records) -> list[Item]:
    return [Item(record, "a", number) for number, record in enumerate(records, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of a language model and of a reward model, with the models."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for kind in ("lm", "scalar"):
        config = dataclasses.replace(CONFIG, head=kind)
        params = init(config, jax.random.key(1))
        normal = (0.5, 2.0) if kind == "scalar" else None
        model = Model(config, params, TOKENIZER, normal)
        (folder / kind).mkdir()
        save_model(folder / kind, model)
        made[kind] = (str(folder / kind), model)
    return made


@partial(jax.jit, static_argnums=0)
def outputs(config: ModelConfig, params, row, segments):
    """[64, …] log-probs of all next tokens, or scores, of a row that holds one document."""
    places = np.arange(64, dtype=np.int32)[None]
    hidden = apply(config, params, row, positions=places, segment_ids=segments).hidden
    if config.head == "scalar":
        return head(config, params, hidden)[0]
    return jax.nn.log_softmax(logits(config, params, hidden)[0])


def output(model: Model, tokens: list[int]) -> np.ndarray:
    row, segments = np.zeros((2, 1, 64), np.int32)
    row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
    return np.asarray(outputs(model.config, model.params, row, segments))


def expected(model: Model, tokens: list[int], places: range) -> float:
    """The perplexity of the tokens at those places, from all logits."""
    every = output(model, tokens)
    return float(np.exp(-np.mean([every[i - 1, tokens[i]] for i in places])))


def test_perplexity_is_of_the_reply_and_its_end_after_the_prompt(runs):
    _, model = runs["lm"]
    want = []
    for record in CHATS:
        tokens, turns = render_turns(record.messages, TOKENIZER)
        want.append(expected(model, tokens, turns[1]))
    np.testing.assert_allclose(perplexities(items(CHATS), model), want, rtol=1e-4)
    tokens = [TOKENIZER.bos, *TOKENIZER.encode_texts(["Ann lives."])[0], TOKENIZER.end]
    (found,) = perplexities(items([Text("t", "Ann lives.")]), model)
    assert found == pytest.approx(expected(model, tokens, range(1, len(tokens))), rel=1e-4)


def test_a_reward_models_scores_are_on_its_normal_scale(runs):
    directory, model = runs["scalar"]
    want = []
    for record in CHATS:
        tokens, _ = render_turns(record.messages, TOKENIZER)
        want.append((output(model, tokens)[len(tokens) - 1] - 0.5) / 2)
    np.testing.assert_allclose(scores(items(CHATS), directory), want, rtol=1e-3, atol=1e-5)


def test_the_command_keeps_what_is_in_both_bands(runs, tmp_path):
    (language, model), (reward, _) = runs["lm"], runs["scalar"]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(to_json(record)) + "\n" for record in CHATS))
    values = perplexities(items(CHATS), model)
    most = int(values.argmax())
    left = [record for n, record in enumerate(CHATS) if n != most]
    best = left[int(scores(items(left), reward).argmax())]
    assert main([f"--data={data}", f"--out={tmp_path / 'out'}", "--perplexity=..99%",
                 f"--model={language}", "--score=99%..", f"--scorer={reward}"]) == 0  # fmt: skip
    assert read_jsonl(tmp_path / "out" / "kept.jsonl", "conversation") == [best]
    lines = (tmp_path / "out" / "lineage.jsonl").read_text().splitlines()
    reasons = [json.loads(line).get("reason") for line in lines]
    assert reasons[most] == "perplexity" and reasons.count("score") == 1


def test_mistakes_about_models_end_in_one_line(runs, tmp_path, capsys):
    (language, _), (reward, _) = runs["lm"], runs["scalar"]
    data = tmp_path / "a.jsonl"
    said = json.dumps({"prompt": "Who?", "response": "Ann lives on Elm Lane. " * 20})
    data.write_text(f"{said}\n")
    for options, what in (
        (("--perplexity=..9", f"--model={reward}"), "is a reward model, not a language model"),
        (("--score=0..", f"--scorer={language}"), "is a language model, not a reward model"),
        (("--perplexity=..9", f"--model={language}"), "longer than the model's context of 64"),
        (("--perplexity=..9", f"--model={tmp_path}"), "error: "),
    ):
        assert main([f"--data={data}", f"--out={tmp_path / 'out'}", *options]) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1, error
