"""Chunked token statistics against the full softmax: values, gradients, memory and any split."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.losses.cross_entropy import (
    TokenStatistics,
    Words,
    cross_entropy,
    token_cross_entropy,
    token_statistics,
)
from rlhf_jax.losses.reductions import mean

ROWS, SLOTS, WIDTH, VOCAB = 3, 11, 6, 37


jitted_statistics = jax.jit(
    token_statistics, static_argnames=("temperature", "softcap", "chunk_tokens")
)


def two_passes(
    hidden, unembedding, targets, weights, *, label_smoothing=0.0, z_loss=0.0, **options
):
    """What `cross_entropy` does in one."""
    statistics = token_statistics(hidden, unembedding, targets, **options)
    return token_cross_entropy(statistics, weights, label_smoothing=label_smoothing, z_loss=z_loss)


both_ways = pytest.mark.parametrize("loss_of", [two_passes, cross_entropy])


def arrays(seed=0, rows=ROWS, slots=SLOTS, width=WIDTH, vocab=VOCAB):
    keys = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(keys[0], (rows, slots, width)),
        jax.random.normal(keys[1], (vocab, width)),
        jax.random.normal(keys[2], (vocab,)),
        jax.random.randint(keys[3], (rows, slots), 0, vocab),
    )


def naive(hidden, unembedding, targets, *, bias=None, temperature=1.0, softcap=None):
    """The definition, with all logits at once."""
    logits = hidden @ unembedding.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits / temperature
    logprobs = jax.nn.log_softmax(logits)
    return TokenStatistics(
        jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0],
        jax.nn.logsumexp(logits, -1),
        logits.mean(-1),
        -(jnp.exp(logprobs) * logprobs).sum(-1),
        (logits.argmax(-1) == targets).astype(jnp.float32),
    )


def all_shapes(jaxpr):
    """Shapes of every array of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield tuple(getattr(variable.aval, "shape", ()))
        for inner in jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


