"""Gradients of policy losses over the exact population of enum-121, and over samples of it.

Taken at a policy that is not an optimum: at the optimum every advantage is 0, and so is many a
wrong gradient. Each response has its probability for weight.
"""

from __future__ import annotations

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation.selection import best_of_n_law
from rlhf_jax.losses.advantages import gae, group_advantages, remax, reward_to_go
from rlhf_jax.losses.policy import (
    OBJECTIVES,
    Ppo,
    Tokens,
    aggregate,
    importance_weights,
    kl_loss,
    policy_loss,
)
from rlhf_jax.losses.shaping import kl_estimate, token_rewards
from rlhf_jax.oracle import exact_world as world
from tests.losses.exact_gradients import GENERIC, gradient, objective

BETA = 0.5
EXACT = gradient(GENERIC, BETA)
PROMPTS = np.arange(world.PROMPTS)[:, None, None]
SHAPE = world.REWARDS.shape
MASK = np.tile(world.MASK, (world.PROMPTS, 1))
LENGTHS = MASK.sum(1, keepdims=True)
EOS = MASK * np.tile(world.TOKENS == 0, (world.PROMPTS, 1))
FIRST = np.arange(world.MAX_TOKENS) == 0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def token_logprobs(table, temperature=1.0):
    """[484, 4] log-probs of the tokens of all responses; garbage where there are none."""
    logp = jax.nn.log_softmax(table / temperature)[:, world.NODES, world.TOKENS]
    return logp.reshape(MASK.shape)


class Population:
    """All responses to all prompts, sampled from GENERIC, and what was computed of them."""

    def __init__(self, dtype=np.float64, temperature=1.0):
        self.dtype = dtype
        self.table = jnp.asarray(GENERIC, dtype)
        self.mask = jnp.asarray(MASK, dtype)
        self.scores = jnp.asarray(world.REWARDS.ravel(), dtype)
        self.old = token_logprobs(self.table)
        self.ref = token_logprobs(jnp.asarray(world.REFERENCE, dtype))
        self.sampled = token_logprobs(self.table, temperature)
        self.weights = jnp.exp(jnp.sum(self.sampled * self.mask, axis=1))
        self.kl = kl_estimate(self.old, self.ref, "k1")

    def rewards(self, kl=None, coefficient=BETA):
        kl = self.kl if kl is None else kl
        return token_rewards(self.scores, self.mask, kl, coefficient=coefficient)

    @cached_property
    def values(self):
        """V [484, 4] of the state before each token: the expected reward-to-go from there on."""
        togo = np.asarray(reward_to_go(self.rewards(), self.mask), np.float64).reshape(*SHAPE, -1)
        weights = np.asarray(self.weights, np.float64).reshape(*SHAPE, 1) * world.MASK
        sums, masses = np.zeros((2, world.PROMPTS, len(world.PREFIXES)))
        np.add.at(sums, (PROMPTS, world.NODES), weights * togo)
        np.add.at(masses, (PROMPTS, world.NODES), weights)
        return self.at_prefixes(sums / masses)

    def at_prefixes(self, table):
        return jnp.asarray(table[:, world.NODES].reshape(MASK.shape), self.dtype)

    def response_advantages(self, rewards, baseline=None, normalise=False):
        """The summed reward of a response less a baseline of its prompt, by default the mean."""
        returns = jnp.sum(rewards, axis=1).reshape(SHAPE)
        law = self.weights.reshape(SHAPE)
        center = jnp.sum(law * returns, axis=1)
        if normalise:
            returns /= jnp.sqrt(jnp.sum(law * (returns - center[:, None]) ** 2, axis=1))[:, None]
            center = jnp.sum(law * returns, axis=1)
        advantages = remax(returns, center if baseline is None else jnp.full_like(center, baseline))
        return jnp.broadcast_to(advantages.reshape(-1, 1), MASK.shape)

    def gradient(
        self,
        advantages,
        objective="policy_gradient",
        *,
        loss_mask=MASK,
        aggregation="sequence_mean",
        importance=None,
        kl=None,
        kl_importance=None,
    ):
        """Minus the gradient of the policy loss, plus that of kl = (estimator, level) if given."""

        def loss(table):
            logprobs = token_logprobs(table)
            (total, _), _ = policy_loss(
                OBJECTIVES[objective](),
                Tokens(logprobs, self.old, advantages, jnp.asarray(loss_mask, self.dtype)),
                aggregation=aggregation,
                sequence_weights=self.weights,
                importance=importance,
            )
            if kl is not None:
                estimator, level = kl
                values = kl_loss(
                    *(logprobs, self.ref, self.mask),
                    estimator=estimator,
                    level=level,
                    old_logprobs=self.old if kl_importance == "ratio" else None,
                )
                total += (
                    BETA
                    * aggregate(values, self.mask, "sequence_mean", sequence_weights=self.weights)[
                        0
                    ]
                )
            return total

        return -jax.grad(loss)(self.table)


