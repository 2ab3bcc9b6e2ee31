"""Rollouts whose turns an environment answers: the tokens, their log-probs, rewards and weights."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.environments.trajectories import EnvironmentOptions, Environments
from rlhf_jax.errors import UserError
from rlhf_jax.models import init
from rlhf_jax.models.scoring import target_statistics
from rlhf_jax.rewards.scorers import TextScorers
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout, from_rows, select
from rlhf_jax.rl.objectives import advantages, shape_scores
from rlhf_jax.rl.on_policy import _mismatch
from rlhf_jax.rl.rollouts import sample_answers, text_rollout
from rlhf_jax.stages import defaults
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.saved_model import Model
from tests.tiny_model import GROUPED

BOS, END, TOOL, USER, ASK = 1, 2, 3, 4, 5
WORDS = {6: "a", 7: "b", 8: "ab", 9: "c", 10: "1", 11: "2", 12: "3"}
CONFIG = GROUPED
PARAMS = init(CONFIG, jax.random.key(0))
ENV = """
class Env:
    def reset(self, row, seed):
        self.said = []
        return row["prompt"]

    def step(self, text):
        self.said.append(text)
        if len(self.said) == 3 or text == "fail":
            return [], 1.0, True
        if text.count("a") == BAD:
            raise ValueError("too many a")
        return [{"role": "tool", "content": f"{len(self.said)}ab"}], 0.25 * text.count("b"), False
