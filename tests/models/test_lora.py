"""Adapters and quantised kernels: by hand, by invariances, and against the merged weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import PRESETS, init, lora
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.models.transformer import apply, init_cache, logits
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step
from rlhf_jax.trees import named_leaves

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=31, width=32, heads=2, kv_heads=1, head_dim=16, mlp_width=48
)
TOKENS = jnp.arange(24).reshape(2, 12)


@jax.jit
def forward(params):
    return logits(CONFIG, params, apply(CONFIG, params, TOKENS).hidden)


def adapted(kind="lora", base="float32", **options):
    """Parameters under an adapter that has been moved off its start."""
    params = lora.quantize(init(CONFIG, jax.random.key(0)), base)
    adapter = AdapterConfig(rank=4, kind=kind, base=base, **options).validate()
    trained, frozen = lora.split(lora.attach(params, adapter, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained)))
    keys = jax.tree.unflatten(jax.tree.structure(trained), list(keys))
    moved = jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), trained, keys)
    return lora.combine(moved, frozen)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    params = init(CONFIG, jax.random.key(0))
    fresh = lora.attach(params, AdapterConfig(rank=4, kind=kind), jax.random.key(1))
    atol = 1e-5 if kind == "dora" else 0  # whose magnitudes are divided by the norms they are
    np.testing.assert_allclose(forward(fresh), forward(params), atol=atol)


MERGED = [(kind, base) for kind in lora.KINDS for base in lora.STORED]
QUICK_MERGED = (("dora", "nf4"), ("lora", "int8"), ("rslora", "bfloat16"), ("dora", "float32"))


@pytest.mark.parametrize(
    ("kind", "base"),
    [pytest.param(*m, marks=() if m in QUICK_MERGED else pytest.mark.slow) for m in MERGED],
)
def test_merged_weights_compute_the_same(kind, base):
    params = adapted(kind, base)
    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(init(CONFIG, jax.random.key(0)))
    np.testing.assert_allclose(forward(params), forward(merged), atol=1e-4)
    assert np.abs(forward(merged) - forward(lora.without_adapter(params))).max() > 0.1


@pytest.mark.parametrize(("kind", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2), ("dora", 8 / 4)])
def test_a_product_by_hand(kind, scale):
    assert AdapterConfig(rank=4, alpha=8, kind=kind).scale == scale
    kernel, x = jnp.array([[3.0, 0.0], [4.0, 2.0]]), jnp.array([[1.0, 2.0]])
    node = {"kernel": kernel, "lora": {
        "a": jnp.array([[1.0], [0.0]]), "b": jnp.array([[0.5, -1.0]]), "scale": jnp.array(2.0),
    }}  # fmt: skip
    # W + 2ab = [[4, -2], [4, 2]]
    np.testing.assert_allclose(lora.product(x, node, jnp.float32), [[12.0, 2.0]])
    node["lora"]["magnitude"] = jnp.array([5.0, 2.0])
    expected = [[12.0 * 5 / 32**0.5, 2.0 * 2 / 8**0.5]]
    np.testing.assert_allclose(lora.product(x, node, jnp.float32), expected, rtol=1e-6)


def test_int8_and_nf4_by_hand():
    kernel = jnp.array([[[1.27, 0.0], [-0.64, 0.0]]])
    node = lora.quantize({"layers": {"up": {"kernel": kernel}}}, "int8")["layers"]["up"]
    np.testing.assert_array_equal(node["int8"]["codes"], [[[127, 0], [-64, 0]]])
    np.testing.assert_allclose(lora.kernel_of(node), kernel, atol=1e-6)
    levels = 3.0 * jnp.array(lora.NF4).reshape(1, 16, 1)
    node = lora.quantize({"layers": {"up": {"kernel": levels}}}, "nf4")["layers"]["up"]
    np.testing.assert_array_equal(
        node["nf4"]["codes"][0, :, 0], [0x01 + 0x22 * i for i in range(8)]
    )
    np.testing.assert_allclose(lora.kernel_of(node), levels, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "worst", "bits"), [("bfloat16", 2**-8, 16), ("int8", 1 / 254, 8.5), ("nf4", 0.152, 6)]
)
def test_what_is_kept_is_close_and_small(base, worst, bits):
    """The error is at most half the widest step, of the largest number that shares a scale."""
    kernel = jax.random.normal(jax.random.key(0), (2, 128, 96))
    node = lora.quantize({"layers": {"up": {"kernel": kernel}}}, base)["layers"]["up"]
    error = np.abs(lora.kernel_of(node) - kernel)
    groups = np.abs(np.asarray(kernel)).reshape(2, -1, 64 if base == "nf4" else 128, 96).max(2)
    assert (error.reshape(2, groups.shape[1], -1, 96) <= worst * groups[:, :, None] + 1e-6).all()
    assert sum(x.nbytes for x in jax.tree.leaves(node)) * 8 <= bits * kernel.size
    assert lora.kernel_shape(node) == kernel.shape
    assert lora.param_count({"layers": {"up": node}}) == kernel.size


def test_targets_choose_by_name():
    params = init(CONFIG, jax.random.key(0))
    adapter = AdapterConfig(rank=2, targets="attention/(query|value)$")
    names = named_leaves(lora.own(lora.attach(params, adapter, jax.random.key(0))))
    assert {name.rpartition("/lora/")[0] for name in names} == {
        "layers/attention/query", "layers/attention/value",
    }  # fmt: skip
    with pytest.raises(UserError, match="'q_proj' is found in none of layers/attention/key, "):
        lora.attach(params, AdapterConfig(rank=2, targets="q_proj"), jax.random.key(0))
    with pytest.raises(UserError, match="rank = 64 is above that of layers/attention/key, 32 x 16"):
        lora.attach(params, AdapterConfig(rank=64), jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "vera"}, "kind = 'vera': choose one of lora, rslora, dora"),
        ({"base": "int4"}, "base = 'int4': choose one of"),
        ({"rank": -1}, "must be above 0"),
        ({"alpha": 0.0}, "must be above 0"),
        ({"rank": 0, "base": "nf4"}, "for frozen weights: set adapter.rank"),
        ({"targets": "("}, "is no regex"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said):
        AdapterConfig(**{"rank": 4} | options).validate()


@pytest.mark.parametrize(
    "base",
    [
        base if base == "int8" else pytest.param(base, marks=pytest.mark.slow)
        for base in lora.STORED
    ],
)
def test_a_step_trains_the_adapter_alone_as_full_gradients_say(base):
    """The gradient of A and B is that of the same loss by jax.grad of everything."""
    params = adapted(base=base)
    trained, frozen = lora.split(params)

    def loss(params, batch, rng):
        y = logits(CONFIG, params, apply(CONFIG, params, batch["tokens"]).hidden)
        return (jnp.sum(jnp.square(y)), jnp.float32(y.size)), {}

    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, frozen=frozen)
    state, metrics = step(init_state(trained, optimizer), {"tokens": TOKENS})

    def whole(params):
        (total, weight), _ = loss(params, {"tokens": TOKENS}, None)
        return total / weight

    if base == "float32":
        grads = lora.split(jax.grad(whole)(params))[0]
        jax.tree.map(
            lambda new, old, g: np.testing.assert_allclose(old - new, g, atol=1e-5),
            *(state.params, trained, grads),
        )
    assert set(named_leaves(state.params)) == set(named_leaves(trained))
    assert metrics["train/grad_norm"] > 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_decoding_under_an_adapter_is_the_forward_pass():
    params = adapted("dora", "nf4")

    @jax.jit
    def step(params, tokens, cache):
        output = apply(CONFIG, params, tokens, cache=cache)
        return logits(CONFIG, params, output.hidden), output.cache

    cache = init_cache(CONFIG, 2, 12)
    output = apply(CONFIG, params, TOKENS[:, :5], cache=cache, prompt_lengths=jnp.array([5, 5]))
    found, cache = [logits(CONFIG, params, output.hidden)], output.cache
    for i in range(5, 12):
        values, cache = step(params, TOKENS[:, i : i + 1], cache)
        found.append(values)
    np.testing.assert_allclose(np.concatenate(found, 1), forward(params), atol=1e-4)
