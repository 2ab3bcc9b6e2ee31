"""Rollouts of text: which groups are trained on, and what is said of those that are not."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.rewards.scorers import Scores
from rlhf_jax.rl import rollouts
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.objectives import advantages, sample_metrics
from rlhf_jax.rl.on_policy import charge
from rlhf_jax.rl.rollouts import text_rollout
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages import defaults
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.tasks.town.safety import SafetyTown
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.training.saved_model import Model

LIMIT = 6


def answer(score, *, cut=False, fails=False):
    """An answer whose tokens say what the judge below makes of it."""
    length = LIMIT if cut else 3
    return Completion([99 if fails else 10 + score] * length, np.zeros(length, np.float32), not cut)


class Judge:
    def score(self, rollout):
        total = np.array([float(c.tokens[0] - 10) for c in rollout.completions])
        valid = total < 80
        failures = {"s: raised": int((~valid).sum())} if not valid.all() else {}
        total = np.where(valid, total, np.nan)
        return Scores(total, valid, {"s": total}, failures)


def rolled_out(
    monkeypatch, groups, *, greedy=None, algorithm="dapo", prompts=1, lagrange=None, **rollout
):
    """(groups that are taken, rollouts, config); `greedy` are the prompts' greedy answers."""

    def sample(config, model, prompts, *, samples, **_):
        chosen = greedy if samples == 1 else groups
        which = [tokens[-1] for tokens in prompts.tokens]
        answers = [a for n in which for a in (chosen[n] if samples > 1 else [chosen[n]])]
        return Rollout.of(prompts, answers, [str(a.tokens[0]) for a in answers], LIMIT)

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    options = {"max_prompt_tokens": 8, "max_new_tokens": LIMIT, "samples": len(groups[0])}
    options |= {"prompts": prompts, "filter_zero_std": True, "resample": len(groups) // prompts - 1}
    config = defaults.resolve(
        defaults.on_policy(
            algorithm,
            data={"row_length": 64},
            batch={"rows": 1},
            rollout=options | rollout,
            lagrange=lagrange or {},
        )
    )
    prompts = PromptSet([None] * len(groups), [[1, 3, n] for n in range(len(groups))])
    found = text_rollout(config, Model(None, None, None), Judge(), None, None, prompts, 0)
    return [tokens[-1] for tokens in found.prompts.tokens], found, config


GOOD = [answer(1), answer(0), answer(0)]


@pytest.mark.parametrize(
    ("dull", "rollout"),
    [
        ([answer(0), answer(0), answer(0)], {}),
        ([answer(1, cut=True), answer(0), answer(0)], {"truncated": "mask"}),
        ([answer(1, cut=True), answer(0, cut=True), answer(0)], {"truncated": "mask"}),
        ([answer(1, cut=True), answer(0, cut=True), answer(0, cut=True)], {"truncated": "mask"}),
        ([answer(0, fails=True), answer(1), answer(1)], {}),
        ([answer(0, fails=True)] * 3, {}),
        # Replaced and cut by a penalty, all of them are trained as −1.
        (
            [answer(1, cut=True), answer(0, cut=True), answer(-1)],
            {"missing_eos": "replace", "missing_eos_penalty": 1.0},
        ),
    ],
)
def test_a_group_is_judged_by_what_would_be_trained(monkeypatch, dull, rollout):
    taken, found, _ = rolled_out(monkeypatch, [dull, GOOD], **rollout)
    assert taken == [1] and found.metrics["rollout/blocks"] == 2
    assert found.weights.tolist() == [1, 1, 1]
    judged = any(c.tokens[0] != 99 and (c.finished or "truncated" not in rollout) for c in dull)
    assert found.metrics["rollout/zero_std_groups"] == judged
    assert found.metrics["frac_reward_zero_std"] == judged / (1 + judged)


def test_a_penalty_that_tells_answers_apart_keeps_their_group(monkeypatch):
    group = [answer(0, cut=True), answer(0), answer(0)]
    taken, *_ = rolled_out(monkeypatch, [group, GOOD], missing_eos="subtract")
    assert taken == [0]


def test_a_group_without_a_greedy_score_is_replaced(monkeypatch):
    greedy = [answer(0, fails=True), answer(1)]
    taken, found, _ = rolled_out(monkeypatch, [GOOD, GOOD], greedy=greedy, algorithm="remax")
    assert taken == [1]
    assert found.greedy_scores.tolist() == [1] and found.weights.all()
    assert found.metrics["rewards/failures"] == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_said_of_groups_that_are_all_left_out(monkeypatch, fails):
    groups = [[answer(0, fails=fails)] * 2] * 2
    _, found, config = rolled_out(monkeypatch, groups, prompts=2)
    assert not found.weights.any()
    assert found.metrics["rollout/zero_std_groups"] == (0 if fails else 2)
    # That of nothing judged is no number at all: it has weight 0.
    value, judged = found.metrics.packed[:, [*found.metrics].index("frac_reward_zero_std")]
    assert (value, judged) == ((0, 0) if fails else (1, 2))
    means = {"rewards/s/mean", "rewards/s/std", "rewards/total/mean", "rewards/total/std"}
    assert means & set(found.metrics) == (set() if fails else means)
    zeros = np.zeros_like(found.mask)
    scored = dataclasses.replace(found, old_logprobs=zeros, ref_logprobs=zeros)
    metrics = sample_metrics(config, scored, np.float32(0.1))
    assert metrics["frac_reward_zero_std"] == 1


def test_left_out_groups_are_in_the_share_of_groups_without_spread(monkeypatch):
    groups = [[answer(0)] * 2, [answer(1), answer(0)], [answer(0)] * 2, [answer(2), answer(0)]]
    _, found, _ = rolled_out(monkeypatch, groups, prompts=4)
    assert found.weights.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert found.metrics["frac_reward_zero_std"] == 0.5


def test_answers_cost_what_their_own_prompts_make_of_them():
    harmful, harmless = (
        next(p for p in SafetyTown(Town()).held_out() if p.meta["safety"] == family)
        for family in ("harmful", "harmless")
    )
    refusal = "I am sorry, but I can't help with that."
    asked = PromptSet([harmful, harmless], [[1], [1]])
    drawn = Rollout.of(asked, [answer(1)] * 4, [refusal, "Sure.", refusal, "Sure."], LIMIT)
    costs = rollouts._costs("over_refusal", drawn)
    np.testing.assert_array_equal(costs, [np.nan, np.nan, 1, 0])


@pytest.mark.parametrize(
    ("damping", "other", "second"),
    # A score that stands for all that was cut off costs nothing more.
    [(0.0, answer(0), 0), (0.5, answer(0), 0), (0.5, answer(1, cut=True), -1)],
)
def test_a_greedy_answer_pays_for_its_cost_as_those_that_are_set_against_it(
    monkeypatch, damping, other, second
):
    """ReMax's baseline by hand: an answer that is the greedy one is worth as much as it."""
    monkeypatch.setitem(rollouts.COSTS, "over_refusal", lambda prompt, text: float(text == "11"))
    lagrange = {"cost": "over_refusal", "start": 2.0, "limit": 0.25, "damping": damping}
    groups, greedy = [[answer(1), answer(0)], [answer(1), answer(1)]], [answer(1), other]
    _, found, config = rolled_out(
        monkeypatch, groups, greedy=greedy, algorithm="remax", prompts=2, lagrange=lagrange,
        filter_zero_std=False, resample=0, missing_eos="replace", missing_eos_penalty=1.0,
    )  # fmt: skip
    trainer = SimpleNamespace(
        config=config, task=SimpleNamespace(costs=partial(rollouts._costs, "over_refusal"))
    )
    charged, *_ = charge(trainer, SimpleNamespace(multiplier=np.float32(2)), found)
    zeros = np.zeros_like(found.mask)
    charged = dataclasses.replace(charged, old_logprobs=zeros, ref_logprobs=zeros)
    made, _ = advantages(config, charged, np.float32(0.1))
    price = 2 + damping * (0.75 - 0.25)
    expected = [0, 0 - (1 - price), 1 - price - second, 1 - price - second]
    np.testing.assert_allclose(made["advantages"][:, 0], expected, rtol=1e-6)
