"""What is sampled to be compared, and which of it is chosen."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.packing import Group
from rlhf_jax.label.__main__ import main
from rlhf_jax.label.disagreement import Ensemble, disagreement
from rlhf_jax.label.pairs import Source, keep_ahead
from rlhf_jax.label.source import read_prompts
from rlhf_jax.models import apply, scores
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.training.saved_model import load_model, save_model
from tests.label.canned import canned, open_book
from tests.test_export import saved


def source(tmp_path, count=40, **changes):
    """What a tiny model is asked."""
    if not (tmp_path / "run").exists():
        saved(tmp_path, "tiny", max_length=256)
        lines = [json.dumps({"prompt": f"What is {i}?", "answer": str(i)}) for i in range(count)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    model = load_model(tmp_path / "run")
    sets = read_prompts(str(tmp_path / "prompts.jsonl"), [model], 12)
    given = Source(("a",), (model,), sets, temperature=1.0, max_new_tokens=12, seed=3)
    return dataclasses.replace(given, **changes)


def test_disagreement_is_what_a_vote_tells_of_the_member():
    sure, third = 40.0, math.log(1 / 2)  # p of 1 and of 1/3
    margins = np.array([[sure, 0.0, sure], [-sure, 0.0, third]])
    mean = (1 + 1 / 3) / 2
    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    within = (math.log(3) - 2 / 3 * math.log(2)) / 2
    wanted = [math.log(2), 0.0, entropy - within]
    np.testing.assert_allclose(disagreement(margins), wanted, atol=1e-9)


def test_a_window_is_the_same_whenever_it_is_sampled(tmp_path):
    given = source(tmp_path)
    first, second = given.sample(0), given.sample(1)
    assert given.sample(1) == second and source(tmp_path).sample(0) == first
    assert [each.candidate for each in first + second] == [*range(16)]
    assert len({json.dumps(each.prompt) for each in first + second}) == 16  # each prompt once
    assert all(each.more["select"] == "random" and each.seed == 3 for each in first)
    for each in first:
        assert each.answers[0] != each.answers[1] and each.models == ("a", "a")
        assert each.more["meta"]["answer"] in str(each.prompt)
    later = source(tmp_path, seed=4).sample(0)
    assert {each.pair for each in later}.isdisjoint(each.pair for each in first)


def test_answers_that_are_the_same_text_are_no_pair(tmp_path):
    given = source(tmp_path, count=3, temperature=0.0)
    assert given.sample(0) == []
    book = open_book(tmp_path / "labels", pairs=1)
    book.design = dataclasses.replace(book.design, pairs=9)
    with keep_ahead(given, book) as thread:
        thread.join(60)
    assert "are the same text" in book.problem
    shown = book.showing("Ann")
    assert shown["shown"] and shown["state"] == "ready"  # what there is can be voted on
    book.answer("Ann", shown["shown"]["id"], "1", 1.0)
    assert book.showing("Ann")["state"] == "failed"


def fake(sample, window=8):
    """A source without a model."""
    records = SimpleNamespace(records=[None])
    return SimpleNamespace(window=window, sample=sample, prompts=(records,))


def test_sampling_ends_where_only_known_pairs_come(tmp_path):
    book = open_book(tmp_path, pairs=1)
    book.design = dataclasses.replace(book.design, pairs=9)
    with keep_ahead(fake(lambda window: canned(1)), book) as thread:
        thread.join(10)
        assert not thread.is_alive()
    assert "a pair that is there already" in book.problem and len(book.pairs) == 1


def test_a_window_that_a_kill_has_torn_is_sampled_to_its_end(tmp_path):
    book = open_book(tmp_path, pairs=3)  # of the 8 of the first window
    book.design = dataclasses.replace(book.design, pairs=16)
    given = fake(lambda window: canned(8 * (window + 1))[8 * window :])
    with keep_ahead(given, book) as thread:
        thread.join(10)
    assert [*book.pairs] == [each.pair for each in canned(16)] == [*open_book(tmp_path).pairs]


@pytest.mark.slow
def test_the_pairs_that_are_shown_are_those_on_which_reward_models_disagree(tmp_path):
    given = source(tmp_path)
    paths = [str(tmp_path / f"reward{seed}") for seed in range(2)]
    models = [with_score_head(given.models[0], seed) for seed in range(2)]
    for path, model in zip(paths, models, strict=True):
        Path(path).mkdir()
        save_model(path, model)
    tokenizer = given.models[0].tokenizer
    given = dataclasses.replace(given, ensemble=Ensemble.load(paths, tokenizer.hash))
    pairs = given.sample(0)
    values = [each.more["disagreement"] for each in pairs]
    assert len(pairs) == 8 and max(each.candidate for each in pairs) > 8
    answers = [given._answers(0, [0, 1], streams) for streams in ([0, 2], [1, 3])]
    prompts = given.prompts[0].tokens[:2]
    groups = [
        Group(prompt, (answers[0][i].tokens, answers[1][i].tokens), i)
        for i, prompt in enumerate(prompts)
    ]
    said = given.ensemble.disagreements(groups)

    def score(model, tokens):
        hidden = apply(model.config, model.params, jnp.asarray([tokens], jnp.int32)).hidden
        return float(scores(model.config, model.params, hidden)[0, -1])

    margins = [
        [score(m, [*p, *answers[0][i].tokens]) - score(m, [*p, *answers[1][i].tokens])
         for i, p in enumerate(prompts)]
        for m in models
    ]  # fmt: skip
    np.testing.assert_allclose(said, disagreement(np.array(margins)), rtol=1e-3)
    every = dataclasses.replace(given, ensemble=None)
    pool = [pair for window in range(4) for pair in every.sample(window)]
    assert {each.pair for each in pairs} < {each.pair for each in pool}
    assert min(values) > 0 and all(each.more["select"] == "disagreement" for each in pairs)


def test_pairs_are_sampled_ahead_of_who_is_fastest(tmp_path):
    book = open_book(tmp_path / "labels", pairs=1, repeat_every=0)
    book.design = dataclasses.replace(book.design, pairs=41)
    with keep_ahead(source(tmp_path), book) as thread:
        with book.changed:
            assert book.changed.wait_for(lambda: len(book.pairs) >= 17, 30)
        shown = 0
        while (said := book.showing("Ann"))["state"] != "done":
            if said["shown"]:
                book.answer("Ann", said["shown"]["id"], "1", 1.0)
                shown += 1
        thread.join(10)
        assert not thread.is_alive()
    assert shown == 41 == len(open_book(tmp_path / "labels").pairs)


def test_the_end_of_the_server_ends_the_sampling(tmp_path):
    book = open_book(tmp_path / "labels", pairs=1)
    book.design = dataclasses.replace(book.design, pairs=41)
    with keep_ahead(source(tmp_path), book) as thread, book.changed:
        assert book.changed.wait_for(lambda: not book.wanted(16), 30)
    assert not thread.is_alive() and len(book.pairs) < 41 and not book.problem


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs=0"], "--pairs=0: at least 1"),
        (["--select=disagreement"], "--select=disagreement and --rewards need each other"),
        (
            ["--prompts={prompts}", "--select=disagreement", "--rewards={run}"],
            "two reward models or more",
        ),
        (
            ["--prompts={prompts}", "--select=disagreement", "--rewards={run},{run}"],
            "is not a reward model but a language model",
        ),
        (["--tempature=1"], "there is no --tempature=1"),
        (["--prompts=none.jsonl"], "none.jsonl"),
        ([], "does not say what it was trained on; name --prompts=file.jsonl"),
        (["--prompts={prompts}", "--max-new-tokens=256"], "leaves room for 256 tokens"),
        (["--temperature=-1"], "temperature = -1.0: a number, at least 0"),
        (["--max-new-tokens=0"], "max_new_tokens = 0: at least 1"),
        (["--seed=-1"], "seed = -1 must be a whole number"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, said):
    source(tmp_path)
    names = {"run": tmp_path / "run", "prompts": tmp_path / "prompts.jsonl"}
    flags = [flag.format(**names) for flag in flags]
    assert main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
