"""The policy gradient of trajectories with a tool, over all there are in a small world: exact.

A turn is up to two tokens of five, ended by EOS or cut off. A first turn that EOS ends is answered
by a tool, whose result follows from the turn, and a second turn follows. A policy is a table of
logits by prefix; it has opinions on what the tool says, too, which must not count.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import policy
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.reductions import weighted_sum
from rlhf_jax.rl import objectives
from rlhf_jax.rl.layout import Rollout, pack_rows
from rlhf_jax.rl.on_policy import Task, policy_loss, trainable_rows
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages import defaults
from rlhf_jax.tasks.prompts import PromptSet

EOS, A, B, TOOL, ASK = range(5)
TOKENS, LONGEST, PROMPTS, LIMIT = 5, 2, 2, 8
BETA = 0.3
TURNS = [(EOS,), *((x, EOS) for x in range(1, 5)), *product(range(1, 5), repeat=LONGEST)]


def answer(turn):
    """The tool's turn: how many A there were, as A or B, and the header of the next."""
    return (TOOL, A if turn.count(A) else B, EOS, ASK)


def _trajectories():
    """(tokens, places of the tool's) of all trajectories."""
    found = []
    for first in TURNS:
        if first[-1] != EOS:
            found.append((first, ()))
            continue
        given = answer(first)
        place = range(len(first), len(first) + len(given))
        found += [((*first, *given, *second), (place,)) for second in TURNS]
    return found


TRAJECTORIES = _trajectories()
PREFIXES = sorted({tokens[:t] for tokens, _ in TRAJECTORIES for t in range(len(tokens))})
NODE = {prefix: i for i, prefix in enumerate(PREFIXES)}
COUNT = len(TRAJECTORIES)


def _table(scale):
    p, n, v = np.meshgrid(
        np.arange(PROMPTS), np.arange(len(PREFIXES)), np.arange(TOKENS), indexing="ij"
    )
    return scale * np.cos(1.3 * n + 0.9 * v + 0.7 * p)


POLICY, REFERENCE = _table(0.8), _table(0.3)
NODES, WORDS, DRAWN, REAL = np.zeros((4, COUNT, LIMIT), np.int32)
for _i, (_tokens, _given) in enumerate(TRAJECTORIES):
    for _t, _token in enumerate(_tokens):
        NODES[_i, _t], WORDS[_i, _t], REAL[_i, _t] = NODE[_tokens[:_t]], _token, 1
        DRAWN[_i, _t] = not any(_t in _part for _part in _given)
# The reward of a first turn, and of the whole: nothing that a small formula of tokens would give.
FIRST = np.array([0.4 * np.sin(g[0].start + t[0]) if g else 0 for t, g in TRAJECTORIES])
REWARDS = np.sin(2.1 * np.arange(COUNT)[None] + np.arange(PROMPTS)[:, None])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def token_logprobs(table):
    """[PROMPTS, COUNT, LIMIT] of all tokens of all trajectories, the tool's among them."""
    return jax.nn.log_softmax(jnp.asarray(table))[:, NODES, WORDS]


def logprobs(table):
    return (token_logprobs(table) * DRAWN).sum(-1)


def exact(value):
    """The gradient at POLICY of Σ over prompts of E[value], value [PROMPTS, COUNT] held fixed."""
    return jax.grad(lambda table: (jnp.exp(logprobs(table)) * value).sum())(jnp.asarray(POLICY))


def exact_objective():
    """The gradient of E[R] − BETA·KL, to which a tool's tokens add nothing."""

    def objective(table):
        logp = logprobs(table)
        return (jnp.exp(logp) * (REWARDS - BETA * (logp - logprobs(REFERENCE)))).sum()

    return jax.grad(objective)(jnp.asarray(POLICY))