"""


class Letters:
    """A tokenizer with two ways to write "ab", of which encoding knows one."""

    ends = (END,)

    def decode_text(self, ids):
        return "".join(WORDS.get(i, "") for i in ids)

    def encode(self, text):
        ids = {word: i for i, word in WORDS.items()}
        text = text.replace("ab", "|").replace("e", "")
        return [ids["ab" if letter == "|" else letter] for letter in text]

    def _turns(self, messages):
        roles = {"user": USER, "tool": TOOL, "assistant": ASK}
        return [i for m in messages for i in (roles[m.role], *self.encode(m.content), END)]

    def prompt(self, messages):
        return [BOS, *self._turns(messages), ASK]

    def continuation(self, messages, *, for_tools=False):
        return [*self._turns(messages), ASK]


MODEL = Model(CONFIG, PARAMS, Letters())
RECORDS = [Prompt(f"p{text}", (Message("user", text),)) for text in ("a", "b", "cab", "1")]


def config_of(algorithm="grpo", **sections):
    rollout = {"prompts": 4, "samples": 4, "max_prompt_tokens": 8, "max_new_tokens": 40, "slots": 8}
    sections = {"batch": {"rows": 1}, "data": {"row_length": 128}} | sections
    sections["rollout"] = rollout | sections.get("rollout", {})
    return defaults.resolve(defaults.on_policy(algorithm, **sections))


@pytest.fixture
def prompts(tmp_path, request):
    bad = getattr(request, "param", -1)
    (tmp_path / "env.py").write_text(ENV.replace("BAD", str(bad)))
    options = EnvironmentOptions(f"{tmp_path}/env.py:Env", on_error="mask")
    tokens = [Letters().prompt(record.messages) for record in RECORDS]
    with Environments(options) as environments:
        yield PromptSet(RECORDS, tokens, environments)


def drawn(prompts, seed=5):
    return sample_answers(config_of(), MODEL, prompts, samples=4, seed=seed, multiple=1)


def pieces(completion):
    """(a turn's tokens, the answer to it or None) in order."""
    begin, found = 0, []
    for given in completion.given:
        turn = completion.tokens[begin : given.start]
        found.append((turn, completion.tokens[given.start : given.stop]))
        begin = given.stop
    return [*found, (completion.tokens[begin:], None)]


def test_rows_hold_what_was_sampled_and_rendered_piece_by_piece(prompts):
    rollout, tokenizer = drawn(prompts), Letters()
    assert sum(len(c.given) for c in rollout.completions) > 16
    retold = 0
    for n, completion in enumerate(rollout.completions):
        for k, (turn, given) in enumerate(pieces(completion)):
            if given is not None:
                assert turn[-1] == END and not (set(turn[:-1]) & {END})
                assert given == tokenizer.continuation([Message("tool", f"{k + 1}ab")])
            retold += tokenizer.encode(tokenizer.decode_text(turn)) != [*filter(WORDS.get, turn)]
        mine = np.argwhere(rollout.rows["members"] == n)
        (row, place), each = mine[0], len(completion.tokens)
        slots = rollout.rows["slots"][row, place][:each]
        assert rollout.rows["targets"][row, slots].tolist() == completion.tokens
        said = [not any(t in given for given in completion.given) for t in range(each)]
        assert rollout.rows["weights"][row, slots].tolist() == said
        assert rollout.mask[n, :each].tolist() == said and not rollout.mask[n, each:].any()
        assert rollout.texts[n] == tokenizer.decode_text(pieces(completion)[-1][0])
    assert retold  # encoding a turn again would have given other tokens


def test_what_the_environment_answered_is_trained_if_that_is_asked_for(prompts):
    made = {
        given: text_rollout(
            config_of(rollout={"given": given}, reward={"scorers": "environment=2,length=-0.01"}),
            *(MODEL, Scorers(), None, PARAMS, prompts, 0),
        )
        for given in ("mask", "train")
    }
    masked, trained = made["mask"], made["train"]
    assert [c.tokens for c in masked.completions] == [c.tokens for c in trained.completions]
    assert trained.scores.tolist() == masked.scores.tolist()  # by what was drawn
    for n, completion in enumerate(trained.completions):
        (row, place), each = np.argwhere(trained.rows["members"] == n)[0], len(completion.tokens)
        assert trained.mask[n, :each].all() and not trained.mask[n, each:].any()
        assert trained.rows["mask"][row, place, :each].all()
        assert trained.rows["weights"][row, trained.rows["slots"][row, place][:each]].all()
    tools = sum(len(given) for each in masked.completions for given in each.given)
    assert trained.mask.sum() - masked.mask.sum() == tools > 100
    assert masked.metrics["tools/tokens"] == trained.metrics["tools/tokens"]
    assert masked.metrics["rollout/tokens"] == trained.metrics["rollout/tokens"]
    assert masked.lengths.tolist() == trained.lengths.tolist()


def test_answers_that_are_trained_have_no_log_probs_of_the_sampler(prompts):
    """The sampler never drew them: nothing says how far its log-probs are from the trainer's."""
    config = config_of(rollout={"given": "train"}, reward={"scorers": "environment"})
    rollout = text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 0)
    statistics = jax.jit(target_statistics, static_argnums=0)(CONFIG, PARAMS, rollout.rows)
    ours = select(statistics.logprobs, rollout.rows).reshape(rollout.rows["slots"].shape)
    old = from_rows(np.asarray(ours), rollout.rows["members"])
    rollout = dataclasses.replace(rollout, old_logprobs=old, entropy=np.zeros_like(old))
    metrics = _mismatch(rollout)
    assert metrics["rollout/logprob_difference"][0] < 1e-4
    assert metrics["rollout/kl_k3"] == (pytest.approx(0, abs=1e-6), rollout.lengths.sum())


def test_a_greedy_answer_is_judged_as_those_that_are_set_against_it(prompts):
    """One that was cut off pays for it too, or ReMax would punish all others beside it."""
    rollout = {"missing_eos": "subtract", "missing_eos_penalty": 3.0}
    made = [
        text_rollout(
            config_of("remax", rollout=each, reward={"scorers": "environment"}),
            *(MODEL, Scorers(), None, PARAMS, prompts, 0),
        )
        for each in ({}, rollout)
    ]
    greedy = sample_answers(
        config_of("remax"), MODEL, prompts, samples=1, seed=5, multiple=1, temperature=0.0
    )
    assert not greedy.finished.all()
    paid = made[0].greedy_scores - made[1].greedy_scores
    np.testing.assert_allclose(paid, 3.0 * ~greedy.finished, atol=1e-5)