def penalised(population, baseline=None, normalise=False, **options):
    """A policy gradient of whole responses with the KL in the reward."""
    rewards = population.rewards()
    advantages = population.response_advantages(rewards, baseline, normalise)
    return population.gradient(advantages, **options)


def kl_reward(population, kl, coefficient=BETA):
    """The same with another KL in the reward."""
    rewards = population.rewards(kl, coefficient)
    return population.gradient(population.response_advantages(rewards))


def kl_in_loss(population, estimator, level, **options):
    advantages = population.response_advantages(population.rewards(coefficient=0.0))
    return population.gradient(advantages, kl=(estimator, level), **options)


def togo(population):
    return population.gradient(reward_to_go(population.rewards(), population.mask), "ppo")


def estimated(population, lam, values):
    advantages, _ = gae(population.rewards(), values, population.mask, lam=lam)
    return population.gradient(advantages, "ppo")


def random_values(population):
    table = np.random.default_rng(0).normal(size=(world.PROMPTS, len(world.PREFIXES)))
    return population.at_prefixes(table)


def tempered(dtype=np.float64, **correction):
    """Sampled at temperature 0.7, scored at 1; corrected by importance weights if any are given."""
    population = Population(dtype, 0.7)
    weights = None
    if correction:
        weights = importance_weights(
            population.old, population.sampled, population.mask, **correction
        )
    return penalised(population, importance=weights)


def late_values(population):
    """The value of the state after each token, where that before it belongs."""
    values = population.values * population.mask
    return jnp.pad(values, ((0, 0), (0, 1)))[:, 1:]


def score_in_the_padding(population):
    """The score on the last slot, which most rows mask away."""
    rewards = population.rewards() - population.rewards(coefficient=0.0)
    rewards = rewards.at[:, -1].add(population.scores)
    advantages, _ = gae(rewards, population.values, population.mask, lam=0.95)
    return population.gradient(advantages, "ppo")


def togo_without_its_own_kl(population):
    advantages = reward_to_go(population.rewards(), population.mask) + BETA * population.kl
    return population.gradient(advantages, "ppo")


EXACT_ROWS = {
    "reinforce": lambda p: penalised(p, baseline=0.0),
    "reinforce, mean baseline": penalised,
    "reinforce, any baseline": lambda p: penalised(p, baseline=7.0),
    "ppo, reward to go": togo,
    "gae 1, random values": lambda p: estimated(p, 1.0, random_values(p)),
    "gae 0.95, exact values": lambda p: estimated(p, 0.95, p.values),
    "gae 0, exact values": lambda p: estimated(p, 0.0, p.values),
    "k2 of sequences in loss": lambda p: kl_in_loss(p, "k2", "sequence"),
    "k3 of sequences times ratio": lambda p: kl_in_loss(p, "k3", "sequence", kl_importance="ratio"),
    "temperature 0.7, sequence importance": lambda p: tempered(p.dtype, level="sequence", cap=None),
    **{
        f"{name}, ratio 1": lambda p, name=name: penalised(p, objective=name) for name in OBJECTIVES
    },
}

