"""Models as stages leave them."""

from __future__ import annotations

import jax
import pytest

from rlhf_jax.data.tokenizer import train_chars
from rlhf_jax.errors import UserError
from rlhf_jax.models import transformer
from rlhf_jax.training.checkpoint import load_params, save_params
from rlhf_jax.training.model import Model, load_model, save_model
from tests.models.small import SMALL


def test_a_field_this_version_lacks_is_named(tmp_path):
    params = transformer.init(SMALL, jax.random.key(0))
    save_model(tmp_path, Model(SMALL, params, train_chars("abc")))
    assert load_model(tmp_path).config == SMALL
    params, document = load_params(tmp_path / "model")
    document["config"]["flux"] = 1
    save_params(tmp_path / "model", params, document)
    with pytest.raises(UserError, match="flux"):
        load_model(tmp_path)
