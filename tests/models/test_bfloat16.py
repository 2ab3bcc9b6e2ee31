"""bfloat16 compute: what is rounded, what is summed in float32, and how far that leads."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.cross_entropy import token_cross_entropy
from rlhf_jax.models import apply, decoding_params, init_cache, logits, lora
from rlhf_jax.models.scoring import target_statistics
from rlhf_jax.training.mesh import make_mesh, shardings
from tests.models.small import KINDS, SMALL, noisy, random_tokens

VOCAB = SMALL.vocab_size


def rounded(config):
    return dataclasses.replace(config, compute_dtype="bfloat16")


def batch_of(rows, length):
    tokens = np.asarray(random_tokens(rows, length + 1))
    spread = np.tile(np.arange(length), (rows, 1))
    return {
        "tokens": tokens[:, :-1],
        "positions": spread,
        "segment_ids": np.ones_like(spread),
        "sources": spread,
        "targets": tokens[:, 1:],
        "weights": np.ones(spread.shape, np.float32),
    }


def loss(config, params, batch):
    statistics = target_statistics(config, params, batch)
    (total, weight), _ = token_cross_entropy(statistics, batch["weights"])
    return total / weight


def products(jaxpr):
    """(dtypes of the factors, their shapes, dtype of the sum) of every product in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            factors = [x.aval for x in equation.invars]
            yield (
                {str(x.dtype) for x in factors},
                [x.shape for x in factors],
                str(equation.outvars[0].aval.dtype),
            )
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize(
    "kind",
    [
        "grouped-window",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "multiquery-capped")),
    ],
)
def test_loss_and_gradient_are_near_those_of_float32(kind):
    config, params, batch = KINDS[kind], noisy(KINDS[kind]), batch_of(4, 32)
    exact, wanted = jax.jit(jax.value_and_grad(partial(loss, config)))(params, batch)
    found, gradient = jax.jit(jax.value_and_grad(partial(loss, rounded(config))))(params, batch)
    assert found.dtype == jnp.float32
    assert abs(found - exact) < 0.01 * exact  # 8 bits of mantissa
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == jnp.float32
        assert jnp.linalg.norm(x - y) < 0.1 * jnp.linalg.norm(y) + 1e-3


def test_products_with_the_vocabulary_take_bfloat16_and_sum_in_float32():
    for tied in (True, False):
        config = rounded(dataclasses.replace(SMALL, tied_embeddings=tied))
        gradient = jax.grad(partial(loss, config))
        found = list(products(jax.make_jaxpr(gradient)(noisy(config), batch_of(2, 8)).jaxpr))
        large = [p for p in found if any(VOCAB in shape for shape in p[1])]
        assert len(large) == 3  # logits, and their gradient to either factor
        assert all(p[0] == {"bfloat16"} and p[2] == "float32" for p in large)


def test_the_logits_of_sampling_are_those_of_training():
    config = rounded(SMALL)
    params, hidden = noisy(config), jnp.ones((2, config.width), jnp.bfloat16)
    (product,) = products(jax.make_jaxpr(partial(logits, config))(params, hidden).jaxpr)
    assert product[0] == {"bfloat16"}
    assert product[2] == "float32"


DECODED = ("grouped-window", "experts", "scaled")


@pytest.mark.parametrize(
    "kind",
    [
        *DECODED,
        *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in DECODED),
    ],
)
def test_decoding_from_rounded_copies_gives_the_same(kind):
    config = rounded(KINDS.get(kind) or dataclasses.replace(SMALL, embed_scale=3.0))
    params, tokens = noisy(config), random_tokens(2, 12)
    copies = decoding_params(config, params)
    lengths = jnp.array([11, 11])

    @jax.jit
    def two_steps(params):
        cache = init_cache(config, 2, 16)
        prompt = apply(config, params, tokens[:, :-1], cache=cache, prompt_lengths=lengths)
        last = apply(config, params, tokens[:, -1:], cache=prompt.cache).hidden
        return prompt.hidden, logits(config, params, last)

    for x, y in zip(two_steps(copies), two_steps(params), strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        # The same products; a scan and a loop are compiled apart, and may round apart.
        assert jnp.linalg.norm(x - y) < 0.02 * jnp.linalg.norm(y)
    # A short convolution makes values of other vectors than queries and keys.
    name, kinds = ("query_key", 1) if config.short_convolution else ("query_key_value", 2)
    joined = copies["layers"][0]["attention"][name]["kernel"]
    assert joined.dtype == jnp.bfloat16
    width = (config.heads + kinds * config.kv_heads) * config.head_dim
    assert joined.shape == (config.width, width)
    # What is scaled or added to before it is rounded must not be rounded twice.
    whole = jnp.bfloat16 if kind in ("llama", "experts") else jnp.float32
    assert copies["embed"]["embedding"].dtype == whole
    assert copies["final_norm"]["scale"].dtype == jnp.float32
    if kind == "experts":
        assert copies["layers"][0]["mlp"]["router"]["kernel"].dtype == jnp.float32


def test_kernels_are_joined_only_where_every_device_has_all_of_them():
    params = noisy(SMALL)
    adapted = lora.attach(params, lora.AdapterConfig(rank=2), jax.random.key(0))
    assert "query_key_value" not in decoding_params(SMALL, adapted)["layers"][0]["attention"]
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    spread = jax.device_put(params, shardings(mesh, params))
    layer = decoding_params(SMALL, spread)["layers"][0]
    assert "query" in layer["attention"] and "gate" in layer["mlp"]
    layer = decoding_params(SMALL, params)["layers"][0]
    assert "query" not in layer["attention"] and "gate" not in layer["mlp"]


def test_a_decoding_step_rounds_no_weight():
    config = rounded(SMALL)
    params = decoding_params(config, noisy(config))
    cache = init_cache(config, 1, 8)

    def step(params, cache):
        hidden = apply(config, params, jnp.zeros((1, 1), jnp.int32), cache=cache).hidden
        return logits(config, params, hidden)

    def conversions(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "convert_element_type":
                yield equation.invars[0].aval.size
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from conversions(inner)

    weights = config.width**2
    assert max(conversions(jax.make_jaxpr(step)(params, cache).jaxpr)) < weights
    assert max(conversions(jax.make_jaxpr(step)(noisy(config), cache).jaxpr)) >= weights
