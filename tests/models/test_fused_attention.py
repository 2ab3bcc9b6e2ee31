"""Every attention kernel gives what the reference gives, or one clear error."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import apply, fused_attention, init
from rlhf_jax.models.fused_attention import check_attention, random_rows
from tests.models.small import KINDS, SMALL, noisy, random_tokens

GROUPED = dataclasses.replace(SMALL, kv_heads=2, attention="xla")
WINDOWED = dataclasses.replace(GROUPED, sliding_window=5, window_pattern="wg")


@pytest.mark.parametrize("config", [GROUPED, WINDOWED], ids=["full", "window-and-full"])
def test_a_model_computes_the_same_on_rows_with_branches(config):
    ids = random_rows(np.random.default_rng(0), 3, 48, branches=True)
    tokens, params = random_tokens(3, 48), noisy(config)
    real = (ids["segment_ids"] > 0)[..., None]
    weights = real * jnp.asarray(np.random.default_rng(1).normal(size=(3, 48, 16)), jnp.float32)

    def loss(params, kernel):
        shape = dataclasses.replace(config, attention=kernel)
        return (apply(shape, params, tokens, **ids).hidden * weights).sum()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, found = step(params, "reference"), step(params, "xla")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected
    )


def test_prompts_fill_a_cache_as_the_reference_does():
    from rlhf_jax.models import init_cache

    tokens, params = random_tokens(2, 20), noisy(WINDOWED)

    def cache(kernel):
        config = dataclasses.replace(WINDOWED, attention=kernel)
        lengths = jnp.array([20, 11])
        return apply(
            config, params, tokens, cache=init_cache(config, 2, 24), prompt_lengths=lengths
        ).cache

    for name in ("keys", "values"):
        for x, y in zip(cache("xla")[name], cache("reference")[name], strict=True):
            np.testing.assert_allclose(x[:, :, :11], y[:, :, :11], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [GROUPED, WINDOWED], ids=["full", "window-and-full"])
def test_the_check_passes_a_kernel_that_is_right(config, dtype):
    config = dataclasses.replace(config, compute_dtype=dtype)
    assert 0 < check_attention(config, 100) < (1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"attention_softcap": 2.0}])
def test_splash_agrees_where_it_is_interpreted(changes):
    config = dataclasses.replace(GROUPED, attention="splash", **changes).validate()
    assert 0 < check_attention(config, 150, interpret=True) < 1e-5


def test_the_check_finds_a_kernel_that_looks_across_documents(monkeypatch):
    right = jax.nn.dot_product_attention

    def wrong(*arrays, mask, **options):
        return right(*arrays, mask=None, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", wrong)
    with pytest.raises(UserError, match=r"disagrees with the reference.*'reference'"):
        check_attention(GROUPED, 100)


def test_the_check_finds_a_kernel_that_mixes_up_branches(monkeypatch):
    right = fused_attention.attention_bias

    def wrong(positions, segment_ids=None, branch_ids=None, sliding_window=None):
        if segment_ids is not None and int(segment_ids.max()) > 6:  # of the kernel: + 1
            branch_ids = None
        return right(positions, segment_ids, branch_ids, sliding_window)

    monkeypatch.setattr(fused_attention, "attention_bias", wrong)
    with pytest.raises(UserError, match="disagrees"):
        check_attention(GROUPED, 100)


def test_what_a_kernel_refuses_is_a_user_error(monkeypatch):
    def refuse(*arrays, **options):
        raise NotImplementedError("The head dim must be <= 256\nand so on")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    with pytest.raises(UserError, match=r"rows of 100 tokens .*must be <= 256\): choose"):
        check_attention(GROUPED, 100)


def test_a_kernel_of_another_platform_is_a_user_error():
    cudnn = dataclasses.replace(SMALL, attention="cudnn", compute_dtype="bfloat16").validate()
    with pytest.raises(UserError, match="'cudnn' needs a GPU, this is a CPU: choose"):
        check_attention(cudnn, 32)
    with pytest.raises(UserError, match="'splash' needs a TPU, this is a CPU: choose"):
        check_attention(dataclasses.replace(SMALL, attention="splash"), 32)
    init(cudnn, jax.random.key(0))  # needs no kernel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "xla", "attention_softcap": 2.0}, "no attention_softcap"),
        ({"attention": "cudnn"}, "needs compute_dtype = 'bfloat16'"),
        ({"attention": "splash", "sliding_window": 4, "window_pattern": "wg"}, "choose 'xla'"),
        ({"attention": "flash"}, "choose one of reference, xla, cudnn, splash"),
    ],
)
def test_configs_no_kernel_can_follow_are_named(changes, message):
    with pytest.raises(UserError, match=f"model.attention.*{message}"):
        dataclasses.replace(SMALL, **changes).validate()


def test_splash_refuses_shared_prompts():
    config = dataclasses.replace(KINDS["llama"], attention="splash")
    ids = random_rows(np.random.default_rng(0), 1, 16, branches=True)
    with pytest.raises(UserError, match="shared prompt"):
        apply(config, noisy(config), random_tokens(1, 16), **ids)
