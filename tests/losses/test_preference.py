"""Every preference loss by hand, and what must hold for all of them."""

from __future__ import annotations

import math
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax.config import own_fields
from rlhf_jax.losses.preference import (
    LOSSES,
    Kto,
    Pairs,
    Sigmoid,
    Simpo,
    kto_baseline,
    preference_loss,
    unpaired_kto,
)
from rlhf_jax.losses.reductions import mean

BATCHWISE = {name for name, loss in LOSSES.items() if loss.batchwise}
# Most tests keep to this many pairs, for which all losses are compiled once.
SIZE = 16
OPTIONS = {"kto": {"kl": 0.3}}


def options_of(name):
    """Names of a loss's options; KTO's reference point counts as one."""
    return [*own_fields(LOSSES[name]), *OPTIONS.get(name, {})]


def nll(x):
    """−log σ(x)."""
    return math.log1p(math.exp(-x))


def sig(x):
    return 1 / (1 + math.exp(-x))


def batch(size=SIZE):
    """Random pairs: (chosen, rejected, ref_chosen, ref_rejected, lengths ×2, weights)."""
    rng = np.random.default_rng(0)
    logps = -rng.uniform(2, 12, (2, size))
    refs = logps + rng.normal(0, 1, (2, size))
    lengths = rng.integers(2, 9, (2, size))
    weights = rng.uniform(0.2, 2, size)
    return [jnp.asarray(x, jnp.float32) for x in (*logps, *refs, *lengths, weights)]


def evaluate(name, chosen, rejected, ref_chosen, ref_rejected, n_c, n_r, weights, **options):
    references = (ref_chosen, ref_rejected) if LOSSES[name].uses_reference else (None, None)
    stated = {"beta": 0.5, **OPTIONS.get(name, {}), **options}
    kl = stated.pop("kl", None)
    pairs = Pairs(chosen, rejected, *references, n_c, n_r, weights, kl)
    return preference_loss(LOSSES[name](**stated), pairs)


def everything(*arrays):
    """{name: ((total, weight), gradients to the policy's log-probs)} of all losses at once."""
    results = {}
    for name in LOSSES:

        def total(chosen, rejected, *rest, name=name):
            return evaluate(name, chosen, rejected, *rest)[0]

        results[name] = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
    return results


jitted_everything = jax.jit(everything)


