"""Configs that do not fit together are refused in one line; presets have the size they promise."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import PRESETS, init
from tests.models.small import SMALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads = 4 is not a multiple of model.kv_heads = 3"),
        ({"head_dim": 5}, "head_dim = 5: RoPE needs an even number"),
        ({"norm": "batch"}, "norm = 'batch': choose one of rms, layer"),
        ({"activation": "relu"}, "activation = 'relu': choose one of"),
        ({"compute_dtype": "float16"}, "compute_dtype = 'float16'"),
        ({"layers": 0}, "layers = 0: give a whole number above 0"),
        ({"vocab_size": None}, "vocab_size = None: give a whole number above 0"),
        ({"width": 16.5}, "width = 16.5: give a whole number"),
        ({"sliding_window": -1}, "sliding_window = -1: give a whole number above 0"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0: give a number above 0"),
        ({"experts": -1}, "experts = -1: give a whole number, 0 for none"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token = 3 is above model.experts"),
        ({"experts": 2, "activation": "geglu"}, "experts = 2: experts have activation = 'swiglu'"),
        ({"norm_bias": True}, "only norm = 'layer' has a bias"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError) as error:
        init(dataclasses.replace(SMALL, **changes), jax.random.key(0))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 1.08),
        ("10m", 8.9),
        ("125m", 124.4),
        ("350m", 354.8),
        ("1b", 1235.8),
        ("8b", 8030.3),
    ],
)
def test_preset_sizes(name, millions):
    config = PRESETS[name].validate()
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - millions) < 0.06, count