def test_the_punishment_of_length_counts_what_the_limit_bounds(prompts):
    """DAPO's by hand: 0 up to 30 tokens of 40, −1 from 40 on or where an answer had no room."""
    config = config_of(rollout={"overlong_buffer": 10}, reward={"scorers": "environment"})
    rollout = text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 0)
    found, cut = np.asarray(shape_scores(config, rollout)) - rollout.scores, ~rollout.finished
    lengths = np.array([len(c.tokens) for c in rollout.completions])
    assert (cut & (lengths < 40)).any() and (cut & (lengths == 40)).any()
    assert (~cut & (lengths > 30)).any() and (rollout.lengths[cut] <= 30).any()
    by_hand = np.where(cut, -1.0, -np.clip((lengths - 30) / 10, 0, 1))
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    some = Rollout.joined([rollout, rollout]).take([5, 2])  # as where prompts are replaced
    again = np.asarray(shape_scores(config, some)) - some.scores
    np.testing.assert_allclose(again, [*by_hand[4:8], *by_hand[8:12]], atol=1e-5)


def test_a_trajectory_that_its_calls_ended_is_punished_for_its_own_length(prompts):
    environments = prompts.environments
    environments.options = dataclasses.replace(environments.options, max_calls=1)
    config = config_of(rollout={"overlong_buffer": 40}, reward={"scorers": "environment"})
    rollout = text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 0)
    found = np.asarray(shape_scores(config, rollout)) - rollout.scores
    short = [n for n, c in enumerate(rollout.completions) if len(c.tokens) < 35]
    assert any(not rollout.finished[n] for n in short)
    lengths = np.array([len(rollout.completions[n].tokens) for n in short])
    np.testing.assert_allclose(found[short], -lengths / 40, atol=1e-5)


def test_the_engines_log_probs_of_all_turns_are_the_trainers(prompts):
    rollout = drawn(prompts)
    statistics = jax.jit(target_statistics, static_argnums=0)(CONFIG, PARAMS, rollout.rows)
    ours = select(statistics.logprobs, rollout.rows).reshape(rollout.rows["slots"].shape)
    trained = from_rows(np.asarray(ours), rollout.rows["members"])
    np.testing.assert_allclose(trained, rollout.behaviour_logprobs, rtol=1e-5, atol=1e-5)
    for n, completion in enumerate(rollout.completions):  # and not of the first turn alone
        assert (np.abs(trained[n, : len(completion.tokens)]) > 0).sum() == rollout.mask[n].sum()


def test_a_turn_that_is_encoded_again_is_not_what_was_sampled(prompts):
    """The mutant "re-tokenised turn": its log-probs are those of another sequence."""
    rollout, tokenizer = drawn(prompts), Letters()
    changed = [
        [
            i
            for turn, given in pieces(c)
            for i in (*tokenizer.encode(tokenizer.decode_text(turn)), END, *(given or ()))
        ]
        for c in rollout.completions
    ]
    assert any(
        mine != c.tokens for mine, c in zip(changed, rollout.completions, strict=True) if c.finished
    )


def test_rewards_are_where_they_were_earned_and_add_up_to_the_score(prompts):
    rollout = drawn(prompts)
    for n, completion in enumerate(rollout.completions):
        rewards = rollout.trajectories[n].rewards
        parts = pieces(completion)
        expected = [0.25 * Letters().decode_text(t).count("b") for t, g in parts if g is not None]
        assert rewards[: len(expected)] == expected
        rest = rewards[len(expected) :]  # of a turn whose answer did not fit, and of the end
        assert rest == [1.0] if completion.finished else rest[-1] == 0.0 and len(rest) <= 2
        places = [given.start - 1 for given in completion.given]
        assert rollout.turn_rewards[n, places].tolist() == expected
        assert rollout.turn_rewards[n].sum() == sum(expected)