# One pair: lp_w = −3, lp_l = −4 with references −3.5 and −3.8, so s_w = 0.5, s_l = −0.2, Δ = 0.7;
# 3 and 5 tokens, so lp̄_w = −1, lp̄_l = −0.8, s̄_w = 1/6, s̄_l = −0.04; β = 0.5, βΔ = 0.35.
ODDS = math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-0.8) / (1 - math.exp(-0.8)))
Q = sig(0.35)
BY_HAND = [
    ("sigmoid", {}, nll(0.35)),
    ("cdpo", {}, 0.9 * nll(0.35) + 0.1 * nll(-0.35)),
    ("cdpo", {"label_smoothing": 0.3}, 0.7 * nll(0.35) + 0.3 * nll(-0.35)),
    ("robust", {}, (0.9 * nll(0.35) - 0.1 * nll(-0.35)) / 0.8),
    ("hinge", {}, 0.65),
    ("ipo", {}, (0.7 - 1) ** 2),
    ("ipo", {"ipo_reduction": "mean"}, (1 / 6 + 0.04 - 1) ** 2),
    ("kto", {}, (1 - sig(0.5 * 0.2)) + (1 - sig(0.5 * 0.5))),
    (
        "kto",
        {"kl": 0.1, "desirable_weight": 2.0, "undesirable_weight": 3.0},
        2 * (1 - sig(0.5 * 0.4)) + 3 * (1 - sig(0.5 * 0.3)),
    ),
    ("orpo", {}, 1 + 0.5 * nll(ODDS)),
    ("simpo", {}, nll(0.5 * -0.2 - 0.5)),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, nll(2 * -0.2 - 1)),
    ("cpo", {}, nll(0.5) + 1),
    ("cpo", {"sft_weight": 0.2}, nll(0.5) + 0.2),
    ("exo_pair", {}, Q * math.log(Q / 0.999) + (1 - Q) * math.log((1 - Q) / 0.001)),
    ("nca_pair", {}, nll(0.25) + nll(-0.25) / 2 + nll(0.1) / 2),
    ("bco_pair", {}, nll(0.25) + nll(0.1)),
    ("sppo_hard", {}, (0.5 - 1) ** 2 + (-0.2 + 1) ** 2),
    ("apo_zero", {}, 1 - sig(0.25) + sig(-0.1)),
    ("apo_down", {}, sig(0.25) + 1 - sig(0.35)),
    ("aot", {}, nll(0.5 * (1 - 0.3))),
    ("aot_unpaired", {}, nll(0.35)),
    ("discopop", {}, (1 - sig(7)) * nll(0.35) + sig(7) * math.exp(-0.35)),
    (
        "discopop",
        {"temperature": 0.5},
        (1 - sig(0.7)) * nll(0.35) + sig(0.7) * math.exp(-0.35),
    ),
    ("sigmoid_norm", {}, nll(0.5 * (1 / 6 + 0.04))),
    ("rpo", {}, nll(0.35) + 1),
    ("rpo", {"sft_weight": 0.2}, nll(0.35) + 0.2),
    ("sigmoid", {"divergence": "forward_kl"}, nll(0.5 * (math.exp(0.2) - math.exp(-0.5)))),
    ("sigmoid", {"divergence": "js"}, nll(0.5 * (math.log(sig(0.5)) - math.log(sig(-0.2))))),
    (
        "sigmoid",
        {"divergence": "alpha", "alpha": 0.25},
        nll(0.5 * (math.exp(0.05) - math.exp(-0.125)) / 0.25),
    ),
    ("sigmoid", {"divergence": "alpha"}, nll(math.exp(0.1) - math.exp(-0.25))),
    ("rpo", {"divergence": "js"}, nll(0.5 * (math.log(sig(0.5)) - math.log(sig(-0.2)))) + 1),
]


def test_by_hand():
    one = [jnp.array([x]) for x in (-3.0, -4.0, -3.5, -3.8, 3, 5, 2.0)]
    results = jax.jit(lambda *a: [evaluate(n, *a, **o) for n, o, _ in BY_HAND])(*one)
    for (name, options, expected), ((total, weight), metrics) in zip(BY_HAND, results, strict=True):
        assert float(total) == pytest.approx(2 * expected, abs=1e-5), (name, options)
        assert float(weight) == 2
        assert metrics["loss"] == (total, weight)


def test_the_hand_table_has_every_loss_and_some_numbers_are_written_out():
    assert {name for name, *_ in BY_HAND} == set(LOSSES)
    values = {name: value for name, options, value in BY_HAND if not options}
    # A second opinion on the helpers of this file.
    assert values["sigmoid"] == pytest.approx(0.5334, abs=1e-4)
    assert values["orpo"] == pytest.approx(1 + 0.5 * 0.8763, abs=1e-4)
    assert values["kto"] == pytest.approx(0.475021 + 0.437823, abs=1e-6)


def test_aot_matches_sorted_with_sorted():
    chosen, rejected = jnp.array([-1.0, -5.0, -2.0]), jnp.array([-4.0, -3.0, -6.0])
    zero, ones = jnp.zeros(3), jnp.ones(3)
    # Unpaired: sorted s_w = −5 −2 −1 against sorted s_l = −6 −4 −3.
    (total, weight), _ = evaluate("aot_unpaired", chosen, rejected, zero, zero, ones, ones, ones)
    assert float(total) == pytest.approx(nll(0.5) + nll(1.0) + nll(1.0), abs=1e-5)
    # Paired: sorted margins −2 3 4 against sorted reference margins −1 0 2.
    refs = jnp.array([2.0, -1.0, 0.0]), zero
    (total, weight), _ = evaluate("aot", chosen, rejected, *refs, ones, ones, ones)
    assert float(total) == pytest.approx(nll(-0.5) + nll(1.5) + nll(1.0), abs=1e-5)
    assert float(weight) == 3