# name: gradient, relative error and cosine to the exact one.
BIASED_ROWS = {
    "gae 0.95, values 0": (lambda p: estimated(p, 0.95, 0 * p.mask), 0.107, 0.9982),
    "k2 of tokens in loss": (lambda p: kl_in_loss(p, "k2", "token"), 0.068, 0.9977),
    "k3 of tokens times ratio": (
        lambda p: kl_in_loss(p, "k3", "token", kl_importance="ratio"),
        *(0.068, 0.9977),
    ),
    "k3 of tokens in loss": (lambda p: kl_in_loss(p, "k3", "token"), 0.093, 0.9958),
    "k3 of sequences in loss": (lambda p: kl_in_loss(p, "k3", "sequence"), 0.101, 0.9953),
    "over std": (lambda p: penalised(p, normalise=True), 0.731, 0.9895),
    "over length": (
        lambda p: penalised(p, aggregation="sequence_mean_token_mean"),
        *(0.653, 0.901),
    ),
    "over std and length": (
        lambda p: penalised(p, normalise=True, aggregation="sequence_mean_token_mean"),
        *(0.506, 0.875),
    ),
}
MUTANTS = {
    "EOS masked out of the loss": (lambda p: penalised(p, loss_mask=MASK - EOS), 0.362, 0.933),
    "first token masked": (lambda p: penalised(p, loss_mask=MASK * ~FIRST), 0.733, 0.680),
    "KL misses EOS": (lambda p: kl_reward(p, p.kl * (1 - EOS)), 0.236, 0.972),
    "KL averaged over tokens": (lambda p: kl_reward(p, p.kl / LENGTHS), 0.275, 0.963),
    "KL sign flipped": (lambda p: kl_reward(p, p.kl, -BETA), 0.943, 0.663),
    "k1 in loss": (lambda p: kl_in_loss(p, "k1", "sequence"), 0.472, 0.891),
    "k1 of tokens in loss": (lambda p: kl_in_loss(p, "k1", "token"), 0.472, 0.891),
    "values off by one": (lambda p: estimated(p, 0.95, late_values(p)), 1.09, 0.097),
    "score in the padding": (score_in_the_padding, 0.383, 0.924),
    "to go without its own KL": (togo_without_its_own_kl, 0.451, 0.900),
    "temperature 0.7": (lambda p: tempered(), 0.316, 0.950),
    "temperature 0.7, token importance": (lambda p: tempered(cap=None), 0.224, 0.977),
    "temperature 0.7, token importance to 2": (lambda p: tempered(cap=2.0), 0.224, 0.977),
}


def against_exact(gradient):
    """(relative error, cosine)."""
    gradient = np.asarray(gradient, np.float64)
    size, exact_size = np.linalg.norm(gradient), np.linalg.norm(EXACT)
    error = np.linalg.norm(gradient - EXACT) / exact_size
    return error, np.sum(gradient * EXACT) / (size * exact_size)


@pytest.fixture(scope="module")
def population():
    with jax.enable_x64(True):
        return Population()


def test_the_world_has_its_golden_numbers():
    logp, ref = world.logprobs(GENERIC), world.logprobs(world.REFERENCE)
    found = [
        world.expected_reward(logp),
        world.kl(logp, ref),
        objective(GENERIC, BETA),
        BETA * world.kl(logp, world.optimum(BETA)),
        np.linalg.norm(EXACT),
    ]
    golden = [-0.146334, 0.103489, -0.198079, 0.387965, 0.328519]
    np.testing.assert_allclose(found, golden, atol=1e-6)
    np.testing.assert_allclose(
        EXACT[0, 0], [-0.01093456, 0.05320513, -0.05875767, 0.01648711], atol=1e-8
    )
    best = objective(world.REFERENCE, BETA), world.optimum(BETA)
    regret = world.expected_reward(best[1]) - BETA * world.kl(best[1], ref) - best[0]
    np.testing.assert_allclose(regret, BETA * world.kl(ref, best[1]), rtol=1e-12)


def test_the_exact_gradient_is_that_of_finite_differences():
    directions = np.random.default_rng(0).normal(size=(3, *GENERIC.shape))
    for direction in directions:
        ends = [objective(GENERIC + h * direction, BETA) for h in (1e-5, -1e-5)]
        slope = world.PROMPTS * (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(EXACT * direction), slope, rtol=1e-7)


def test_the_frontier_and_best_of_n_have_their_golden_numbers():
    reached = [world.frontier(kl) for kl in (0.05, 0.25, 0.5, 1, 2, 3, 4, 5)]
    golden = [0.0128, 0.2498, 0.4281, 0.6793, 1.0196, 1.257, 1.4333, 1.5584]
    np.testing.assert_allclose(reached, golden, atol=5.1e-5)
    np.testing.assert_allclose(world.frontier(0.1), 0.09225, atol=1e-5)
    np.testing.assert_allclose(world.frontier(0), -0.180583, atol=1e-6)
    ref = world.logprobs(world.REFERENCE)

    def of_best(n):
        pairs = zip(np.exp(ref), world.REWARDS, strict=True)
        return np.stack([best_of_n_law(probs, rewards, n) for probs, rewards in pairs])

    np.testing.assert_allclose(np.exp(ref), of_best(1), rtol=1e-9)
    for n, kl, reward in ((2, 0.1911, 0.1508), (8, 1.1893, 0.6462), (64, 3.1534, 1.2211)):
        law = of_best(n)
        np.testing.assert_allclose(law.sum(1), 1, rtol=1e-12)
        logp = np.log(np.maximum(law, 1e-300))
        found = world.kl(logp, ref), world.expected_reward(logp)
        np.testing.assert_allclose(found, [kl, reward], atol=5.1e-5)
        assert found[1] < world.frontier(found[0])


