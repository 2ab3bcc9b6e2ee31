"""Judges: the simulated one errs as it is told to, models say what their log-probs say."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.judges import kinds
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import Answers, Comparison, SimulatedJudge, ask, gold
from rlhf_jax.judges.kinds import (
    FIRST,
    SECOND,
    LanguageModelJudge,
    RewardModelJudge,
    open_judge,
    question,
)
from rlhf_jax.models import apply, logits, scores
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.training.saved_model import load_model
from tests.test_export import saved

SAFE = Principle("safe", "Which answer does no harm?", "How?", "Again.", "safe")
CORRECT = dataclasses.replace(SAFE, name="correct", gold="correct")


def town_pairs(count):
    return [
        Comparison(Prompt(pair.id, pair.prompt, pair.meta), pair.chosen, pair.rejected)
        for pair in Town().pairs("heldout", count)
    ]


def test_without_faults_it_is_the_gold_order():
    pairs = town_pairs(120)
    verdicts = ask(SimulatedJudge(), pairs, CORRECT)
    for pair, said in zip(pairs, verdicts.preferred, strict=True):
        a, b = (gold(pair.prompt, each, CORRECT) for each in (pair.first, pair.second))
        assert said == (0.5 if a == b else float(a > b))
    assert not verdicts.flipped.any() and not verdicts.masked


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.9, 0.6), (0.7, 0.95)])
def test_it_misses_as_many_as_it_is_told_to(sensitivity, specificity):
    judge = SimulatedJudge(sensitivity, specificity, seed=1)
    answers = [(p.prompt, text) for p in town_pairs(600) for text in (p.first, p.second)]
    seen = np.array([judge._seen(*each, CORRECT) for each in answers])
    passes = np.array([gold(*each, CORRECT) >= 0.5 for each in answers])
    for rate, right in ((sensitivity, seen[passes] >= 0.5), (specificity, seen[~passes] < 0.5)):
        assert abs(right.mean() - rate) < 3 * math.sqrt(rate * (1 - rate) / len(right))
    again = SimulatedJudge(sensitivity, specificity, seed=1)
    assert [again._seen(*each, CORRECT) for each in answers] == seen.tolist()


def test_position_bias_is_seen_in_flips_and_gone_when_both_orders_are_asked():
    # Answers are the same in gold, so a verdict is the position's.
    pairs = [
        Comparison(p.prompt, p.first, p.second)
        for p in town_pairs(500)
        if gold(p.prompt, p.first, CORRECT) == gold(p.prompt, p.second, CORRECT)
    ]
    verdicts = ask(SimulatedJudge(position=0.4), pairs, CORRECT)
    n = len(pairs)
    # With probability 0.4 the first one, else ½ on average: 0.7.
    assert abs(verdicts.shown_first.mean() - 0.7) < 3 * math.sqrt(0.06 / (2 * n))
    assert abs(verdicts.preferred.mean() - 0.5) < 3 * math.sqrt(0.03 / n)
    assert abs(verdicts.flipped.mean() - 0.16) < 3 * math.sqrt(0.16 * 0.84 / n)


def test_a_plea_is_believed_as_often_as_it_is_told_to():
    plea = "This answer is right."
    wrong = [
        Comparison(pair.prompt, f"{pair.second} {plea}", pair.first)
        for pair in town_pairs(600)
        if gold(pair.prompt, f"{pair.second} {plea}", CORRECT) < 0.5
        and gold(pair.prompt, pair.first, CORRECT) >= 0.5
    ]
    wins = ask(SimulatedJudge(gullibility=0.6), wrong, CORRECT).preferred  # equal to a right one: ½
    assert abs(2 * wins.mean() - 0.6) < 3 * math.sqrt(0.24 / len(wrong))
    assert not ask(SimulatedJudge(), wrong, CORRECT).preferred.any()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gold,sensitivity=1.1", "lie in"),
        ("gold,position=x", "position is a number, not 'x'"),
        ("gold,bias=1", "write each of sensitivity, specificity, position, gullibility once"),
        ("none.py:f", "can't be loaded"),
        ("none.py", "names no function; write file.py:function"),
        ("no/such/run", "no/such/run"),
    ],
)
def test_a_judge_that_is_none_is_one_line(spec, said):
    with pytest.raises(UserError, match=said), open_judge(spec, 0):
        pass


def test_what_is_no_probability_is_masked_and_counted():
    def judge(shown, principle):
        values = np.array([0.9, 1.5, math.nan, 0.2, 0.1, 0.3, 0.4, 0.8])
        return Answers(values, {3: "refused", 7: "too long"})

    pairs = [Comparison(Prompt(str(i), (Message("user", "?"),)), "a", "b") for i in range(4)]
    verdicts = ask(judge, pairs, SAFE)
    np.testing.assert_allclose(verdicts.preferred, [0.9, math.nan, math.nan, math.nan])
    assert verdicts.masked == {"not a probability": 2, "refused": 1}
    assert verdicts.valid.tolist() == [True, False, False, False]


def chain_logprob(model, messages, reply):
    tokens = render_prompt(messages, model.tokenizer)
    _, (said,) = model.tokenizer.replies(messages, [reply])
    row = jnp.asarray([[*tokens, *said]], jnp.int32)
    hidden = apply(model.config, model.params, row).hidden
    table = np.asarray(logits(model.config, model.params, hidden), np.float64)[0]
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    return sum(table[len(tokens) - 1 + i, token] for i, token in enumerate(said))


def test_a_language_model_is_asked_by_log_probs(tmp_path, monkeypatch):
    saved(tmp_path, "tiny", max_length=192)
    model = load_model(tmp_path / "run")
    prompt = Prompt("p", (Message("user", "Where is the gym?"),))
    pairs = [Comparison(prompt, "At home.", "No."), Comparison(prompt, "x " * 200, "No.")]
    said = LanguageModelJudge(model)(pairs, SAFE)
    assert said.missing[0] == "says neither First. nor Second."  # it never learnt to be asked
    assert said.missing[1] == "longer than the judge's 192 tokens"
    monkeypatch.setattr(kinds, "NEITHER", 1e-300)
    said = LanguageModelJudge(model)(pairs, SAFE)
    one, two = (chain_logprob(model, question(pairs[0], SAFE), r) for r in (FIRST, SECOND))
    np.testing.assert_allclose(said.probabilities[0], 1 / (1 + math.exp(two - one)), rtol=1e-3)
    assert [*said.missing] == [1] and math.isnan(said.probabilities[1])


@pytest.mark.slow
def test_a_reward_model_compares_its_scores(tmp_path):
    saved(tmp_path, "tiny", max_length=192)
    model = with_score_head(load_model(tmp_path / "run"), 3)
    prompt = Prompt("p", (Message("user", "Where is the gym?"),))
    pairs = [Comparison(prompt, "At home.", "No."), Comparison(prompt, "No.", "No.")]

    def score(reply):
        tokens, (said,) = model.tokenizer.replies(prompt.messages, [reply])
        row = jnp.asarray([[*tokens, *said]], jnp.int32)
        hidden = apply(model.config, model.params, row).hidden
        return float(scores(model.config, model.params, hidden)[0, -1])

    said = RewardModelJudge(model)(pairs, SAFE)
    wanted = 1 / (1 + math.exp(score("No.") - score("At home.")))
    np.testing.assert_allclose(said.probabilities, [wanted, 0.5], rtol=1e-4)


def test_a_function_of_the_users_judges_in_its_own_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def shorter(prompts, responses, rivals, principles):\n"
        "    assert principles[0].startswith('Which')\n"
        "    return [None if 'odd' in r else float(len(r) < len(s))\n"
        "            for r, s in zip(responses, rivals)]\n"
        "def broken(prompts, responses):\n"
        "    raise ValueError('no idea')\n"
    )
    prompt = Prompt("p", (Message("user", "Where?"),))
    pairs = [Comparison(prompt, "Here.", "Over there."), Comparison(prompt, "odd", "Here.")]
    with open_judge(f"{tmp_path / 'mine.py'}:shorter", 0) as judge:
        verdicts = ask(judge, pairs, SAFE)
    np.testing.assert_allclose(verdicts.preferred, [1.0, math.nan])
    assert verdicts.masked == {"not a number but NoneType None": 1}
    with open_judge(f"{tmp_path / 'mine.py'}:broken", 0) as judge:
        verdicts = ask(judge, pairs, SAFE)
    (reason,) = verdicts.masked
    assert "no idea" in reason and not verdicts.valid.any()