@pytest.mark.parametrize("name", sorted(BATCHWISE))
def test_aot_takes_a_weight_as_so_many_copies(name):
    arrays = batch(5)[:6]
    counts = np.array([2, 0, 1, 3, 1])
    weighted, _ = evaluate(name, *arrays, jnp.asarray(counts, jnp.float32))
    copies = [jnp.repeat(x, counts) for x in arrays]
    repeated, _ = evaluate(name, *copies, jnp.ones(counts.sum()))
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)


def test_metrics_by_hand():
    rows = [(-3.0, -4.0, -3.5, -3.8), (-2.0, -2.0, -1.0, -1.0)]
    arrays = [jnp.array(x) for x in zip(*rows, strict=True)]
    arrays += [jnp.array([3.0, 2.0]), jnp.array([5.0, 2.0]), jnp.array([1.0, 3.0])]
    _, metrics = evaluate("sigmoid", *arrays)
    expected = {
        "rewards/chosen": (0.5 * 0.5 + 3 * 0.5 * -1) / 4,
        "rewards/rejected": (0.5 * -0.2 + 3 * 0.5 * -1) / 4,
        "rewards/margins": 0.35 / 4,
        "rewards/accuracies": (1 + 3 * 0.5) / 4,
        "logps/chosen": (-3 - 3 * 2) / 4,
        "logps/rejected": (-4 - 3 * 2) / 4,
    }
    for name, value in expected.items():
        assert float(mean(metrics[name])) == pytest.approx(value, abs=1e-6), name
    assert set(metrics) == {"loss", *expected}
    _, metrics = evaluate("simpo", *arrays)
    assert float(mean(metrics["rewards/margins"])) == pytest.approx(0.5 * (-1 + 0.8) / 4)


def test_rewards_of_ipo_are_per_token_where_its_loss_is():
    """s = −0.6 of 6 tokens and −0.4 of 2: worse in sum and better per token."""
    pair = [jnp.array([x]) for x in (-3.6, -4.4, -3.0, -4.0, 6.0, 2.0, 1.0)]
    for reduction, rewards, right in (("sum", (-0.3, -0.2), 0), ("mean", (-0.05, -0.1), 1)):
        _, metrics = evaluate("ipo", *pair, ipo_reduction=reduction)
        found = [mean(metrics[f"rewards/{name}"]) for name in ("chosen", "rejected")]
        np.testing.assert_allclose(found, rewards, rtol=1e-5)
        assert mean(metrics["rewards/accuracies"]) == right
        # What the stage evaluates held-out pairs by.
        assert LOSSES["ipo"](ipo_reduction=reduction).per_token == (reduction == "mean")


@pytest.fixture(scope="module")
def reference_results():
    return jitted_everything(*batch())


def test_every_name_has_a_gradient_of_its_own(reference_results):
    vectors = {name: np.concatenate(result[1]) for name, result in reference_results.items()}
    for name, vector in vectors.items():
        assert np.isfinite(vector).all() and np.abs(vector).max() > 1e-3, name
    for a, b in combinations(LOSSES, 2):
        assert np.abs(vectors[a] - vectors[b]).max() > 1e-3, (a, b)


def test_every_option_changes_the_loss():
    changed = {
        "label_smoothing": 0.2,
        "ipo_reduction": "mean",
        "kl": 0.7,
        "desirable_weight": 0.5,
        "undesirable_weight": 0.5,
        "gamma": 0.9,
        "sft_weight": 0.3,
        "beta": 0.8,
        "temperature": 0.7,
        "divergence": "js",
    }
    arrays = batch()

    @jax.jit
    def values():
        pairs = [(n, o) for n in LOSSES for o in options_of(n) if o != "alpha"]
        return {
            (n, o): (evaluate(n, *arrays)[0][0], evaluate(n, *arrays, **{o: changed[o]})[0][0])
            for n, o in pairs
        }

    for key, (default, other) in values().items():
        assert abs(default - other) > 1e-3, key