class Scorers:
    """The judge of a rollout without reward models."""

    score = Judge.score
    _add_to_ties = lambda *_: None  # noqa: E731
    _members = _failures = None

    def __init__(self):
        self.weights = {"environment": 2.0, "length": -0.01}
        self._texts = TextScorers(self.weights)


def test_advantages_are_of_what_follows_a_token(prompts):
    sections = {"advantage": {"name": "reward_to_go", "whiten": False}, "kl": {"placement": "none"}}
    config = config_of("reinforce_pp", reward={"scorers": "environment=2,length=-0.01"}, **sections)
    rollout = text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 0)
    made, _ = advantages(config, rollout, 0.0)
    for n, completion in enumerate(rollout.completions):
        rewards, places = rollout.trajectories[n].rewards, [g.start for g in completion.given]
        total = 2 * sum(rewards) - 0.01 * rollout.mask[n].sum()
        np.testing.assert_allclose(rollout.scores[n], total, rtol=1e-5)
        for t in np.flatnonzero(rollout.mask[n]):
            earned = 2 * sum(r for r, at in zip(rewards, places, strict=False) if at <= t)
            np.testing.assert_allclose(made["advantages"][n, t], total - earned, atol=1e-5)
    assert not np.any(np.asarray(made["advantages"])[rollout.mask == 0])


def test_the_greedy_answer_that_others_are_set_against_is_of_the_same_beginning(
    prompts, monkeypatch
):
    opened, begin = [], Environments.open

    def open_(self, tokenizer, records, samples, seeds):
        opened.append((samples, [*seeds]))
        return begin(self, tokenizer, records, samples, seeds)

    monkeypatch.setattr(Environments, "open", open_)
    config = config_of("remax", reward={"scorers": "environment=2,length=-0.01"})
    text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 3)
    (several, ours), (one, greedy) = opened
    assert (several, one) == (4, 1) and ours == greedy


@pytest.mark.parametrize("prompts", [3], indirect=True)
def test_a_trajectory_that_fails_weighs_nothing_and_is_counted(prompts):
    config = config_of(reward={"scorers": "environment=2,length=-0.01"})
    rollout = text_rollout(config, MODEL, Scorers(), None, PARAMS, prompts, 0)
    failed = np.array([bool(each.fault) for each in rollout.trajectories])
    assert 0 < failed.sum() < len(failed)
    np.testing.assert_array_equal(rollout.weights, ~failed)
    metrics = rollout.metrics
    assert metrics["tools/failures"] == failed.sum()
    calls = [each.calls for each in rollout.trajectories]
    assert metrics["tools/calls"] == pytest.approx(np.mean(calls))
    answered = [len(c.given) for c in rollout.completions]
    assert metrics["tools/tokens"] == pytest.approx(5 * np.mean(answered))
    ended = [c.finished for c in rollout.completions]
    assert metrics["tools/truncated"] == pytest.approx(1 - np.mean(ended))


def test_a_prompt_that_its_environment_makes_too_long_is_told(prompts):
    config = config_of(rollout={"max_prompt_tokens": 5})
    with pytest.raises(UserError, match=r"prompt 'pcab'.* has 6 tokens, over rollout.max_prompt"):
        sample_answers(config, MODEL, prompts, samples=4, seed=5, multiple=1)


def test_an_environment_leaves_no_trace_where_there_is_none():
    tokens = [Letters().prompt(record.messages) for record in RECORDS]
    plain = drawn(PromptSet(RECORDS, tokens))
    assert plain.turn_rewards is None and not plain.trajectories
    assert all(c.given == () for c in plain.completions)
    assert len(jax.tree.leaves(plain)) == 3  # what is compiled has no more to it than before