def test_kl_estimates_under_the_optimum():
    """Of responses: mean, and the mean over prompts of the standard deviation."""
    best, ref = world.optimum(BETA), world.logprobs(world.REFERENCE)
    law = np.exp(best)
    for kind, mean, deviation in (
        ("k1", 0.7373, 1.165),
        ("k2", 1.0389, 1.146),
        ("k3", 0.7373, 1.666),
    ):
        values = np.asarray(kl_estimate(jnp.asarray(best), jnp.asarray(ref), kind))
        centers = np.sum(law * values, axis=1, keepdims=True)
        deviations = np.sqrt(np.sum(law * (values - centers) ** 2, axis=1))
        found = centers.mean(), deviations.mean()
        np.testing.assert_allclose(found, [mean, deviation], atol=5.1e-4)


@pytest.mark.parametrize("name", EXACT_ROWS)
def test_exact_gradients(population, name):
    gradient = EXACT_ROWS[name](population)
    assert gradient.dtype == jnp.float64
    error, cosine = against_exact(gradient)
    assert error < 1e-6
    assert cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in EXACT_ROWS if "ratio 1" not in name])
def test_exact_gradients_in_float32(name):
    gradient = EXACT_ROWS[name](Population(np.float32))
    assert gradient.dtype == jnp.float32
    assert against_exact(gradient)[0] < 1e-4


@pytest.mark.parametrize("name", {**BIASED_ROWS, **MUTANTS})
def test_biases_and_mutants_have_their_golden_errors(population, name):
    gradient, error, cosine = {**BIASED_ROWS, **MUTANTS}[name]
    found = against_exact(gradient(population))
    assert found[0] > 0.01
    np.testing.assert_allclose(found[0], error, atol=0.0051 if error > 1 else 0.00051)
    np.testing.assert_allclose(found[1], cosine, atol=0.00051)


def sampled_gradients(batches, *, samples=512, group=4, **advantages):
    """Gradients [batches, ...] of policy losses over so many samples of each prompt."""
    rng = np.random.default_rng(0)
    law = np.exp(world.logprobs(GENERIC))
    drawn = [rng.choice(SHAPE[1], (batches, samples), p=p / p.sum()) for p in law]
    table, reference, scores, mask = (
        jnp.asarray(x, jnp.float32) for x in (GENERIC, world.REFERENCE, world.REWARDS, world.MASK)
    )
    prompts = np.repeat(np.arange(world.PROMPTS), samples)

    def gradient(rows):
        nodes, tokens = jnp.asarray(world.NODES)[rows], jnp.asarray(world.TOKENS)[rows]

        def scored(table):
            return jax.nn.log_softmax(table)[prompts[:, None], nodes, tokens]

        old, real = scored(table), mask[rows]
        kl = kl_estimate(old, scored(reference), "k1")
        rewards = token_rewards(scores[prompts, rows], real, kl, coefficient=BETA)
        returns = jnp.sum(rewards, axis=1).reshape(-1, group)
        factors = group_advantages(returns, **advantages).reshape(-1, 1)

        def loss(table):
            (total, _), _ = policy_loss(
                Ppo(),
                Tokens(scored(table), old, jnp.broadcast_to(factors, real.shape), real),
                aggregation="sequence_mean",
            )
            return total / samples

        return -jax.grad(loss)(table)

    rows = jnp.asarray(np.stack(drawn, axis=1).reshape(batches, -1))
    return np.asarray(jax.jit(lambda rows: jax.lax.map(gradient, rows))(rows), np.float64)


def against_samples(gradients):
    """(mean projected on the exact gradient, rms z, greatest |z|, relative error of the mean)."""
    center = gradients.mean(0)
    z = (center - EXACT) / (gradients.std(0, ddof=1) / np.sqrt(len(gradients)))
    scale = np.sum(center * EXACT) / np.sum(EXACT**2)
    return scale, np.sqrt(np.mean(z**2)), np.abs(z).max(), against_exact(center)[0]