@pytest.mark.parametrize(
    "transformation", ["vmap", pytest.param("pmap", marks=pytest.mark.slow), "shard_map"]
)
def test_same_under_every_transformation(reference_results, transformation):
    """Pairs split eight ways; for the batch-wise losses each part is compared with itself alone."""
    arrays = batch()
    parts = [x.reshape(8, 2) for x in arrays]
    if transformation == "vmap":
        split = jax.jit(jax.vmap(everything))(*parts)
    elif transformation == "pmap":
        split = jax.pmap(everything)(*parts)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def shard(*arrays):
            results = everything(*arrays)
            return {name: (jax.lax.psum(r[0], "data"), r[1]) for name, r in results.items()}

        specs = {name: (P(), P("data")) for name in LOSSES}
        split = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("data"), out_specs=specs))(
            *arrays
        )
    for name in LOSSES:
        reduction, gradients = split[name]
        if transformation != "shard_map":
            reduction = jax.tree.map(lambda x: x.sum(0), reduction)
            gradients = jax.tree.map(lambda x: x.reshape(-1), gradients)
        expected, expected_gradients = reference_results[name]
        if name in BATCHWISE:
            one = jax.jit(lambda *a, name=name: evaluate(name, *a)[0][0])
            expected = sum(float(one(*(x[i] for x in parts))) for i in range(8))
            np.testing.assert_allclose(reduction[0], expected, rtol=1e-5, err_msg=name)
            continue
        np.testing.assert_allclose(reduction, expected, rtol=1e-5, err_msg=name)
        for a, b in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_of_weight_zero_reach_neither_loss_nor_gradient():
    arrays = batch()
    arrays[6] = arrays[6].at[:3].set(0)
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    spoiled = [x.at[:3].set(bad) for x in arrays[:4]]
    spoiled += [x.at[:3].set(jnp.array([0.0, jnp.nan, -1])) for x in arrays[4:6]]
    results = jitted_everything(*spoiled, arrays[6])
    clean_results = jitted_everything(*arrays)
    for name, (reduction, gradients) in results.items():
        expected, expected_gradients = clean_results[name]
        np.testing.assert_array_equal(reduction, expected, err_msg=name)
        np.testing.assert_array_equal(gradients, expected_gradients, err_msg=name)
        np.testing.assert_array_equal(np.stack(gradients)[:, :3], 0, err_msg=name)
    # And they are as good as absent.
    kept = [x[3:] for x in arrays]
    for name in ("sigmoid", "orpo", *BATCHWISE):
        np.testing.assert_allclose(results[name][0], evaluate(name, *kept)[0], rtol=1e-5)


def test_empty_and_very_unlikely_responses_stay_finite():
    """Lengths 0, a response of probability 1, and log-ratios of ±200 nats."""
    columns = [
        [0.0, -3.0, 0.0, -1e-9, -300.0, -100.0],
        [-3.0, 0.0, 0.0, -2.0, -100.0, -300.0],
        [0.0, -3.0, 0.0, -0.1, -100.0, -300.0],
        [-3.0, 0, 0, -2, -300, -100],
        [0, 2, 0, 3, 9, 9],
        [2, 0, 0, 3, 9, 9],
        [1.0] * 6,
    ]
    arrays = [jnp.resize(jnp.array(x, jnp.float32), SIZE) for x in columns]
    for name, leaves in jitted_everything(*arrays).items():
        for leaf in jax.tree.leaves(leaves):
            assert np.isfinite(leaf).all(), name