def population(**changes):
    """A rollout of all trajectories to all prompts, each weighed by its probability."""
    completions = [
        Completion([*tokens], np.zeros(len(tokens), np.float32), tokens[-1] == EOS, given)
        for tokens, given in TRAJECTORIES
    ] * PROMPTS
    prompts = PromptSet([None] * PROMPTS, [[1, 5 + p] for p in range(PROMPTS)])
    rollout = Rollout.of(prompts, completions, [""] * len(completions), LIMIT)
    np.testing.assert_array_equal(rollout.mask, np.tile(DRAWN, (PROMPTS, 1)))
    earlier = np.zeros((PROMPTS * COUNT, LIMIT))
    for n, completion in enumerate(completions):
        if completion.given:
            earlier[n, completion.given[0].start - 1] = FIRST[n % COUNT]
    flat = (-1, LIMIT)
    return dataclasses.replace(
        rollout,
        mask=rollout.mask.astype(np.float64),
        scores=REWARDS.ravel(),
        weights=np.exp(np.asarray(logprobs(POLICY))).ravel(),
        turn_rewards=earlier,
        old_logprobs=np.asarray(token_logprobs(POLICY)).reshape(flat),
        ref_logprobs=np.asarray(token_logprobs(REFERENCE)).reshape(flat),
        rows=pack_rows(rollout, row_length=512, max_prompt=2, multiple=1, shortest=2),
        **changes,
    )


def statistics(table, rows):
    logits = table[rows["prompts"], rows["nodes"]]
    every = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(every, rows["targets"][..., None], -1)[..., 0]
    zeros = jnp.zeros_like(chosen)
    return TokenStatistics(chosen, zeros, zeros, zeros, zeros)


def config_of(algorithm, **sections):
    rollout = {"samples": COUNT, "prompts": PROMPTS, "max_new_tokens": LIMIT}
    sections = {"kl": {"placement": "reward", "coefficient": BETA, "estimator": "k1"}} | sections
    return defaults.resolve(defaults.on_policy(algorithm, rollout=rollout, **sections))


def rows_of(rollout):
    """The rows that are trained, with the table's node of each target."""
    rows = trainable_rows(rollout, BETA)
    members, slots = rows["members"], rows["slots"]
    rows["nodes"], rows["prompts"] = np.zeros((2, *rows["targets"].shape), np.int32)
    for r, s in zip(*np.nonzero(members >= 0), strict=True):
        n = members[r, s]
        places = slots[r, s][REAL[n % COUNT] > 0]
        rows["nodes"][r, places] = NODES[n % COUNT][REAL[n % COUNT] > 0]
        rows["prompts"][r, places] = n // COUNT
    return rows


def with_advantages(config, rollout):
    made, _ = objectives.advantages(config, rollout, BETA)
    return dataclasses.replace(rollout, **made)


def gradient(config, rollout):
    """Minus the gradient of what is trained on the population, as `on_policy` does it."""
    rows = rows_of(with_advantages(config, rollout))
    rows |= {name: np.asarray(rows[name], np.float64) for name in ("advantages", "old_logprobs")}
    rows["ref_logprobs"] = np.asarray(rows["ref_logprobs"], np.float64)
    task = Task(rollout=None, statistics=statistics)

    def loss(table):
        (total, _), *_ = policy_loss(config, task, config.loss.objective, table, rows, None)
        return total

    return -jax.grad(loss)(jnp.asarray(POLICY))


def assert_close(ours, theirs, tolerance=1e-6):
    assert np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


def values(rollout):
    """V [N, LIMIT] before each drawn token: the expected reward-to-go with its KL."""
    kl = BETA * (rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask
    last = LIMIT - 1 - np.argmax(rollout.mask[:, ::-1], axis=1)
    rewards = rollout.turn_rewards - kl
    rewards[np.arange(len(last)), last] += rollout.scores - rollout.turn_rewards.sum(-1)
    togo = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1].reshape(PROMPTS, COUNT, LIMIT)
    mass = rollout.weights.reshape(PROMPTS, COUNT, 1) * DRAWN
    sums, masses = np.zeros((2, PROMPTS, len(PREFIXES)))
    prompts = np.arange(PROMPTS)[:, None, None]
    np.add.at(sums, (prompts, NODES), mass * togo)
    np.add.at(masses, (prompts, NODES), mass)
    return (sums / np.where(masses > 0, masses, 1))[:, NODES].reshape(-1, LIMIT)