def test_sampled_rloo_is_unbiased():
    scale, rms, largest, _ = against_samples(sampled_gradients(300, baseline="leave_one_out"))
    assert abs(scale - 1) < 0.01
    assert rms < 1.2
    assert largest < 5


def test_a_mean_with_the_sample_in_it_shrinks_the_gradient():
    scale, _, largest, _ = against_samples(sampled_gradients(300, baseline="mean"))
    assert scale == pytest.approx(3 / 4, abs=0.01)
    assert largest > 20


def test_dividing_by_the_group_deviation_is_another_objective():
    gradients = sampled_gradients(300, baseline="mean", scale="group")
    _, _, largest, error = against_samples(gradients)
    assert error == pytest.approx(0.41, abs=0.02)
    assert largest > 20


# A bandit of eight arms: one token, so that token and sequence are one.
ARMS = np.arange(8)
ARM_REFERENCE = 0.8 * np.sin(1.9 * ARMS)
ARM_REWARDS = np.cos(2.3 * ARMS)


def bandit_gradient(law, *, estimator=None):
    """Of the loss over all arms, to the logits; the KL is in the reward, or in the loss."""
    logits, reference = jnp.log(law), jax.nn.log_softmax(jnp.asarray(ARM_REFERENCE))
    mask, old = jnp.ones((8, 1)), jnp.log(law)[:, None]

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)[:, None]
        kl = kl_estimate(old, reference[:, None], "k1")
        coefficient = 0.0 if estimator else BETA
        advantages = token_rewards(jnp.asarray(ARM_REWARDS), mask, kl, coefficient=coefficient)
        (total, _), _ = policy_loss(
            Ppo(), Tokens(logprobs, old, advantages, mask), sequence_weights=jnp.asarray(law)
        )
        if estimator:
            values = kl_loss(logprobs, reference[:, None], mask, estimator=estimator)
            weights = jnp.asarray(law)
            total += BETA * aggregate(values, mask, "sequence_mean", sequence_weights=weights)[0]
        return total

    return np.asarray(jax.jit(jax.grad(loss))(logits))


def test_k1_and_k3_have_their_closed_fixed_points():
    """k3 in the loss ends at β·ref/(λ − r), k1 in the reward at ref·e^(r/β)/Z."""
    ref = np.exp(world.log_softmax(ARM_REFERENCE))
    low, high = ARM_REWARDS.max() + 1e-9, ARM_REWARDS.max() + 10
    for _ in range(200):
        middle = (low + high) / 2
        if np.sum(BETA * ref / (middle - ARM_REWARDS)) > 1:
            low = middle
        else:
            high = middle
    k3 = BETA * ref / (high - ARM_REWARDS)
    k1 = np.exp(world.log_softmax(ARM_REFERENCE + ARM_REWARDS / BETA))
    assert high == pytest.approx(1.089203, abs=1e-6)
    golden = [0.578619, 0.062683, 0.026334, 0.121485, 0.054243, 0.080216, 0.032619, 0.043801]
    np.testing.assert_allclose(k3, golden, atol=1e-6)
    golden = [0.470234, 0.035792, 0.031169, 0.209376, 0.019646, 0.157546, 0.059110, 0.017126]
    np.testing.assert_allclose(k1, golden, atol=1e-6)
    summary = [k3 @ ARM_REWARDS, k3 @ np.log(k3 / ref), ref @ np.log(ref / k3)]
    np.testing.assert_allclose(summary, [0.589203, 0.801942, 0.716268], atol=1e-6)
    summary = [k1 @ ARM_REWARDS, k1 @ np.log(k1 / ref)]
    np.testing.assert_allclose(summary, [0.674403, 0.865090], atol=1e-6)

    np.testing.assert_allclose(bandit_gradient(k3, estimator="k3"), 0, atol=1e-9)
    np.testing.assert_allclose(bandit_gradient(k1), 0, atol=1e-9)
    np.testing.assert_allclose(bandit_gradient(k1, estimator="k2"), 0, atol=1e-9)
    for law, estimator in ((k3, None), (k3, "k2"), (k1, "k3"), (k1, "k1")):
        assert np.abs(bandit_gradient(law, estimator=estimator)).max() > 0.01
