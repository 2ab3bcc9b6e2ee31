"""Rows and parameters split over a mesh: the numbers of one device, and what devices exchange."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import ModelConfig, init, lora, scoring
from rlhf_jax.models.fused_attention import random_rows
from rlhf_jax.models.sharding import split_over
from rlhf_jax.plan.compiled_text import count
from rlhf_jax.training.mesh import make_mesh, placed, shard_batch

ROWS, LENGTH, TARGETS = 8, 64, 32
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"fsdp": 8}, {"tensor": 8})
SHAPES = {
    "dots": {"remat": "dots", "short_convolution": 2},
    # On eight devices the last has unused words, and of more than there are its share.
    "untied": {"tied_embeddings": False, "vocab_size": 100, "unused": ((96, 98),)},
    "experts": {"experts": 2, "remat": "full", "position": "learned"},
}


def model(**changes) -> ModelConfig:
    fields = {
        "vocab_size": 96, "layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "mlp_width": 64, "max_length": LENGTH, "unroll": 1,
    }  # fmt: skip
    return ModelConfig(**fields | changes).validate()


@functools.cache
def batch(rows: int = ROWS) -> dict[str, jax.Array]:
    random = np.random.default_rng(1)
    ids = random_rows(random, rows, LENGTH, branches=True)
    whole = {
        "tokens": random.integers(0, 96, (rows, LENGTH)),
        "sources": np.tile(np.arange(TARGETS), (rows, 1)),
        "targets": random.integers(0, 96, (rows, TARGETS)),
    }
    weights = jnp.asarray(random.integers(0, 2, (rows, TARGETS)), jnp.float32)
    return ids | {k: jnp.asarray(x, jnp.int32) for k, x in whole.items()} | {"weights": weights}


def loss(config, params, batch):
    (total, weight), metrics = scoring.target_cross_entropy(config, params, batch)
    statistics = scoring.target_statistics(config, params, batch)
    squares = (statistics.logprobs**2 * batch["weights"]).sum()
    return (total + squares) / weight + statistics.entropy.mean(), metrics


def compiled(config, axes, params):
    """(the compiled loss and gradient on a mesh, the parameters there, the batch there)."""
    mesh = make_mesh(axes)
    function = jax.value_and_grad(functools.partial(loss, config), has_aux=True)
    arguments = placed(mesh, params), shard_batch(mesh, batch())
    return jax.jit(split_over(mesh, function)).lower(*arguments).compile(), *arguments


def quick(name, *others):
    """Parameters of a test, of which only one is quick."""
    return [name, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize("axes", quick(*MESHES), ids=str)
@pytest.mark.parametrize("shape", quick("dots", "untied", "experts"))
def test_every_mesh_computes_the_loss_and_gradient_of_one_device(shape, axes):
    config = model(**SHAPES[shape])
    params = init(config, jax.random.key(0))
    function = jax.value_and_grad(functools.partial(loss, config), has_aux=True)
    expected = jax.jit(function)(params, batch())
    run, *arguments = compiled(config, axes, params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        run(*arguments),
        expected,
    )


@pytest.mark.parametrize("base", quick("int8", "float32", "nf4"))
@pytest.mark.parametrize("kind", quick("dora", "lora"))
def test_an_adapters_gradient_is_that_of_one_device(base, kind):
    config, keys = model(remat="dots"), jax.random.split(jax.random.key(0), 3)
    params = lora.quantize(init(config, keys[0]), base)
    params = lora.attach(params, lora.AdapterConfig(rank=2, kind=kind, base=base), keys[1])
    trained, frozen = lora.split(params)
    trained = jax.tree.map(lambda x: x + 0.03 * jax.random.normal(keys[2], x.shape), trained)

    def of_trained(trained, frozen, batch):
        return loss(config, lora.combine(trained, frozen), batch)[0]

    expected = jax.jit(jax.value_and_grad(of_trained))(trained, frozen, batch())
    mesh = make_mesh({"data": 2, "fsdp": 4})
    run = jax.jit(split_over(mesh, jax.value_and_grad(of_trained)))
    found = run(placed(mesh, trained), placed(mesh, frozen), shard_batch(mesh, batch()))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected
    )


def test_rows_and_words_that_the_devices_do_not_divide_are_padded_and_cut():
    config = model(vocab_size=97)
    params, mesh = init(config, jax.random.key(0)), make_mesh({"fsdp": 8})
    bias = jax.random.normal(jax.random.key(1), (config.vocab_size,))
    score = functools.partial(scoring.target_statistics, config, bias=bias)
    expected = jax.jit(score)(params, batch(3))
    run = jax.jit(split_over(mesh, score))
    for x, y in zip(run(placed(mesh, params), batch(3)), expected, strict=True):
        assert x.shape == (3, TARGETS)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", quick("full", "none", "dots"))
def test_weights_are_gathered_and_gradients_scattered_once_per_use(remat):
    config = model(remat=remat, tied_embeddings=False)
    params, mesh = init(config, jax.random.key(0)), make_mesh({"fsdp": 8})

    def total(params, batch):
        return scoring.target_cross_entropy(config, params, batch)[0][0]

    arguments = placed(mesh, params), shard_batch(mesh, batch())
    run = jax.jit(split_over(mesh, jax.grad(total))).lower(*arguments).compile()
    counted = count(run.as_text(), mesh.size).collectives
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3)
    table = params["lm_head"]["kernel"].size
    tokens, targets = 4 * ROWS * LENGTH, 4 * ROWS * TARGETS
    # In the forward pass and again in the backward pass, which keeps none of them. Each device has
    # all hidden states for its words, and five numbers for each: target, statistics, cotangents.
    gathered = 4 * 2 * layers + tokens + targets * (config.width + 5)
    assert counted["all-gather"][1] == gathered
    # Of every kernel and of hidden states' gradients each device keeps an eighth of the sum.
    scattered = (4 * layers + targets * config.width) / 8
    assert counted["reduce-scatter"] == (7 * config.layers + 1, scattered)
    # The embedding sends each device its own rows, the unembedding its own words, there and back.
    rows, sums = 4 * LENGTH * config.width, 6 * targets
    exchanged = 2 * rows + 2 * 4 * table / 8 + sums
    assert counted["all-to-all"][1] == pytest.approx(exchanged, rel=0.01)
    # What is whole on every device, the scales of norms, is summed whole; so is the cotangent.
    assert counted["all-reduce"][1] == 4 * (2 * config.layers + 1) * config.width + 4
