"""Minimised over the exact population of enum-121, losses reach the optimum known for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from rlhf_jax.losses.cross_entropy import token_cross_entropy, token_statistics
from rlhf_jax.losses.preference import LOSSES, Pairs, preference_loss
from rlhf_jax.losses.reductions import mean, segment_logprobs
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.oracle.exact_world import (
    ACTIONS,
    LENGTHS,
    MASK,
    MAX_TOKENS,
    NODES,
    PREFIXES,
    PROMPTS,
    REFERENCE,
    RESPONSES,
    REWARDS,
    TOKENS,
    expected_reward,
    kl,
    logprobs,
    pair_law,
    tilt,
)

BETA = 0.5
BAYES_LOSS, BAYES_ACCURACY = 0.614803, 0.657990
REF = logprobs(REFERENCE)
PROBABILITY = pair_law(REF).ravel()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def table_statistics(table):
    """A table policy's token statistics by the library: a one-hot hidden state picks its row."""
    rows = PROMPTS * len(PREFIXES)
    nodes = np.arange(PROMPTS)[:, None, None] * len(PREFIXES) + NODES
    hidden = np.eye(rows)[nodes.reshape(-1, MAX_TOKENS)]
    targets = np.tile(TOKENS, (PROMPTS, 1))
    unembedding = table.reshape(rows, ACTIONS).T
    return token_statistics(hidden, unembedding, targets, chunk_tokens=4096)


def table_logprobs(table):
    """[PROMPTS, 121] log-probs of the responses."""
    weights = np.tile(MASK, (PROMPTS, 1))
    token_logprobs = table_statistics(table).logprobs
    sums = segment_logprobs(token_logprobs, weights, np.zeros(weights.shape, np.int32), 1)
    return sums.reshape(PROMPTS, len(RESPONSES))


def all_pairs(values):
    """[PROMPTS, 121] → values of the (chosen, rejected) of every pair, [PROMPTS·121·121] each."""
    shape = (*REF.shape, REF.shape[1])
    chosen = jnp.broadcast_to(values[:, :, None], shape)
    return chosen.ravel(), jnp.broadcast_to(values[:, None, :], shape).ravel()


def preference(name, **options):
    """The population loss of a table, and its metrics, as a function of the table."""
    lengths = all_pairs(np.tile(LENGTHS, (PROMPTS, 1)))
    kl = options.pop("kl", None)
    chosen_loss = LOSSES[name](**options)

    def loss(table):
        policy = all_pairs(table_logprobs(table))
        reference = all_pairs(REF) if chosen_loss.uses_reference else (None, None)
        pairs = Pairs(*policy, *reference, *lengths, PROBABILITY, kl)
        total, metrics = preference_loss(chosen_loss, pairs)
        assert total[0].dtype == jnp.float64
        return mean(total), metrics

    return loss


def fit(loss, start):
    """Minimises loss(x) -> (value, metrics) by L-BFGS in float64; returns (x, value)."""
    step = jax.jit(jax.value_and_grad(lambda x: loss(x)[0]))

    def objective(flat):
        value, gradient = step(flat.reshape(start.shape))
        return float(value), np.asarray(gradient).ravel()

    options = {"maxiter": 1500, "maxfun": 3000, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 30}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(start.shape), found.fun


def test_the_world_has_its_golden_numbers():
    np.testing.assert_allclose(
        REWARDS[0, :5], [0.11823781, 0.35222806, -0.28876469, 0.21087409, 1.03239367], atol=1e-8
    )
    np.testing.assert_allclose(REF[0, :3], [-1.39100139, -3.20174737, -4.78845985], atol=1e-8)
    np.testing.assert_allclose(PROBABILITY.sum(), 1)
    best = tilt(REF, REWARDS / BETA)
    np.testing.assert_allclose(expected_reward(REF), -0.180583, atol=1e-6)
    np.testing.assert_allclose(
        [expected_reward(best), kl(best, REF)], [0.558539, 0.737306], atol=1e-6
    )


def test_the_library_scores_a_table_exactly():
    np.testing.assert_allclose(jax.jit(table_logprobs)(REFERENCE), REF, rtol=1e-12)


