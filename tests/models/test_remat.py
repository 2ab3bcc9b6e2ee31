"""What the backward pass recomputes it need not keep."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import apply, init
from tests.models.small import SMALL, random_tokens

CONFIG = dataclasses.replace(SMALL, layers=6, width=32, mlp_width=128, head_dim=8)
TOKENS = random_tokens(4, 64)


def compiled(**changes):
    config = dataclasses.replace(CONFIG, **changes)

    def loss(params):
        return jnp.square(apply(config, params, TOKENS).hidden.astype(jnp.float32)).sum()

    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.jit(jax.grad(loss)).lower(params).compile()


@pytest.mark.parametrize("attention", ["reference", pytest.param("xla", marks=pytest.mark.slow)])
def test_each_policy_keeps_less_than_the_one_before(attention):
    none, dots, full = (
        compiled(remat=remat, attention=attention).memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "full")
    )
    # float32: of a token and a layer, "full" keeps its input, "dots" the products with kernels.
    tokens = TOKENS.size * CONFIG.layers * 4
    dot_outputs = 5 * CONFIG.width + 2 * CONFIG.mlp_width
    assert full < dots < none
    assert dots - full == pytest.approx(tokens * dot_outputs, rel=0.5)
    assert none - dots > tokens * CONFIG.mlp_width


@pytest.mark.parametrize(
    ("remat", "length"),
    [
        *(("none", 128), ("dots", 128)),
        pytest.param("full", 128, marks=pytest.mark.slow),
        pytest.param("dots", 1100, marks=pytest.mark.slow),  # rows whose scores are not kept
    ],
)
def test_what_a_gradient_computes_on_its_way_is_bitwise_what_scoring_computes(remat, length):
    """So that the ratio of a policy to itself is 1 before the first update."""
    shape = {"width": 192, "heads": 3, "kv_heads": 3, "head_dim": 64, "mlp_width": 512}
    config = dataclasses.replace(CONFIG, **shape, max_length=length, remat=remat)
    params, tokens = init(config, jax.random.key(0)), random_tokens(2, length)

    def hidden(params):
        return apply(config, params, tokens).hidden

    def loss(params):
        return jnp.square(hidden(params)).sum(), hidden(params)

    _, trained = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert jnp.array_equal(trained, jax.jit(hidden)(params))