# What a loss is where chosen and rejected are one response, lp = lp_ref + 0.4, β = 0.5; and whether
# its gradient cancels there. It does for losses of Δ alone, and by symmetry for kto and apo_zero.
# It does not where a side is pulled by itself: cpo, rpo and orpo (SFT), nca, bco, sppo (anchors at
# fixed log-ratios), apo_down (pushes chosen down).
S = 0.2
IDENTICAL = {
    "sigmoid": (math.log(2), True),
    "cdpo": (math.log(2), True),
    "robust": (math.log(2), True),
    "sigmoid_norm": (math.log(2), True),
    "aot": (math.log(2), True),
    "aot_unpaired": (math.log(2), True),
    "hinge": (1.0, True),
    "ipo": (1.0, True),
    "simpo": (nll(-0.5), True),
    "exo_pair": (-math.log(2) - (math.log(0.999) + math.log(0.001)) / 2, True),
    "discopop": (math.log(2) / 2 + 0.5, True),
    "kto": (1.0, True),
    "apo_zero": (1.0, True),
    "orpo": (1.0 + 0.5 * math.log(2), False),
    "cpo": (math.log(2) + 1.0, False),
    "rpo": (math.log(2) + 1.0, False),
    "nca_pair": (nll(S) + nll(-S), False),
    "bco_pair": (nll(S) + nll(-S), False),
    "sppo_hard": ((0.4 - 1) ** 2 + (0.4 + 1) ** 2, False),
    "apo_down": (sig(S) + 0.5, False),
}


def test_a_response_against_itself():
    same = [jnp.full(SIZE, x) for x in (-3.0, -3.0, -3.4, -3.4, 3, 3, 1 / SIZE)]
    same = [x.astype(jnp.float32) for x in same]
    assert set(IDENTICAL) == set(LOSSES)
    for name, ((total, _), (to_chosen, to_rejected)) in jitted_everything(*same).items():
        value, cancels = IDENTICAL[name]
        assert float(total) == pytest.approx(value, abs=1e-5), name
        assert (abs(float((to_chosen + to_rejected).sum())) < 1e-6) == cancels, name