def test_reward_model_reaches_the_bayes_loss_and_the_true_reward():
    def loss(scores):
        total, metrics = bradley_terry(*all_pairs(scores), PROBABILITY)
        return mean(total), metrics

    scores, value = fit(loss, np.zeros_like(REWARDS))
    assert abs(value - BAYES_LOSS) < 1e-6
    _, metrics = loss(scores)
    assert abs(mean(metrics["rewards/accuracies"]) - BAYES_ACCURACY) < 1e-6
    offset = scores - REWARDS
    np.testing.assert_allclose(offset - offset.mean(1, keepdims=True), 0, atol=2e-2)
    # What the fit leaves is in responses the reference never gives; its own law hardly sees it.
    spread = (np.exp(REF) * offset**2).sum(1) - (np.exp(REF) * offset).sum(1) ** 2
    assert spread.max() < 1e-6


def test_dpo_is_least_at_the_optimal_policy():
    loss = preference("sigmoid", beta=BETA)
    best = tilt(REF, REWARDS / BETA)
    table, value = fit(loss, REFERENCE)
    logp = logprobs(table)
    assert abs(value - BAYES_LOSS) < 1e-6
    assert kl(logp, best) < 1e-5
    np.testing.assert_allclose([expected_reward(logp), kl(logp, REF)], [0.5585, 0.7373], atol=1e-3)
    _, metrics = loss(jnp.asarray(table))
    np.testing.assert_allclose(mean(metrics["rewards/accuracies"]), BAYES_ACCURACY, atol=1e-4)
    # The log-prob of chosen responses falls at the exact optimum: not by itself a bug.
    np.testing.assert_allclose(mean(metrics["logps/chosen"]), -4.2309, atol=2e-3)
    np.testing.assert_allclose(mean(metrics["logps/rejected"]), -4.9971, atol=2e-3)
    _, start = loss(jnp.asarray(REFERENCE))
    np.testing.assert_allclose(mean(start["logps/chosen"]), -3.8187, atol=1e-4)


@pytest.mark.parametrize(
    ("tau", "divergence", "reward"),
    [(0.1, 0.7102, 0.5396), pytest.param(0.25, 0.1256, 0.1236, marks=pytest.mark.slow)],
)
def test_ipo_reaches_its_closed_form(tau, divergence, reward):
    wins = 1 / (1 + np.exp(REWARDS[:, None, :] - REWARDS[:, :, None]))
    closed = tilt(REF, np.einsum("pz,pyz->py", np.exp(REF), wins) / tau)
    np.testing.assert_allclose(
        [kl(closed, REF), expected_reward(closed)], [divergence, reward], atol=1e-4
    )
    table, _ = fit(preference("ipo", beta=tau), REFERENCE)
    assert kl(logprobs(table), closed) < 1e-6


# Losses to six digits are from a second, plain numpy minimisation of the same population.
@pytest.mark.parametrize(
    ("name", "options", "value", "reward", "divergence", "length"),
    [
        ("simpo", {"beta": 2.0, "gamma": 1.0}, 1.127340, 0.7374, 1.6746, 3.1045),
        pytest.param(
            *("simpo", {"beta": 2.0, "gamma": 0.0}, BAYES_LOSS, 0.4673, 1.0448, 2.8770),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("orpo", {"beta": 0.1}, 1.301271, -0.0033, 0.1684, 2.3736), marks=pytest.mark.slow
        ),
        pytest.param(
            *("orpo", {"beta": 1.0}, 1.922240, 0.0813, 0.2097, 2.4827), marks=pytest.mark.slow
        ),
    ],
)
def test_reference_free_losses_reach_their_minimum(
    name, options, value, reward, divergence, length
):
    table, found = fit(preference(name, **options), REFERENCE)
    logp = logprobs(table)
    assert abs(found - value) < 1e-6
    reached = expected_reward(logp), kl(logp, REF), (np.exp(logp) * LENGTHS).sum(1).mean()
    np.testing.assert_allclose(reached, [reward, divergence, length], atol=1e-3)


def test_supervised_cross_entropy_is_least_at_the_reference():
    law = np.exp(REF).reshape(-1, 1) / PROMPTS
    weights = law * np.tile(MASK, (PROMPTS, 1))

    def loss(table):
        total, metrics = token_cross_entropy(table_statistics(table), weights)
        return total[0], metrics

    entropy = -(np.exp(REF) * REF).sum(1).mean()
    table, value = fit(loss, np.zeros_like(REFERENCE))
    assert abs(value - entropy) < 1e-9
    assert kl(REF, logprobs(table)) < 1e-9
    np.testing.assert_allclose(
        (law * np.tile(LENGTHS, PROMPTS)[:, None]).sum(), weights.sum(), rtol=1e-12
    )
    np.testing.assert_allclose(weights.sum(), 3.0224, atol=1e-4)
