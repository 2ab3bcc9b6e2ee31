"""Policy, value and KL losses by hand, and what must hold for all of them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax.losses.policy import (
    AGGREGATIONS,
    OBJECTIVES,
    Gspo,
    Ppo,
    Tokens,
    aggregate,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from rlhf_jax.losses.reductions import mean

N, T = 8, 6
CONSTANTS = {"constant": 10.0}


def f32(x):
    return jnp.asarray(x, jnp.float32)


def batch(advantages="token"):
    """(logprobs, old_logprobs, advantages, mask, sequence_weights) of N uneven sequences."""
    rng = np.random.default_rng(0)
    old = -rng.uniform(0.5, 3, (N, T))
    logprobs = old + rng.normal(0, 0.3, (N, T))
    mask = rng.random((N, T)) < 0.7
    mask[:, 0], mask[3], mask[4] = True, False, True
    factors = rng.normal(size=(N, T if advantages == "token" else 1)) + np.zeros((N, T))
    weights = rng.uniform(0.2, 2, N)
    return [f32(x) for x in (logprobs, old, factors, mask, weights)]


def everything(logprobs, old, advantages, mask, weights):
    """{name: ((loss, metrics), gradient)} of all objectives, by a different aggregation each."""
    results = {}
    for i, name in enumerate(OBJECTIVES):
        mode = AGGREGATIONS[i % len(AGGREGATIONS)]

        def total(logprobs, name=name, mode=mode):
            loss, metrics = policy_loss(
                OBJECTIVES[name](),
                Tokens(logprobs, old, advantages, mask),
                aggregation=mode,
                constant=CONSTANTS.get(mode),
                sequence_weights=weights,
            )
            return loss[0], (loss, metrics)

        (_, outputs), gradient = jax.value_and_grad(total, has_aux=True)(logprobs)
        results[name] = outputs, gradient
    return results


jitted_everything = jax.jit(everything)


# One sequence of two tokens of r = 1.5 and 0.5, then a masked one; Σd = log 0.75.
RATIOS = (1.5, 0.5)
SEQUENCE, MEAN = 0.75, math.sqrt(0.75)
LP = [math.log(0.6), math.log(0.1)]


def sig(x):
    return 1 / (1 + math.exp(-x))


# (name, options, losses of the tokens where A = 2, where A = −2)
BY_HAND = [
    ("policy_gradient", {}, [-2 * lp for lp in LP], [2 * lp for lp in LP]),
    ("ppo", {}, [-2.4, -1.0], [3.0, 1.6]),
    ("ppo", {"clip_low": 0.1, "clip_high": 0.3}, [-2.6, -1.0], [3.0, 1.8]),
    ("ppo", {"dual_clip": 1.25}, [-2.4, -1.0], [2.5, 1.6]),
    ("ppo", {"delta": 1.4}, [-2.4, -1.0], [2.8, 1.6]),
    ("ppo_sequence", {}, [-0.75, -0.75], [0.8, 0.8]),
    ("ppo_sequence", {"clip_low": 0.3}, [-0.75, -0.75], [0.75, 0.75]),
    ("gspo", {}, [-2 * MEAN, -2 * MEAN], [2 * (1 - 3e-4), 2 * (1 - 3e-4)]),
    ("gspo", {"clip_low": 0.3, "differentiable": "token"}, [-2 * MEAN] * 2, [2 * MEAN] * 2),
    ("cispo", {}, [-2 * 1.5 * LP[0], -LP[1]], [2 * 1.5 * LP[0], LP[1]]),
    ("cispo", {"clip_high": 1.2}, [-2 * 1.2 * LP[0], -LP[1]], [2 * 1.2 * LP[0], LP[1]]),
    (
        *("cispo", {"clip": "upper", "clip_high": 0.1}),
        *([-2 * 1.1 * LP[0], -LP[1]], [2 * 1.1 * LP[0], LP[1]]),
    ),
    (
        *("cispo", {"clip": "both", "clip_high": 0.1, "clip_low": 0.4}),
        *([-2 * 1.1 * LP[0], -2 * 0.6 * LP[1]], [2 * 1.1 * LP[0], 2 * 0.6 * LP[1]]),
    ),
    (
        *("sapo", {}, [-8 * sig(0.5), -8 * sig(-0.5)]),
        [8 * sig(0.525) / 1.05, 8 * sig(-0.525) / 1.05],
    ),
    (
        *("sapo", {"tau_positive": 2.0, "tau_negative": 3.0}),
        *([-4 * sig(1), -4 * sig(-1)], [8 * sig(1.5) / 3, 8 * sig(-1.5) / 3]),
    ),
    (
        "gmpo",
        {},
        [-2 * math.exp((0.4 + math.log(0.5)) / 2)] * 2,
        [2 * math.exp((math.log(1.5) - 0.4) / 2)] * 2,
    ),
    (
        *("gmpo", {"clip_low": 0.1, "clip_high": 0.3}),
        [-2 * math.exp((0.3 + math.log(0.5)) / 2)] * 2,
        [2 * math.exp((math.log(1.5) - 0.1) / 2)] * 2,
    ),
]


def test_by_hand():
    logprobs = f32([[*LP, 7]])
    old = f32([[math.log(0.4), math.log(0.2), -7]])
    mask = f32([[1, 1, 0]])

    @jax.jit
    def totals():
        return [
            [
                policy_loss(
                    OBJECTIVES[name](**options), Tokens(logprobs, old, f32([[a, a, 9]]), mask)
                )[0]
                for a in (2, -2)
            ]
            for name, options, _, _ in BY_HAND
        ]

    assert {name for name, *_ in BY_HAND} == set(OBJECTIVES)
    for (name, options, *expected), found in zip(BY_HAND, totals(), strict=True):
        for values, (total, weight) in zip(expected, found, strict=True):
            assert float(total) == pytest.approx(sum(values), rel=1e-5), (name, options)
            assert float(weight) == 2


def test_metrics_by_hand():
    """r = 1.5, 0.5 with weight 1 and r = 1 with weight 2; A is positive, negative, positive."""
    old = f32([[-1, -1, 0], [-2, 0, 0]])
    logprobs = old + jnp.log(f32([[1.5, 0.5, 3], [1, 3, 3]]))
    advantages, mask = f32([[1, -1, 1], [1, 1, 1]]), f32([[1, 1, 0], [1, 0, 0]])

    def metrics(name, **options):
        _, found = policy_loss(
            OBJECTIVES[name](**options),
            Tokens(logprobs, old, advantages, mask),
            sequence_weights=f32([1, 2]),
        )
        return {key: float(mean(value)) for key, value in found.items()}

    up, down = math.log(1.5), math.log(0.5)
    expected = {
        "policy/ratio": (1.5 + 0.5 + 2) / 4,
        "policy/ratio_excess": (0.5 - 0.5) / 4,
        "policy/ratio_excess_square": (0.25 + 0.25) / 4,
        "policy/approxkl": (up**2 + down**2) / 8,
        "policy/approxkl_k3": (0.5 - up - 0.5 - down) / 4,
        "policy/clipfrac": 0.5,
        "policy/clipfrac_low": 0.25,
        "policy/clipfrac_high": 0.25,
    }
    found = metrics("ppo")
    assert set(found) == {"loss", *expected}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key  # one is 0.5 - 0.5
    assert found["loss"] == pytest.approx((-1.2 + 0.8 - 2) / 4)

    def clipped(name, **options):
        found = metrics(name, **options)
        return [found[f"policy/clipfrac{side}"] for side in ("", "_low", "_high")]

    assert clipped("ppo", clip_high=0.6) == [0.25, 0.25, 0]
    assert clipped("cispo") == [0, 0, 0]
    for without in ("policy_gradient", "sapo"):  # a share of 0 would say that nothing was clipped
        assert not [name for name in metrics(without) if "clip" in name]
    assert clipped("cispo", clip_high=1.2) == [0.25, 0, 0.25]
    assert clipped("cispo", clip="both", clip_high=0.1) == [0.5, 0.25, 0.25]
    assert clipped("gmpo") == [0.5, 0.25, 0.25]
    assert clipped("gmpo", clip_low=0.7) == [0.25, 0, 0.25]
    assert clipped("gspo") == clipped("ppo_sequence") == [0.25, 0.25, 0]


def test_small_deviations_of_ratios_from_1_are_not_lost_in_float32():
    ratios = 1 + 1e-4 * np.random.default_rng(0).normal(size=(10, 100))
    logprobs, zeros = f32(np.log(ratios)), jnp.zeros(ratios.shape)
    _, found = policy_loss(Ppo(), Tokens(logprobs, zeros, zeros, jnp.ones(ratios.shape)))
    names = "policy/ratio_excess", "policy/ratio_excess_square"
    excess, square = (float(mean(found[name])) for name in names)
    assert excess == pytest.approx((ratios - 1).mean(), rel=1e-4)
    assert square - excess**2 == pytest.approx(ratios.var(), rel=1e-4)


@pytest.fixture(scope="module")
def reference_results():
    return jitted_everything(*batch())


def test_every_objective_has_a_gradient_of_its_own(reference_results):
    vectors = [np.asarray(gradient) for _, gradient in reference_results.values()]
    for i, a in enumerate(vectors):
        assert np.isfinite(a).all() and np.abs(a).max() > 1e-3
        for b in vectors[:i]:
            assert np.abs(a - b).max() > 1e-3


def test_garbage_in_masked_slots_changes_no_bit(reference_results):
    logprobs, old, advantages, mask, weights = batch()
    for garbage in (jnp.nan, jnp.inf, -1e30):
        spoiled = [jnp.where(mask != 0, x, garbage) for x in (logprobs, old, advantages)]
        found = jitted_everything(*spoiled, mask, weights)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference_results), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)


def test_sequences_of_weight_zero_are_as_good_as_absent():
    arrays = batch()
    arrays[4] = arrays[4].at[0].set(0)
    spoiled = [x.at[0].set(jnp.nan) for x in arrays[:3]]
    found = jitted_everything(*spoiled, *arrays[3:])
    arrays[3] = arrays[3].at[0].set(0)
    expected = jitted_everything(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("amount", [1, 5])
def test_padding_and_order_change_nothing(reference_results, amount):
    order = np.random.default_rng(1).permutation(N)
    arrays = [x[order] for x in batch()]
    padded = [jnp.pad(x, ((0, amount), (0, amount))) for x in arrays[:4]]
    found = jitted_everything(*padded, jnp.pad(arrays[4], (0, amount), constant_values=1))
    for name, (outputs, gradient) in reference_results.items():
        for a, b in zip(jax.tree.leaves(found[name][0]), jax.tree.leaves(outputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            found[name][1][:N, :T], gradient[order], rtol=2e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("transformation", ["parts", "vmap", "shard_map"])
def test_parts_add_up(reference_results, transformation):
    arrays = batch()
    parts = [x.reshape(4, 2, *x.shape[1:]) for x in arrays]
    if transformation == "parts":
        split = [jitted_everything(*(x[i] for x in parts)) for i in range(4)]
        outputs = {name: split[0][name][0] for name in OBJECTIVES}
        for part in split[1:]:
            outputs = jax.tree.map(jnp.add, outputs, {name: part[name][0] for name in OBJECTIVES})
        gradients = {
            name: jnp.concatenate([part[name][1] for part in split]) for name in OBJECTIVES
        }
    elif transformation == "vmap":
        split = jax.jit(jax.vmap(everything))(*parts)
        outputs = {name: jax.tree.map(lambda x: x.sum(0), split[name][0]) for name in OBJECTIVES}
        gradients = {name: split[name][1].reshape(N, T) for name in OBJECTIVES}
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

        def shard(*arrays):
            results = everything(*arrays)
            return {name: (jax.lax.psum(r[0], "data"), r[1]) for name, r in results.items()}

        specs = {name: (P(), P("data")) for name in OBJECTIVES}
        split = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("data"), out_specs=specs))(
            *arrays
        )
        outputs = {name: result[0] for name, result in split.items()}
        gradients = {name: result[1] for name, result in split.items()}
    for name, (expected, gradient) in reference_results.items():
        for a, b in zip(jax.tree.leaves(outputs[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradients[name], gradient, rtol=2e-5, atol=1e-6, err_msg=name)


def test_at_ratio_one_all_are_the_policy_gradient():
    """Objectives of tokens always; those of sequences where A is one number per sequence."""
    per_sequence = ("ppo_sequence", "gspo", "gmpo")

    @jax.jit
    def gradients(old, advantages, mask):
        def gradient(name, mode, **options):
            def total(logprobs):
                objective = OBJECTIVES[name](**options)
                return policy_loss(
                    objective, Tokens(logprobs, old, advantages, mask), aggregation=mode
                )[0][0]

            return jax.grad(total)(old)

        found = {name: gradient(name, "sequence_mean") for name in OBJECTIVES}
        found["gspo of tokens"] = gradient("gspo", "sequence_mean", differentiable="token")
        return found

    for kind in ("token", "sequence"):
        _, old, advantages, mask, _ = batch(kind)
        found = gradients(old, advantages, mask)
        for name, gradient in found.items():
            if kind == "token" and name in per_sequence:
                assert np.abs(gradient - found["policy_gradient"]).max() > 1e-3, name
                continue
            np.testing.assert_allclose(
                gradient, -advantages * mask, rtol=1e-5, atol=1e-6, err_msg=name
            )


def test_a_clipped_token_has_no_gradient_and_cispo_keeps_it():
    logprobs, old = f32([[0.5, -0.5, 0.5, -0.5]]), jnp.zeros((1, 4))
    advantages = f32([[1, -1, -1, 1]])

    def gradient(name, **options):
        def total(x):
            objective = OBJECTIVES[name](**options)
            return policy_loss(objective, Tokens(x, old, advantages, jnp.ones((1, 4))))[0][0]

        return jax.grad(total)(logprobs)[0]

    up, down = math.exp(0.5), math.exp(-0.5)
    np.testing.assert_allclose(gradient("ppo"), [0, 0, up, -down], rtol=1e-6)
    np.testing.assert_allclose(gradient("ppo", dual_clip=1.5), [0, 0, 0, -down], rtol=1e-6)
    np.testing.assert_allclose(gradient("ppo", delta=1.4), [0, 0, 0, -down], rtol=1e-6)
    np.testing.assert_allclose(
        gradient("cispo", clip_high=1.2), [-1.2, down, 1.2, -down], rtol=1e-6
    )


def test_only_the_log_probs_get_a_gradient_and_huge_ratios_stay_finite():
    logprobs, old, advantages, mask, _ = batch()
    logprobs = logprobs.at[0, 0].set(-1e3).at[1, 0].set(1e3)
    importance = jnp.ones_like(mask)

    @jax.jit
    def run(name_arrays):
        results = {}
        for name in OBJECTIVES:

            def total(logprobs, old, advantages, importance, name=name):
                objective = OBJECTIVES[name]()
                arrays = logprobs, old, advantages, mask
                return policy_loss(objective, Tokens(*arrays), importance=importance)[0][0]

            results[name] = jax.value_and_grad(total, (0, 1, 2, 3))(*name_arrays)
        return results

    for name, (value, gradients) in run((logprobs, old, advantages, importance)).items():
        assert np.isfinite(value) and np.isfinite(gradients[0]).all(), name
        for gradient in gradients[1:]:
            np.testing.assert_array_equal(gradient, 0, err_msg=name)


def test_importance_multiplies_the_loss_of_tokens():
    logprobs, old, advantages, mask, _ = batch()
    factors = f32(np.random.default_rng(2).uniform(0, 2, (N, T)))
    spoiled = jnp.where(mask != 0, factors, jnp.nan)
    total, _ = policy_loss(Ppo(), Tokens(logprobs, old, advantages, mask), importance=spoiled)
    expected, _ = policy_loss(Ppo(), Tokens(logprobs, old, advantages * factors, mask))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_aggregations_by_hand():
    values = f32([[1, 2, jnp.nan], [4, 9, 6], [jnp.nan] * 3])
    mask, weights = f32([[1, 1, 0], [1, 0, 1], [0, 0, 0]]), f32([1, 3, 5])
    plain = {
        "token_mean": (13, 4),
        "sequence_mean": (13, 2),
        "sequence_mean_token_mean": (6.5, 2),
        "constant": (13, 20),
    }
    weighted = {
        "token_mean": (33, 8),
        "sequence_mean": (33, 4),
        "sequence_mean_token_mean": (16.5, 4),
        "constant": (33, 40),
    }
    assert set(plain) == set(AGGREGATIONS)
    for mode in AGGREGATIONS:
        options = {"constant": CONSTANTS.get(mode)}
        assert tuple(map(float, aggregate(values, mask, mode, **options))) == plain[mode]
        found = aggregate(values, mask, mode, sequence_weights=weights, **options)
        assert tuple(map(float, found)) == weighted[mode]
        total, weight = aggregate(values, 0 * mask, mode, **options)
        assert (float(total), float(weight)) == (0, 0)


def test_value_loss_by_hand():
    values, old = f32([[1.0, 1.0, 0.3, jnp.nan]]), f32([[0.5, 0.5, 0.2, 9]])
    returns, mask = f32([[0.0, 2.0, 1.0, jnp.nan]]), f32([[1, 1, 1, 0]])
    (total, weight), metrics = value_loss(values, old, returns, mask)
    assert float(total) == pytest.approx((1 + 1.3**2 + 0.7**2) / 2)
    assert float(weight) == 3
    expected = {
        "loss": (1 + 1.69 + 0.49) / 6,
        "value/clipfrac": 1 / 3,
        "value/mean": 2.3 / 3,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert float(mean(metrics[name])) == pytest.approx(value, rel=1e-5), name
    (total, _), metrics = value_loss(values, old, returns, mask, clip=None)
    assert float(total) == pytest.approx((1 + 1 + 0.49) / 2)
    assert float(mean(metrics["value/clipfrac"])) == 0

    def loss(*arrays):
        return value_loss(*arrays, mask)[0][0]

    gradients = jax.grad(loss, (0, 1, 2))(values, old, returns)
    np.testing.assert_allclose(gradients[0], [[1, 0, -0.7, 0]], rtol=1e-6)
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, 0)


def test_value_loss_of_parts_adds_up():
    values, old, returns, mask, weights = batch()

    def run(part):
        arrays = (x[part] for x in (values, old, returns, mask))
        return value_loss(*arrays, sequence_weights=weights[part])

    whole = run(slice(None))
    parts = jax.tree.map(jnp.add, run(slice(0, 4)), run(slice(4, 8)))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_kl_loss_by_hand():
    logprobs, ref = f32([[-1, -2, 5], [-1, 5, 5]]), f32([[-1.5, -1.7, jnp.nan], [-3, 0, 0]])
    mask = f32([[1, 1, 0], [1, 0, 0]])
    k3 = [math.exp(-x) - 1 + x for x in (0.5, -0.3, 0.2, 2)]
    expected = {
        ("k1", "token"): [[0.5, -0.3, 0], [2, 0, 0]],
        ("k2", "token"): [[0.125, 0.045, 0], [2, 0, 0]],
        ("k3", "token"): [[k3[0], k3[1], 0], [k3[3], 0, 0]],
        ("k1", "sequence"): [[0.1, 0.1, 0], [2, 0, 0]],
        ("k2", "sequence"): [[0.01, 0.01, 0], [2, 0, 0]],
        ("k3", "sequence"): [[k3[2] / 2, k3[2] / 2, 0], [k3[3], 0, 0]],
    }
    for (estimator, level), values in expected.items():
        found = kl_loss(logprobs, ref, mask, estimator=estimator, level=level)
        np.testing.assert_allclose(found, values, rtol=1e-4, err_msg=f"{estimator} {level}")
    old = logprobs - jnp.log(f32([[2, 3, jnp.nan], [0.5, 9, 9]]))
    found = kl_loss(logprobs, ref, mask, level="token", old_logprobs=old)
    np.testing.assert_allclose(found, [[0.25, 0.135, 0], [1, 0, 0]], rtol=1e-5)
    found = kl_loss(logprobs, ref, mask, level="sequence", old_logprobs=old)
    np.testing.assert_allclose(found, [[0.06, 0.06, 0], [1, 0, 0]], rtol=1e-4)


def test_gradients_of_the_kl_loss():
    logprobs, ref, mask = f32([[-1, -2, jnp.nan]]), f32([[-1.5, -1.7, 0]]), f32([[1, 1, 0]])

    def gradient(level, of=0):
        def total(logprobs, ref):
            return jnp.sum(kl_loss(logprobs, ref, mask, estimator="k2", level=level))

        return jax.grad(total, of)(logprobs, ref)

    np.testing.assert_allclose(gradient("token"), [[0.5, -0.3, 0]], rtol=1e-5)
    np.testing.assert_allclose(gradient("sequence"), [[0.2, 0.2, 0]], rtol=1e-5)
    np.testing.assert_array_equal(gradient("sequence", of=1), 0)
    old = logprobs - jnp.log(f32([[2, 3, 1]]))

    def total(logprobs, old):
        return jnp.sum(kl_loss(logprobs, ref, mask, level="token", old_logprobs=old))

    # Of ratio · s² / 2, where s = 0.5 and −0.3: ratio · (s + s² / 2).
    np.testing.assert_allclose(jax.grad(total)(logprobs, old), [[1.25, -0.765, 0]], rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(total, 1)(logprobs, old), 0)


def test_importance_weights_by_hand():
    behaviour = f32([[-1, -1, 9], [-2, jnp.nan, 9]])
    logprobs = behaviour + jnp.log(f32([[3, 0.25, 9], [1.5, 9, 9]]))
    mask = f32([[1, 1, 0], [1, 0, 0]])
    table = [
        ({}, [[2, 0.25, 0], [1.5, 0, 0]]),
        ({"cap": None}, [[3, 0.25, 0], [1.5, 0, 0]]),
        ({"mode": "mask"}, [[0, 0.25, 0], [1.5, 0, 0]]),
        ({"level": "sequence"}, [[0.75, 0.75, 0], [1.5, 0, 0]]),
        ({"level": "sequence", "cap": 1.0}, [[0.75, 0.75, 0], [1, 0, 0]]),
        ({"level": "sequence", "cap": 1.0, "mode": "mask"}, [[0.75, 0.75, 0], [0, 0, 0]]),
    ]
    for options, expected in table:
        found = importance_weights(logprobs, behaviour, mask, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(options))
    gradient = jax.grad(lambda x: jnp.sum(importance_weights(x, behaviour, mask)))(logprobs)
    np.testing.assert_array_equal(gradient, 0)


def test_precision_follows_the_inputs():
    logprobs, old, advantages, mask, _ = batch()

    def dtypes(arrays):
        outputs = (
            policy_loss(Gspo(), Tokens(*arrays)),
            value_loss(*arrays),
            kl_loss(arrays[0], arrays[1], arrays[3]),
            importance_weights(arrays[0], arrays[1], arrays[3]),
        )
        return {x.dtype for x in jax.tree.leaves(outputs)}

    half = [x.astype(jnp.bfloat16) for x in (logprobs, old, advantages, mask)]
    assert dtypes(half) == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        arrays = logprobs, old, advantages, mask
        double = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        assert dtypes(double) == {jnp.dtype("float64")}


def test_mistakes_are_refused_by_name():
    logprobs, old, advantages, mask, weights = batch()

    def run(**options):
        return policy_loss(Ppo(), Tokens(logprobs, old, advantages, mask), **options)

    with pytest.raises(ValueError, match="differentiable must be one of token, sequence"):
        OBJECTIVES["gspo"](differentiable="word")
    with pytest.raises(ValueError, match="clip must be one of absolute, upper, both"):
        OBJECTIVES["cispo"](clip="lower")
    with pytest.raises(ValueError, match="clip_low is only for clip 'both', not 'absolute'"):
        OBJECTIVES["cispo"](clip_low=0.1)
    with pytest.raises(ValueError, match=r"dual_clip must be in \(1, inf\), got 0.5"):
        OBJECTIVES["ppo"](dual_clip=0.5)
    with pytest.raises(ValueError, match=r"delta must be in \(1 \+ clip_high, inf\), got 1.1"):
        OBJECTIVES["ppo"](delta=1.1)
    with pytest.raises(ValueError, match="aggregation must be one of token_mean, "):
        run(aggregation="mean")
    with pytest.raises(ValueError, match="'constant' needs the constant"):
        run(aggregation="constant")
    with pytest.raises(ValueError, match="only for aggregation 'constant', not 'token_mean'"):
        run(constant=5.0)
    with pytest.raises(ValueError, match=r"sequence_weights \(6,\), first_slots \(8,\)"):
        run(sequence_weights=weights[:6])
    with pytest.raises(ValueError, match="logprobs must have 2 axes"):
        policy_loss(Ppo(), Tokens(logprobs[0], old[0], advantages[0], mask[0]))
    with pytest.raises(ValueError, match="same shape"):
        policy_loss(Ppo(), Tokens(logprobs, old, advantages[:, :1], mask))
    with pytest.raises(ValueError, match=r"clip must be in \(0, inf\), got 0"):
        value_loss(logprobs, old, advantages, mask, clip=0)
    with pytest.raises(ValueError, match="level must be one of token, sequence"):
        kl_loss(logprobs, old, mask, level="word")
    with pytest.raises(ValueError, match="mode must be one of truncate, mask"):
        importance_weights(logprobs, old, mask, mode="drop")
