"""Every attention kernel gives what the reference gives, or one clear error."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.models import apply, fused_attention, init
from rlhf_jax.models.fused_attention import (
    attend_by,
    check_attention,
    random_rows,
    visibility,
)
from rlhf_jax.models.splash import branch_codes
from rlhf_jax.training.mesh import make_mesh
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


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"sliding_window": 7},
        pytest.param({"sliding_window": 500}, marks=pytest.mark.slow),
        {"attention_softcap": 2.0},
    ],
    ids=["full", "window", "window-beyond-the-row", "capped"],
)
def test_splash_agrees_where_it_is_interpreted(changes):
    config = dataclasses.replace(GROUPED, attention="splash", **changes).validate()
    assert 0 < check_attention(config, 150, interpret=True) < 1e-5


def test_splash_keeps_many_branches_apart():
    """Answers of one token, prompts without any, and keys that score a thousand times too high."""
    random = np.random.default_rng(0)
    sizes = [(9, [1] * 20 + [4] * 5), (1, [30, 2, 17]), (30, [])]
    parts = [np.repeat(np.arange(1 + len(each)), [prompt, *each]) for prompt, each in sizes]
    branch_ids = np.concatenate([*parts, np.zeros(11, int)]).astype(np.int32)[None]
    segment_ids = np.repeat([1, 2, 3, 0], [*map(len, parts), 11])[None]
    row = [jnp.asarray(x, jnp.int32) for x in (segment_ids * 0, segment_ids, branch_ids)]
    length = branch_ids.shape[1]
    query, key, value = (
        jnp.asarray(random.normal(size=(1, 2, *groups, length, 8)) * scale, jnp.float32)
        for groups, scale in (((2,), 1), ((), 30), ((), 1))
    )
    real = (row[1] > 0)[:, None, None, :, None]

    def loss(arrays, attention):
        config = dataclasses.replace(GROUPED, attention=attention)
        visible = visibility(config, *row, None)
        mixed = attend_by(config, *arrays, visible, interpret=True) * real
        return (jnp.sin(mixed) * jnp.arange(8)).sum(), mixed

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, found), slopes = step((query, key, value), "splash")
    (_, exact), exact_slopes = step((query, key, value), "reference")
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    for x, y in zip(slopes, exact_slopes, strict=True):  # up to 200: keys multiply them
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * jnp.abs(y).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_of_branches_change_no_score_but_those_to_be_hidden(dtype):
    ids = jnp.arange(300)[None] % 300
    query, key = branch_codes(ids, dtype)
    lost = np.asarray(jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=jnp.float32))
    seen = (ids[0][:, None] == ids[0]) | (ids[0] == 0)
    assert (lost[0][seen] == 0).all() and (lost[0][~seen] <= -1e6).all()


@pytest.mark.parametrize(
    ("kv_heads", "groups", "tensor"),
    [
        pytest.param(4, 2, 4, id="divided", marks=pytest.mark.slow),
        pytest.param(2, 4, 4, id="keys-repeated", marks=pytest.mark.slow),
        pytest.param(6, 2, 4, id="some-keys-repeated"),
        pytest.param(3, 3, 4, id="heads-added"),
    ],
)
def test_heads_are_split_over_a_mesh_whether_it_divides_them_or_not(kv_heads, groups, tensor):
    config = dataclasses.replace(
        SMALL, kv_heads=kv_heads, heads=kv_heads * groups, attention="splash"
    )
    mesh = make_mesh({"data": 2, "tensor": tensor}, jax.devices()[: 2 * tensor])
    random = np.random.default_rng(0)
    ids = [*random_rows(random, 2, 40, branches=True).values()]
    shapes = (2, kv_heads, groups, 40, 4), (2, kv_heads, 40, 4), (2, kv_heads, 40, 4)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]

    def mixed(query, key, value, *ids):
        visible = visibility(config, *ids, None)
        return attend_by(config, query, key, value, visible, interpret=True)

    by_rows = jax.shard_map(
        mixed, in_specs=P("data"), out_specs=P("data"), axis_names={"data", "fsdp"}, check_vma=False
    )

    def step(function):
        return jax.jit(
            jax.value_and_grad(lambda *x: jnp.sin(function(*x, *ids)).sum(), argnums=(0, 1, 2))
        )

    expected = step(mixed)(*arrays)
    with jax.set_mesh(mesh):
        split = step(by_rows).lower(*arrays).compile()
        found = split(*arrays)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
    )


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_softcap": 2.0}, "an attention_softcap: choose attention = 'reference'"),
        ({"sliding_window": 9}, "a sliding_window shorter than a row: choose attention = 'xla'"),
    ],
)
def test_splash_refuses_shared_prompts_where_it_would_mix_them_up(changes, message):
    config = dataclasses.replace(KINDS["llama"], attention="splash", **changes)
    ids = random_rows(np.random.default_rng(0), 1, 16, branches=True)
    with pytest.raises(UserError, match=message):
        apply(config, noisy(config), random_tokens(1, 16), **ids)
