"""Mixtures of experts: by hand, by invariances, under adapters, on a mesh and from older files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.hub.hf_weights import read_weights, write_weights
from rlhf_jax.models import apply, logits, lora
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.training.mesh import make_mesh, placed
from rlhf_jax.trees import named_leaves
from tests.models.small import KINDS, SMALL, forward, noisy, random_tokens
from tests.models.test_transformer import assert_trees_close, numpy_forward

CONFIG = KINDS["experts"]
QWEN = dataclasses.replace(
    CONFIG, qk_norm=True, experts_per_token=3, expert_renormalize=False, tied_embeddings=False
)
MIXTRAL = dataclasses.replace(CONFIG, tied_embeddings=False, sliding_window=5)


@pytest.mark.parametrize(("count", "renormalize"), [(1, True), (1, False), (3, False), (4, True)])
def test_equals_a_loop_over_the_chosen_experts(count, renormalize):
    config = dataclasses.replace(CONFIG, experts_per_token=count, expert_renormalize=renormalize)
    params, tokens = noisy(config), random_tokens(1, 9)
    expected = numpy_forward(config, params, np.asarray(tokens[0]))
    np.testing.assert_allclose(forward(config, params, tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_parameters_are_stacked_over_layers_and_experts():
    shapes = {k: v.shape for k, v in named_leaves(noisy(CONFIG)["layers"]["mlp"]).items()}
    assert shapes == {
        "experts/gate/kernel": (2, 4, 16, 12),
        "experts/up/kernel": (2, 4, 16, 12),
        "experts/down/kernel": (2, 4, 12, 16),
        "router/kernel": (2, 16, 4),
    }


def test_a_token_does_not_depend_on_its_neighbours():
    params, tokens = noisy(CONFIG), random_tokens(5, 12)
    hidden = forward(CONFIG, params, tokens)
    changed = forward(CONFIG, params, tokens.at[1:].set(random_tokens(4, 12, seed=1)))
    np.testing.assert_array_equal(hidden[0], changed[0])
    assert not np.array_equal(hidden[1], changed[1])
    after = forward(CONFIG, params, tokens.at[:, 7:].set(0))
    np.testing.assert_array_equal(hidden[:, :7], after[:, :7])


def test_equal_experts_are_one_mlp():
    params = noisy(CONFIG)
    mlp = params["layers"]["mlp"]
    first = jax.tree.map(lambda x: x[:, 0], mlp["experts"])
    mlp["experts"] = jax.tree.map(lambda x: jnp.stack([x] * 4, axis=1), first)
    dense = params | {"layers": params["layers"] | {"mlp": first}}
    config = dataclasses.replace(CONFIG, experts=0)
    tokens = random_tokens(2, 11)
    one, many = forward(config, dense, tokens), forward(CONFIG, params, tokens)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def gradients(config, params):
    def loss(params):
        hidden = apply(config, params, random_tokens(2, 11)).hidden
        return jnp.mean(jax.nn.logsumexp(logits(config, params, hidden), axis=-1))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}])
def test_how_it_is_computed_changes_no_value(change):
    params = noisy(CONFIG)
    expected = gradients(CONFIG, params)
    assert_trees_close(gradients(dataclasses.replace(CONFIG, **change), params), expected)
    assert np.abs(expected[1]["layers"]["mlp"]["router"]["kernel"]).max() > 1e-4


def test_bfloat16_routes_in_float32():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params, tokens = noisy(CONFIG), random_tokens(2, 11)
    hidden = forward(config, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    lowered = jax.jit(lambda p: apply(config, p, tokens).hidden).lower(params).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert any("(tensor<22x16xf32>, tensor<16x4xf32>)" in line for line in products)
    assert any("(tensor<22x16xbf16>, tensor<16x12xbf16>)" in line for line in products)


def test_a_mesh_changes_no_value():
    params, tokens = noisy(CONFIG), random_tokens(8, 11)
    spread = placed(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), params)
    mlp = spread["layers"]["mlp"]
    assert mlp["experts"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 4, 8, 6)
    assert mlp["experts"]["down"]["kernel"].addressable_shards[0].data.shape == (2, 4, 6, 8)
    assert mlp["router"]["kernel"].sharding.is_fully_replicated
    found = forward(CONFIG, spread, tokens)
    np.testing.assert_allclose(found, forward(CONFIG, params, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_experts_are_quantised_but_get_no_adapter(base):
    params, tokens = noisy(CONFIG), random_tokens(1, 9)
    kept = lora.quantize(params, base)
    adapted = lora.attach(kept, AdapterConfig(rank=2, base=base), jax.random.key(0))
    mlp = adapted["layers"]["mlp"]
    assert_trees_close(mlp["router"], params["layers"]["mlp"]["router"], rtol=0)
    assert base in mlp["experts"]["down"] and "lora" not in mlp["experts"]["down"]
    assert "lora" in adapted["layers"]["attention"]["query"]
    assert lora.param_count(adapted) == sum(leaf.size for leaf in jax.tree.leaves(params))
    found = forward(CONFIG, adapted, tokens)
    np.testing.assert_allclose(found, forward(CONFIG, lora.merge(adapted), tokens), atol=1e-4)


def test_only_the_router_of_a_mixture_may_have_an_adapter():
    params = noisy(CONFIG)
    with pytest.raises(UserError, match=r"is found in none of .*, layers/mlp/router$"):
        lora.attach(params, AdapterConfig(rank=2, targets="experts/"), jax.random.key(0))
    routed = lora.attach(params, AdapterConfig(rank=2, targets="router$"), jax.random.key(0))
    tokens = random_tokens(1, 9)
    np.testing.assert_array_equal(forward(CONFIG, routed, tokens), forward(CONFIG, params, tokens))


@pytest.mark.parametrize(("kind", "config"), [("mixtral", MIXTRAL), ("qwen3_moe", QWEN)])
def test_what_is_written_is_read(tmp_path, kind, config):
    params = noisy(config)
    write_weights(tmp_path, config, params, shard_bytes=5_000)
    assert read_config(tmp_path) == (kind, config)
    read = read_weights(tmp_path, kind, config)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_qwen_config_of_transformers_5_says_the_same(tmp_path):
    write_weights(tmp_path, QWEN, noisy(QWEN))
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["num_local_experts"] = document.pop("num_experts")
    path.write_text(json.dumps(document | {"mlp_only_layers": [], "decoder_sparse_step": 1}))
    assert read_config(tmp_path) == ("qwen3_moe", QWEN)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (QWEN, {"mlp_only_layers": [1]}, "mlp_only_layers = [1] is not supported"),
        (QWEN, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        (QWEN, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh' should be"),
        (QWEN, {"num_experts": 0}, "num_experts = 0 must be above 0"),
        (QWEN, {"num_experts_per_tok": 5}, "experts_per_token = 5 is above model.experts = 4"),
        (QWEN, {"norm_topk_prob": None}, "there is no norm_topk_prob; it should be true or false"),
        (MIXTRAL, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh' should"),
        (MIXTRAL, {"num_local_experts": 2.5}, "num_local_experts = '2.5' should be a whole number"),
        (MIXTRAL, {"num_local_experts": 10**9}, "asks for 2000000000 experts, its files hold"),
        (MIXTRAL, {"num_local_experts": 5}, "the first is model.layers.0.block_sparse_moe"),
        (MIXTRAL, {"num_local_experts": 3}, "the first is model.layers.0.block_sparse_moe"),
        (SMALL, {"num_experts_per_tok": 2}, "num_experts_per_tok = 2 is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, config, changes, message):
    write_weights(tmp_path, config, noisy(config))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as error:
        read_weights(tmp_path, *read_config(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