def test_swapping_a_pair_negates_the_margin():
    """For losses of Δ alone; the others treat the two sides differently."""
    chosen, rejected, ref_chosen, ref_rejected, n_c, n_r, weights = batch()
    swapped = rejected, chosen, ref_rejected, ref_chosen, n_r, n_c, weights
    negated = -chosen, -rejected, -ref_chosen, -ref_rejected, n_c, n_r, weights
    of_swapped, of_negated = jitted_everything(*swapped), jitted_everything(*negated)
    symmetric = "sigmoid, cdpo, robust, hinge, ipo, exo_pair, discopop, sigmoid_norm, simpo"
    for name in symmetric.split(", "):
        got, expected = of_swapped[name][0][0], of_negated[name][0][0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    assert not np.isclose(of_swapped["rpo"][0][0], of_negated["rpo"][0][0], rtol=1e-3)


def test_divergences_meet_at_their_limits():
    arrays = batch()

    def loss(divergence, alpha=None):
        return evaluate("sigmoid", *arrays, divergence=divergence, alpha=alpha)[0][0]

    np.testing.assert_allclose(loss("alpha", 1e-3), loss("reverse_kl"), rtol=3e-3)
    np.testing.assert_allclose(loss("alpha", 1 - 1e-5), loss("forward_kl"), rtol=1e-4)


def test_kto_baseline_by_hand():
    logprobs, refs = jnp.array([-2.0, -5.0, jnp.nan]), jnp.array([-3.0, -4.5, 0.0])
    weights = jnp.array([2.0, 1.0, 0.0])
    assert float(kto_baseline(logprobs, refs, weights)) == pytest.approx((2 * 1 - 0.5) / 3)
    assert float(kto_baseline(refs, logprobs, weights)) == 0
    gradient = jax.grad(lambda x: kto_baseline(x, refs, weights))(logprobs)
    np.testing.assert_array_equal(gradient, 0)


def test_no_gradient_flows_to_the_kto_baseline_and_it_may_be_per_pair():
    arrays = batch(4)
    z = jnp.array([0.1, 0.2, 0.3, 0.4])
    gradient = jax.grad(lambda z: evaluate("kto", *arrays, kl=z)[0][0])(z)
    np.testing.assert_array_equal(gradient, 0)
    singles = [evaluate("kto", *(x[i : i + 1] for x in arrays), kl=z[i])[0][0] for i in range(4)]
    np.testing.assert_allclose(evaluate("kto", *arrays, kl=z)[0][0], sum(singles), rtol=1e-5)


def test_mistakes_are_refused_by_name():
    arrays = batch(2)
    with pytest.raises(ValueError, match="alpha is only for divergence 'alpha'"):
        evaluate("sigmoid", *arrays, divergence="js", alpha=0.3)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1.0"):
        evaluate("sigmoid", *arrays, divergence="alpha", alpha=1.0)
    with pytest.raises(ValueError, match="divergence must be one of"):
        evaluate("sigmoid", *arrays, divergence="kl")
    with pytest.raises(ValueError, match="ipo_reduction must be one of"):
        evaluate("ipo", *arrays, ipo_reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        evaluate("robust", *arrays, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \(0, 0.5\), got 0"):
        evaluate("exo_pair", *arrays, label_smoothing=0)
    with pytest.raises(ValueError, match="kto needs the option kl"):
        evaluate("kto", *arrays, kl=None)
    pairs = Pairs(*arrays)
    with pytest.raises(ValueError, match="'sigmoid' needs both reference log-probs"):
        preference_loss(Sigmoid(), pairs._replace(ref_rejected=None))
    with pytest.raises(ValueError, match="'simpo' uses no reference log-probs"):
        preference_loss(Simpo(), pairs)
    with pytest.raises(ValueError, match="same shape"):
        preference_loss(Sigmoid(), pairs._replace(rejected=pairs.rejected[:1]))


def test_beta_is_a_tenth_by_default_and_float64_stays():
    with jax.enable_x64(True):
        one = [jnp.array([x]) for x in (-3.0, -4.0, -3.5, -3.8)]
        ones = jnp.ones(1)
        (total, _), _ = preference_loss(Sigmoid(), Pairs(*one, ones, ones, ones))
        assert total.dtype == jnp.float64
        assert float(total) == pytest.approx(nll(0.07), abs=1e-14)


def test_half_precision_inputs_are_computed_in_float32():
    arrays = [x.astype(jnp.bfloat16) for x in batch(4)]
    (total, weight), metrics = evaluate("sigmoid", *arrays)
    assert {x.dtype for x in jax.tree.leaves((total, weight, metrics))} == {jnp.dtype("float32")}
    exact = evaluate("sigmoid", *(x.astype(jnp.float32) for x in arrays))
    np.testing.assert_allclose(total, exact[0][0], rtol=1e-6)


def test_unpaired_kto_by_hand():
    logprobs, refs = jnp.array([-1.0, -2.0, -9.0]), jnp.array([-1.5, -1.0, jnp.nan])
    labels, weights = jnp.array([1.0, 0.0, 1.0]), jnp.array([1.0, 2.0, 0.0])
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    (total, weight), metrics = unpaired_kto(
        Kto(**options), logprobs, refs, labels, weights=weights, kl=jnp.float32(0.2)
    )
    # s = 0.5, labelled good; s = −1, twice, labelled bad.
    good, bad = 2 * (1 - sig(0.5 * (0.5 - 0.2))), 3 * (1 - sig(0.5 * (0.2 + 1)))
    np.testing.assert_allclose([total, weight], [good + 2 * bad, 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], (0.25, 1))
    np.testing.assert_allclose(metrics["logps/rejected"], (-4, 2))


def test_unpaired_kto_of_both_sides_is_that_of_the_pairs():
    chosen, rejected, ref_chosen, ref_rejected, *lengths, weights = batch()

    def unpaired(sides):
        labels = jnp.repeat(jnp.array([1.0, 0.0]), SIZE)
        refs = jnp.concatenate([ref_chosen, ref_rejected])
        twice = jnp.concatenate([weights, weights])
        both = jnp.concatenate(sides)
        return unpaired_kto(Kto(beta=0.5), both, refs, labels, weights=twice, kl=0.3)[0][0]

    def paired(sides):
        arrays = (*sides, ref_chosen, ref_rejected, *lengths, weights)
        return evaluate("kto", *arrays, kl=0.3)[0][0]

    for one, other in zip(
        *(jax.tree.leaves(jax.value_and_grad(f)((chosen, rejected))) for f in (unpaired, paired)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)