@pytest.mark.parametrize(
    ("options", "chunk_tokens"),
    [
        ({}, 512),
        ({}, 7),
        ({"temperature": 0.7, "softcap": 3.0, "bias": True}, 512),
        ({"temperature": 0.7, "softcap": 3.0, "bias": True}, 7),
        ({"temperature": 0.7, "softcap": 3.0, "bias": True}, 1),
    ],
)
def test_equals_the_full_softmax_with_its_gradients(options, chunk_tokens):
    hidden, unembedding, bias, targets = arrays()
    options = dict(options)
    bias = bias if options.pop("bias", False) else None
    cotangents = [jax.random.normal(jax.random.key(i), targets.shape) for i in range(4)]

    def objective(statistics, **extra):
        def loss(hidden, unembedding, bias):
            out = statistics(hidden, unembedding, targets, bias=bias, **options, **extra)
            return sum(jnp.vdot(c, x) for c, x in zip(cotangents, out[:4], strict=True)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(hidden, unembedding, bias)

    (_, expected), expected_gradients = objective(naive)
    (_, got), got_gradients = objective(token_statistics, chunk_tokens=chunk_tokens)
    for name, a, b in zip(TokenStatistics._fields, got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)
    for a, b in zip(
        jax.tree.leaves(got_gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_by_hand():
    # One token of width 1, logits (0, ln 2, ln 5): p = (1/8, 2/8, 5/8).
    unembedding = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    statistics = jitted_statistics(jnp.ones((3, 1)), unembedding, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(statistics.logprobs, np.log([1 / 8, 2 / 8, 5 / 8]), atol=1e-6)
    np.testing.assert_allclose(statistics.logsumexp, [math.log(8)] * 3, atol=1e-6)
    np.testing.assert_allclose(statistics.mean_logit, [math.log(10) / 3] * 3, atol=1e-6)
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    np.testing.assert_allclose(statistics.entropy, [entropy] * 3, atol=1e-6)
    np.testing.assert_array_equal(statistics.correct, [0, 0, 1])

    (total, weight), metrics = token_cross_entropy(
        statistics, jnp.array([1.0, 0.0, 2.0]), label_smoothing=0.1, z_loss=0.01
    )
    nll = math.log(8) + 2 * math.log(8 / 5)
    uniform = 3 * (math.log(8) - math.log(10) / 3)
    z = 3 * 0.01 * math.log(8) ** 2
    assert float(total) == pytest.approx(0.9 * nll + 0.1 * uniform + z, abs=1e-5)
    assert float(weight) == 3
    assert float(metrics["nll"][0]) == pytest.approx(nll, abs=1e-5)
    assert float(metrics["z_loss"][0]) == pytest.approx(z, abs=1e-6)
    assert float(mean(metrics["accuracy"])) == pytest.approx(2 / 3)
    assert float(mean(metrics["entropy"])) == pytest.approx(entropy, abs=1e-5)


def test_the_first_of_equal_logits_is_the_prediction():
    equal = jitted_statistics(jnp.ones((5, 1)), jnp.ones((5, 1)), jnp.arange(5))
    np.testing.assert_array_equal(equal.correct, [1, 0, 0, 0, 0])


def test_huge_logits_stay_exact():
    unembedding = jnp.array([[1e4], [1e4 - 8], [-1e4]])
    got = jitted_statistics(jnp.ones((1, 1)), unembedding, jnp.array([1]))
    np.testing.assert_allclose(got.logprobs, [-8 - math.log1p(math.exp(-8))], atol=1e-6)


def test_no_array_of_tokens_by_vocabulary_exists():
    tokens, width, vocab, chunk = 1024, 16, 2048, 64
    hidden, unembedding, _, targets = arrays(rows=8, slots=128, width=width, vocab=vocab)

    def loss(statistics, **chunks):
        def total(hidden, unembedding):
            out = statistics(hidden, unembedding, targets, **chunks)
            return out.logprobs.sum() + out.entropy.sum()

        return jax.jit(jax.grad(total, (0, 1)))

    def largest(function):
        return max(map(math.prod, all_shapes(jax.make_jaxpr(function)(hidden, unembedding).jaxpr)))

    def temporary_bytes(function):
        compiled = function.lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = tokens * vocab
    assert largest(loss(naive)) >= full
    assert largest(loss(token_statistics, chunk_tokens=chunk)) == chunk * vocab
    assert temporary_bytes(loss(naive)) >= 4 * full
    assert temporary_bytes(loss(token_statistics, chunk_tokens=chunk)) < 4 * full / 2


def test_one_chunk_costs_three_matrix_products():
    hidden, unembedding, _, targets = arrays()

    def products(**chunks):
        def loss(hidden, unembedding):
            return token_statistics(hidden, unembedding, targets, **chunks).logprobs.sum()

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembedding).compile()
        # The products of a loop's body are counted once.
        return compiled.as_text().count(" dot(")

    assert products() == 3
    assert products(chunk_tokens=7) == 4


def test_bfloat16_inputs_are_computed_in_float32():
    hidden, unembedding, _, targets = arrays()
    half = hidden.astype(jnp.bfloat16), unembedding.astype(jnp.bfloat16)
    got = jitted_statistics(*half, targets)
    expected = naive(*(x.astype(jnp.float32) for x in half), targets)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)

    @jax.jit
    def gradients(*half):
        return jax.grad(lambda h, w: token_statistics(h, w, targets).logprobs.sum(), (0, 1))(*half)

    gradients = gradients(*half)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}


@both_ways
@pytest.mark.parametrize("chunk_tokens", [512, 7])
def test_a_target_of_weight_zero_reaches_neither_loss_nor_gradient(loss_of, chunk_tokens):
    hidden, unembedding, _, targets = arrays()
    weights = jnp.ones(targets.shape).at[1, 3].set(0).at[2].set(0)

    def loss(hidden, unembedding, targets):
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "chunk_tokens": chunk_tokens}
        return loss_of(hidden, unembedding, targets, weights, **options)[0][0]

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (to_hidden, to_unembedding) = step(hidden, unembedding, targets)
    spoiled = hidden.at[1, 3].set(jnp.nan).at[2].set(jnp.inf)
    bad_targets = targets.at[1, 3].set(-100)
    bad_value, (bad_to_hidden, bad_to_unembedding) = step(spoiled, unembedding, bad_targets)
    assert value == bad_value
    np.testing.assert_array_equal(to_hidden, bad_to_hidden)
    np.testing.assert_array_equal(to_hidden[2], 0)
    np.testing.assert_array_equal(to_unembedding, bad_to_unembedding)


