"""Models as stages leave them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.tokenizer import train_bpe, train_chars
from rlhf_jax.errors import UserError
from rlhf_jax.export import main as export
from rlhf_jax.hub.hf_weights import write_weights
from rlhf_jax.models import PRESETS, transformer
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.stages.start import check_kernel
from rlhf_jax.training.checkpoint import load_params, save_params
from rlhf_jax.training.mesh import make_mesh, shardings
from rlhf_jax.training.saved_model import Model, as_trainable, load_model, save_model
from rlhf_jax.training.state import release
from tests.hub.test_hub_tokenizer import write
from tests.models.small import SMALL

HUB = dataclasses.replace(
    PRESETS["1b"], vocab_size=1024, layers=1, width=16, heads=2, kv_heads=1, head_dim=8,
    mlp_width=24, max_length=64, compute_dtype="float32", remat="none",
)  # fmt: skip


def test_a_kernel_of_the_machine_that_trained_is_not_asked_of_another(tmp_path, capsys):
    trained = dataclasses.replace(SMALL, attention="cudnn", compute_dtype="bfloat16")
    params = transformer.init(trained, jax.random.key(0))
    save_model(tmp_path, Model(trained, params, train_chars("abc")))
    assert load_model(tmp_path).config.attention == "reference"
    shape = load_model(tmp_path, attention="xla", compute_dtype="float32").config
    config = ConfigDict({"data": {"row_length": 32}})
    check_kernel(config, shape)
    assert capsys.readouterr().out.startswith("attention: xla, within ")
    with pytest.raises(UserError, match="'cudnn' needs a GPU"):
        check_kernel(config, trained)


def test_a_field_this_version_lacks_is_named(tmp_path):
    params = transformer.init(SMALL, jax.random.key(0))
    save_model(tmp_path, Model(SMALL, params, train_chars("abc")))
    assert load_model(tmp_path).config == SMALL
    params, document = load_params(tmp_path / "model")
    document["config"]["flux"] = 1
    save_params(tmp_path / "model", params, document)
    with pytest.raises(UserError, match="flux"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, r"attention/\w+/scale has the shape none"),
        ({"short_convolution": 2}, "short_convolution/query_key/scale has the shape none"),
        ({"mlp_width": 40}, r"mlp/\w+/kernel has the shape .*train anew"),
    ],
)
def test_parameters_of_another_version_are_named(tmp_path, changes, message):
    params = transformer.init(SMALL, jax.random.key(0))
    save_model(tmp_path, Model(SMALL, params, train_chars("abc")))
    params, document = load_params(tmp_path / "model")
    document["config"] |= changes
    save_params(tmp_path / "model", params, document)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": []},
        {"config": {}},
        {"tokenizer_hash": 1},
        {"normalization": [1]},
        {"normalization": ["x", 1]},
        {"adapter": {"rank": 2}},
        {"adapter": {}, "base": {"directory": "x"}},
        {"adapter": {"size": 2}, "base": {"directory": "x", "fingerprint": "y"}},
    ],
)
def test_a_document_of_another_shape_is_named(tmp_path, changes):
    model = Model(SMALL, transformer.init(SMALL, jax.random.key(0)), train_chars("abc"))
    save_model(tmp_path, model)
    params, document = load_params(tmp_path / "model")
    save_params(tmp_path / "model", params, document | changes)
    with pytest.raises(UserError, match=r"data\.json is not as this package writes it"):
        load_model(tmp_path)


def test_ids_that_no_word_has_are_known(tmp_path, capsys):
    """Rows after the tokenizer's last id, and a gap before an added token with an id of its own."""
    given, run, out = (tmp_path / name for name in ("given", "run", "out"))
    given.mkdir()
    tokens = write(given, "chatml").vocab_size
    path = given / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"][-1]["id"] = tokens + 1
    document["model"]["vocab"] |= {a["content"]: a["id"] for a in document["added_tokens"]}
    path.write_text(json.dumps(document))
    config = dataclasses.replace(HUB, vocab_size=tokens + 9)
    write_weights(given, config, transformer.init(config, jax.random.key(0)))
    model = load_model(given)
    assert model.config.unused == ((tokens - 1, tokens + 1), (tokens + 2, tokens + 9))
    run.mkdir()
    save_model(run, model)
    assert load_model(run).config == model.config and hash(load_model(run).config)
    assert export([f"--workdir={run}", f"--out={out}"]) == 0
    again = load_model(out)
    assert again.config.unused == model.config.unused
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    params, saved = load_params(run / "model")
    del saved["config"]["unused"]  # as versions before saved it
    save_params(run / "model", params, saved)
    assert load_model(run).config == dataclasses.replace(model.config, unused=())


@pytest.mark.parametrize("unused", [((3, 61), (0, 2)), ((0, 61),), ((60, 62),), ((4, 2),)])
def test_ranges_that_do_not_fit_are_named(unused):
    with pytest.raises(UserError, match="give ranges of ids in order"):
        dataclasses.replace(SMALL, unused=unused).validate()


def test_weights_are_read_to_where_they_belong(tmp_path):
    """From a run, from a Hugging Face directory, and of an adapter on either's 8-bit kernels."""
    run, out, tuned = (tmp_path / name for name in ("run", "out", "tuned"))
    for folder in (run, tuned):
        folder.mkdir()
    tokenizer = train_bpe("a few words are enough " * 9, 280)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_model(run, Model(config, transformer.init(config, jax.random.key(0)), tokenizer))
    assert export([f"--workdir={run}", f"--out={out}"]) == 0
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for source in (run, out):
        whole, spread = load_model(source), load_model(source, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, spread.params, whole.params)
        places = jax.tree.map(lambda x: x.sharding, spread.params)
        assert places == shardings(mesh, spread.params)
        assert not places["layers"]["mlp"]["up"]["kernel"].is_fully_replicated
    model = as_trainable(spread, AdapterConfig(rank=2, base="int8"), 0)
    # The adapter too, without which the model could not be laid out for decoding.
    assert jax.tree.map(lambda x: x.sharding, model.params) == shardings(mesh, model.params)
    codes = model.params["layers"]["mlp"]["up"]["int8"]["codes"]
    assert codes.sharding == places["layers"]["mlp"]["up"]["kernel"]
    save_model(tuned, model)
    assert load_model(tuned, mesh=mesh).base is model.base
    alone = load_model(tuned)
    jax.tree.map(np.testing.assert_array_equal, alone.params, model.params)


def test_a_base_that_was_given_up_is_read_again(tmp_path):
    params = transformer.init(SMALL, jax.random.key(0))
    save_model(tmp_path, Model(SMALL, params, train_chars("abc")))
    first = load_model(tmp_path)
    assert load_model(tmp_path).base is first.base
    kept = jax.tree.map(np.asarray, first.params)
    release(first.params)
    again = load_model(tmp_path)
    assert again.base is not first.base
    jax.tree.map(np.testing.assert_array_equal, again.params, kept)
