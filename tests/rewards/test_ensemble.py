"""Ensembles of reward models: by hand, and all members at once as one by one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.models.lora import AdapterConfig, attach
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.rewards.ensemble import (
    Normalization,
    combine_members,
    member_scores,
    normalization_of,
    same_config,
    stack_members,
)

CONFIG = ModelConfig(
    vocab_size=61,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    max_length=32,
    head="scalar",
)
SCORES = np.array([[1.0, 4.0, 0.0], [3.0, 4.0, 6.0]])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("how", "k", "combined"),
    [
        ("mean", 1.0, [2, 4, 3]),
        ("min", 1.0, [1, 4, 0]),
        ("mean_minus_std", 1.0, [1, 4, 0]),
        ("mean_minus_std", 0.5, [1.5, 4, 1.5]),
    ],
)
def test_combine_by_hand(kind, how, k, combined):
    found = combine_members(kind(SCORES), how, k)
    assert isinstance(found, type(kind(SCORES)))
    np.testing.assert_allclose(found, combined, rtol=1e-6)


def test_one_member_is_itself():
    for how in ("mean", "min", "mean_minus_std"):
        np.testing.assert_array_equal(combine_members(SCORES[:1], how), SCORES[0])


def test_combine_refuses():
    with pytest.raises(UserError, match="not 'max'"):
        combine_members(SCORES, "max")
    with pytest.raises(ValueError, match="K, N"):
        combine_members(SCORES[0])
    with pytest.raises(ValueError, match="K, N"):
        combine_members(SCORES[:0])


def member(config=CONFIG, seed=0):
    """Random parameters; `init` compiles for longer than these tests take."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes
    )


def test_members_at_once_are_members_one_by_one():
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 61, (2, 12)), jnp.int32),
        "positions": jnp.asarray(np.tile([*range(5), *range(7)], (2, 1)), jnp.int32),
        "segment_ids": jnp.asarray(np.tile([1] * 5 + [2] * 7, (2, 1)), jnp.int32),
        "last": jnp.asarray([[[4], [11]], [[3], [9]]], jnp.int32),
    }
    params = [member(seed=seed) for seed in range(3)]
    together = jax.jit(member_scores, static_argnums=0)(CONFIG, stack_members(params), batch)
    single = jax.jit(sequence_scores, static_argnums=0)
    apart = np.stack([single(CONFIG, one, batch) for one in params])
    assert together.shape == (3, 2, 2, 1)
    assert np.ptp(apart, axis=0).min() > 1e-3
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-6)


def test_what_members_share_is_not_copied():
    one = member(seed=0)
    adapter = AdapterConfig(rank=2)
    pair = [attach(one, adapter, jax.random.key(seed)) for seed in range(2)]
    stacked = stack_members(pair)
    assert stacked.shared["embed"]["embedding"] is one["embed"]["embedding"]
    assert stacked.own["layers"]["mlp"]["up"]["lora"]["a"].shape[0] == 2
    twice = stack_members([one, one])
    assert set(twice.own) == {"score_head"} and twice.own["score_head"]["kernel"].shape[0] == 2


def test_members_of_other_shapes_are_named_by_leaf():
    wide = dataclasses.replace(CONFIG, mlp_width=32)
    with pytest.raises(UserError, match=r"mlp.* is float32\[.*24.* in member 0 .*32.* member 1"):
        stack_members([member(), member(wide)])
    language = dataclasses.replace(CONFIG, head="lm")
    for pair in ([CONFIG, language], [language, CONFIG]):
        with pytest.raises(UserError, match=r"score_head/kernel is .*none"):
            stack_members([member(config) for config in pair])
    with pytest.raises(UserError, match="at least one"):
        stack_members([])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), member())
    with pytest.raises(UserError, match=r"float32.*bfloat16"):
        stack_members([member(), half])


def test_members_of_other_configs_are_named_by_field():
    same_config([], [])
    same_config([CONFIG, dataclasses.replace(CONFIG, init_std=0.5, remat="full")], ["a", "b"])
    other = dataclasses.replace(CONFIG, rope_theta=500.0, logit_softcap=30.0)
    with pytest.raises(UserError, match=r"rope_theta is 10000\.0 in a and 500\.0 in c"):
        same_config([CONFIG, CONFIG, other], ["a", "b", "c"])


def test_normalization_by_hand():
    found = normalization_of(np.array([1.0, 3.0, 5.0, 7.0], np.float32))
    assert found == Normalization(4.0, pytest.approx(5**0.5))
    scores = jnp.array([[4.0, 4 + 5**0.5]])
    np.testing.assert_allclose(found.apply(scores), [[0, 1]], atol=1e-6)
    samples = np.random.default_rng(0).normal(3, 2, 50)
    scaled = normalization_of(samples).apply(samples)
    assert scaled.mean() == pytest.approx(0, abs=1e-12)
    assert scaled.std() == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (np.full(3, 0.1), "same score"),
        (np.zeros(5), "same score"),
        (np.array([1.0]), "same score"),
        (np.array([1000, 1000 + 6e-5], np.float32), "same score"),
        (np.array([1.0, np.nan]), "1 of 2 are not finite"),
        (np.array([1.0, np.inf]), "1 of 2 are not finite"),
        (np.zeros(0), "no reference samples"),
    ],
)
def test_normalization_refuses(scores, says):
    with pytest.raises(UserError, match=says):
        normalization_of(scores)