def test_reinforce_with_a_kl_in_the_reward_has_the_exact_gradient():
    config = config_of("reinforce")
    assert_close(gradient(config, population()), exact_objective())


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_generalised_advantages_carry_through_the_tools_turn(lam):
    sections = {"advantage": {"lam": lam, "whiten": False}}
    config = config_of("ppo", loss={"aggregation": "sequence_mean"}, **sections)
    rollout = population(old_values=None)
    rollout = dataclasses.replace(rollout, old_values=values(rollout))
    assert_close(gradient(config, rollout), exact_objective())


def test_a_kl_in_the_loss_has_the_exact_gradient():
    kl = {"placement": "loss", "coefficient": BETA, "estimator": "k2", "level": "sequence"}
    assert_close(gradient(config_of("reinforce", kl=kl), population()), exact_objective())


def per_token_config():
    no_kl = {"placement": "none"}
    plain = {"advantage": {"baseline": "none", "scale": "none"}, "kl": no_kl}
    return config_of("grpo", loss={"aggregation": "sequence_mean_token_mean"}, **plain)


def test_a_length_is_of_the_drawn_tokens_alone():
    expected = exact(REWARDS / DRAWN.sum(1))
    assert_close(gradient(per_token_config(), population()), expected)


def test_the_mutant_that_trains_the_tools_tokens_is_caught():
    every = np.tile(REAL, (PROMPTS, 1)).astype(np.float64)
    rollout = dataclasses.replace(population(), mask=every)
    rollout.rows["mask"] = (rollout.rows["slots"] > 0).astype(np.float32)
    rollout.rows["mask"][..., 0] = rollout.rows["members"] >= 0
    for config in (config_of("reinforce"), per_token_config()):
        with pytest.raises(AssertionError):
            assert_close(gradient(config, rollout), exact_objective(), 1e-3)


def test_the_mutant_that_counts_the_tools_tokens_in_the_length_is_caught(monkeypatch):
    rollout = population()
    lengths = rollout.rows["lengths"].reshape(-1)

    def counted(values, mask, mode, *, constant=None, sequence_weights=None):
        assert mode == "sequence_mean_token_mean"
        weights = sequence_weights[:, None] * mask / np.maximum(lengths, 1)[:, None]
        return weighted_sum(values, weights)[0], jnp.sum(sequence_weights)

    expected = exact(REWARDS / DRAWN.sum(1))
    monkeypatch.setattr(policy, "aggregate", counted)
    ours = gradient(per_token_config(), rollout)
    assert np.abs(ours - expected).max() > 1e-3
    np.testing.assert_allclose(ours, exact(REWARDS / REAL.sum(1)), atol=1e-6)


def test_logits_of_the_tools_tokens_have_a_gradient_of_exactly_zero():
    config, rollout = config_of("reinforce", loss={"entropy_coefficient": 0.1}), population()
    rows = rows_of(with_advantages(config, rollout))
    logits = jnp.asarray(POLICY)[rows["prompts"], rows["nodes"]]

    def of_logits(logits, rows):
        every = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(every, rows["targets"][..., None], -1)[..., 0]
        zeros, entropy = jnp.zeros_like(chosen), -(jnp.exp(every) * every).sum(-1)
        return TokenStatistics(chosen, zeros, zeros, entropy, zeros)

    task = Task(rollout=None, statistics=of_logits)

    def loss(logits):
        (total, _), *_ = policy_loss(config, task, config.loss.objective, logits, rows, None)
        return total

    pull = np.abs(np.asarray(jax.grad(loss)(logits))).max(-1)
    told = np.zeros(pull.shape, bool)
    for r, s in zip(*np.nonzero(rows["members"] >= 0), strict=True):
        hidden = (REAL > DRAWN)[rows["members"][r, s] % COUNT]
        told[r, rows["slots"][r, s][hidden]] = True
    assert told.sum() == 4 * PROMPTS * sum(bool(given) for _, given in TRAJECTORIES)
    assert (pull[told] == 0).all() and (rows["weights"][told] == 0).all()
    drawn = (rows["weights"] > 0) & ~told
    assert drawn.sum() == PROMPTS * DRAWN.sum() and (pull[drawn] > 0).mean() > 0.99