def test_a_target_outside_the_vocabulary_is_loud():
    hidden, unembedding, _, targets = arrays()
    statistics = jitted_statistics(hidden, unembedding, targets.at[0, 0].set(VOCAB))
    assert jnp.isnan(statistics.logprobs[0, 0])
    assert not jnp.isnan(statistics.logprobs[1:]).any()


def test_a_bias_can_ban_words():
    hidden, unembedding, _, _ = arrays()
    allowed = jnp.array([0, 3, 4, 20])
    bias = jnp.full(VOCAB, -1e9).at[allowed].set(0)
    index = jax.random.randint(jax.random.key(1), hidden.shape[:2], 0, len(allowed))

    @jax.jit
    @jax.value_and_grad
    def banned(hidden):
        out = token_statistics(hidden, unembedding, allowed[index], bias=bias)
        return (out.logprobs + out.entropy).sum()

    @jax.jit
    @jax.value_and_grad
    def small(hidden):
        out = naive(hidden, unembedding[allowed], index)
        return (out.logprobs + out.entropy).sum()

    for got, expected in zip(banned(hidden), small(hidden), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_at_all():
    statistics = jitted_statistics(jnp.ones((2, 0, 4)), jnp.ones((5, 4)), jnp.zeros((2, 0), int))
    (total, weight), _ = token_cross_entropy(statistics, jnp.zeros((2, 0)))
    assert float(total) == float(weight) == 0


def test_mistakes_are_refused():
    hidden, unembedding, bias, targets = arrays()
    with pytest.raises(ValueError, match="hidden must have"):
        token_statistics(hidden[..., :-1], unembedding, targets)
    with pytest.raises(ValueError, match=r"bias must have shape \(37,\)"):
        token_statistics(hidden, unembedding, targets, bias=bias[:-1])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_statistics(hidden, unembedding, targets, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens must be > 0"):
        token_statistics(hidden, unembedding, targets, chunk_tokens=0)


@both_ways
@pytest.mark.parametrize("chunk_tokens", [pytest.param(512, marks=pytest.mark.slow), 2])
def test_same_under_every_transformation(loss_of, chunk_tokens):
    hidden, unembedding, _, targets = arrays(rows=8)
    weights = jax.random.uniform(jax.random.key(9), targets.shape)

    def loss(unembedding, hidden, targets, weights):
        options = {"z_loss": 1e-2, "chunk_tokens": chunk_tokens}
        return loss_of(hidden, unembedding, targets, weights, **options)[0]

    def expected(unembedding):
        return token_cross_entropy(naive(hidden, unembedding, targets), weights, z_loss=1e-2)[0]

    # Under vmap, pmap and shard_map each lane or device has one row; the sums add up to the whole.
    step = jax.value_and_grad(loss, has_aux=True)
    rows = [x[:, None] for x in (hidden, targets, weights)]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P("data")),
        out_specs=P(),
    )
    results = {
        "jit": jax.jit(step)(unembedding, hidden, targets, weights),
        "vmap": jax.jit(jax.vmap(step, (None, 0, 0, 0)))(unembedding, *rows),
        "pmap": jax.pmap(step, in_axes=(None, 0, 0, 0))(unembedding, *rows),
        "shard_map": jax.jit(jax.value_and_grad(sharded, has_aux=True))(
            unembedding, hidden, targets, weights
        ),
    }
    (total, weight), gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(unembedding)
    for name, result in results.items():
        if name in ("vmap", "pmap"):
            result = jax.tree.map(lambda x: x.sum(0), result)
        np.testing.assert_allclose(result[0], (total, weight), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(result[1], gradient, atol=1e-5, err_msg=name)


@both_ways
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("vd", {}, marks=pytest.mark.slow),
        ("dv", {"chunk_tokens": 2, "softcap": 3.0}),
    ],
    ids=str,
)
def test_words_that_are_split_over_devices(loss_of, layout, options):
    hidden, unembedding, _, targets = arrays(rows=8)
    # All words of the last device are unused, and one of another; targets are of any device.
    unembedding = jnp.concatenate([unembedding, unembedding])[: 8 * (len(unembedding) // 4)]
    unused = ((2, 3), (len(unembedding) * 7 // 8, len(unembedding)))
    targets = targets.at[0, 0].set(-1).at[1, 0].set(len(unembedding))
    weights = jax.random.uniform(jax.random.key(9), targets.shape) * (targets > 2)
    weights *= targets < len(unembedding) * 7 // 8
    words = unembedding if layout == "vd" else unembedding.T

    def loss(axis, hidden, words, targets, weights):
        read = Words(layout, unused, axis)
        return loss_of(hidden, words, targets, weights, z_loss=0.1, words=read, **options)

    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = P("fsdp")
    split = jax.shard_map(
        lambda *a: jax.lax.psum(loss("fsdp", *a), "fsdp"),
        mesh=mesh,
        in_specs=(rows, rows if layout == "vd" else P(None, "fsdp"), rows, rows),
        out_specs=P(),
        check_vma=False,
    )

    def step(function):
        def total(*arguments):
            (total, weight), metrics = function(*arguments)
            return total, (weight, metrics)

        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        return run(hidden, words, targets, weights)

    found, expected = step(split), step(partial(loss, None))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 3.0}, {"chunk_tokens": 7}],
    ids=str,
)
def test_one_pass_equals_two(options, layout):
    hidden, unembedding, _, targets = arrays()
    weights = jax.random.uniform(jax.random.key(9), targets.shape)
    if layout == "dv":
        unembedding = unembedding.T

    def step(loss_of):
        def scaled(hidden, unembedding):
            (total, weight), metrics = loss_of(
                hidden, unembedding, targets, weights, words=Words(layout), **options
            )
            return 3 * total, (total, weight, metrics)

        return jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, unembedding)

    for a, b in zip(*map(jax.tree.leaves, map(step, (cross_entropy, two_passes))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_one_pass_computes_no_logits_twice():
    hidden, unembedding, _, targets = arrays()

    def loss(hidden, unembedding):
        weights = jnp.ones(targets.shape)
        return cross_entropy(hidden, unembedding, targets, weights, chunk_tokens=7)[0][0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembedding).compile()
    assert compiled.as_text().count(" dot(") == 3


SPLITS = [(m, d) for m in (1, 2, 4, 8) for d in (1, 2, 4, 8)]
QUICK_SPLITS = [(2, 4), (8, 8)]


@both_ways
@pytest.mark.parametrize(
    ("microbatches", "devices"),
    [pytest.param(*s, marks=() if s in QUICK_SPLITS else pytest.mark.slow) for s in SPLITS],
)
def test_any_split_gives_the_same_gradient(loss_of, microbatches, devices):
    hidden, unembedding, _, targets = arrays(rows=64, slots=9)
    # Row lengths 0 to 9, most of them short; the first eighth, a whole microbatch, is empty.
    lengths = np.random.default_rng(0).choice([0, 1, 2, 9], 64)
    lengths[:8] = 0
    weights = (np.arange(9) < lengths[:, None]).astype(np.float32)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def total(unembedding, hidden, targets, weights):
        reduction, _ = loss_of(hidden, unembedding, targets, weights, chunk_tokens=16)
        return jax.lax.psum(reduction, "data")

    specs = (P(), P("data"), P("data"), P("data"))
    over_devices = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    step = jax.jit(jax.value_and_grad(over_devices, has_aux=True))

    def full_batch(unembedding):
        return mean(token_cross_entropy(naive(hidden, unembedding, targets), weights)[0])

    value, gradient = jax.jit(jax.value_and_grad(full_batch))(unembedding)
    parts = [x.reshape(microbatches, -1, *x.shape[1:]) for x in (hidden, targets, weights)]
    assert microbatches < 8 or not parts[2][0].any()
    loss, gradients = (jnp.zeros(()), jnp.zeros(())), jnp.zeros_like(unembedding)
    for part in zip(*parts, strict=True):
        reduction, part_gradient = step(unembedding, *part)
        loss, gradients = jax.tree.map(jnp.add, loss, reduction), gradients + part_gradient
    np.testing.assert_allclose(mean(loss), value, rtol=1e-6)
    np.testing.assert_allclose(gradients / loss[1], gradient, atol=1e-6)


@both_ways
def test_a_sharded_batch_is_never_gathered(loss_of):
    hidden, unembedding, _, targets = arrays(rows=16, slots=32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    hidden, targets = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (hidden, targets))
    unembedding = jax.device_put(unembedding, NamedSharding(mesh, P()))

    def loss(hidden, unembedding):
        weights = jnp.ones(targets.shape)
        return loss_of(hidden, unembedding, targets, weights, chunk_tokens=128)[0][0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding).compile().as_text()
    assert "all-reduce" in text
    assert (
        "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    )


UNUSED = ((0, 2), (9, 10), (30, 37))
WORDS = np.array([v for v in range(VOCAB) if not any(a <= v < b for a, b in UNUSED)])


@both_ways
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("vd", {}, marks=pytest.mark.slow),
        ("vd", {"softcap": 2.0}),
        pytest.param("vd", {"chunk_tokens": 8}, marks=pytest.mark.slow),
        ("dv", {"chunk_tokens": 8}),
    ],
)
def test_unused_ids_count_nowhere(loss_of, layout, options):
    """The loss and its gradient are those of a vocabulary without them."""
    hidden, words, _, _ = arrays()
    places = jax.random.randint(jax.random.key(5), (ROWS, SLOTS), 0, len(WORDS))
    weights = jnp.ones((ROWS, SLOTS)).at[0].set(0)
    terms = {"label_smoothing": 0.1, "z_loss": 0.01}

    def loss(hidden, words, targets, unused):
        words = words.T if layout == "dv" else words
        read = Words(layout, unused)
        result = loss_of(hidden, words, targets, weights, **terms, **options, words=read)
        return result[0][0], result[1]

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=3)
    found = run(hidden, words, jnp.asarray(WORDS)[places], UNUSED)
    wanted = run(hidden, words[WORDS], places, ())
    to_words = found[1][1]
    assert not np.delete(np.asarray(to_words), WORDS, axis=0).any()
    found = found[0], (found[1][0], to_words[WORDS])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_statistics_are_of_the_used_ids(chunk_tokens):
    hidden, words, bias, _ = arrays()
    places = jax.random.randint(jax.random.key(5), (ROWS, SLOTS), 0, len(WORDS))
    options = {"temperature": 0.7, "softcap": 3.0}
    found = token_statistics(
        hidden, words, jnp.asarray(WORDS)[places], bias=bias, words=Words(unused=UNUSED),
        chunk_tokens=chunk_tokens, **options,
    )  # fmt: skip
    wanted = naive(hidden, words[WORDS], places, bias=bias[WORDS], **options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)
