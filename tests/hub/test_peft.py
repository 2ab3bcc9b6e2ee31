"""Adapters against the PEFT library: what we write it loads, and what it computes we compute."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.errors import UserError
from rlhf_jax.export import main
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.hub.hf_weights import read_weights, write_weights
from rlhf_jax.hub.peft import write_adapter
from rlhf_jax.models import apply, init, logits, lora, scores
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.training.saved_model import as_trainable, load_model, save_model
from tests.hub.test_hub_tokenizer import write
from tests.models.hub_shapes import GPT2, SHAPE

torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
peft = pytest.importorskip("peft", reason="needs requirements-parity.txt")
TOKENS = np.arange(40).reshape(2, 20)


def moved(params, size=0.1):
    """The parameters with whatever is trained of them shifted by noise."""
    trained, frozen = lora.split(params)
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return lora.combine(jax.tree.unflatten(structure, noisy), frozen)


WHERE = {"llama": AdapterConfig.targets, "gemma2": "attention/(query|value)$"} | {
    "gpt2": "attention/out$|mlp/"
}
QUICK = ("llama-dora", "llama-rslora", "gpt2-lora")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(f, k, marks=() if f"{f}-{k}" in QUICK else pytest.mark.slow, id=f"{f}-{k}")
        for f in WHERE
        for k in lora.KINDS
    ],
)
def test_an_adapter_computes_the_same_there(tmp_path, family, kind):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else SHAPE))
    )
    theirs.save_pretrained(tmp_path / "base")
    model, config = read_config(tmp_path / "base")
    adapter = AdapterConfig(rank=4, alpha=8.0, targets=WHERE[family], kind=kind)
    base = read_weights(tmp_path / "base", model, config)
    params = moved(lora.attach(base, adapter, jax.random.key(0)))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, params, adapter, tmp_path / "base")
    both = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    both = peft.PeftModel.from_pretrained(both, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = both(torch.tensor(TOKENS)).logits.numpy()
    found = logits(config, params, apply(config, params, jnp.asarray(TOKENS)).hidden)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    plain = logits(config, base, apply(config, base, jnp.asarray(TOKENS)).hidden)
    assert np.abs(plain - wanted).max() > 0.05


@pytest.mark.parametrize("kind", ["dora", pytest.param("rslora", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_peft(tmp_path, kind):
    """Of the mean of squared logits, with respect to every number of the adapter."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("llama", **SHAPE)
    )
    theirs.save_pretrained(tmp_path / "base")
    model, config = read_config(tmp_path / "base")
    adapter = AdapterConfig(rank=4, kind=kind)
    params = read_weights(tmp_path / "base", model, config)
    params = moved(lora.attach(params, adapter, jax.random.key(0)))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, params, adapter, tmp_path / "base")
    both = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    both(torch.tensor(TOKENS)).logits.square().mean().backward()
    trained, frozen = lora.split(params)

    def objective(trained):
        whole = lora.combine(trained, frozen)
        y = logits(config, whole, apply(config, whole, jnp.asarray(TOKENS)).hidden)
        return jnp.mean(jnp.square(y))

    grads = jax.grad(objective)(trained)["layers"]["attention"]["value"]["lora"]
    layer = both.base_model.model.model.layers[1].self_attn.v_proj
    pairs = [(grads["a"][1].T, layer.lora_A), (grads["b"][1].T, layer.lora_B)]
    if kind == "dora":
        pairs.append((grads["magnitude"][1], layer.lora_magnitude_vector))
    for ours, module in pairs:
        wanted = module["default"].weight.grad.numpy()
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_reward_model_is_exported_as_an_adapter_and_merged(tmp_path):
    (tmp_path / "base").mkdir()
    tokenizer = write(tmp_path / "base", "chatml")
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size}
    transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen2", **shape)
    ).save_pretrained(tmp_path / "base")
    policy = as_trainable(load_model(tmp_path / "base"), AdapterConfig(rank=4), 0)
    scalar = dataclasses.replace(policy.config, head="scalar")
    body = {k: v for k, v in policy.params.items() if k != "lm_head"}
    head = {"score_head": init(scalar, jax.random.key(1))["score_head"]}
    model = dataclasses.replace(policy, config=scalar, params=moved(body | head))
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model)
    assert sum(p.stat().st_size for p in (tmp_path / "run/model").rglob("*") if p.is_file()) < 1e5
    again = load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.params["embed"]["embedding"] is policy.params["embed"]["embedding"]

    ours = scores(scalar, model.params, apply(scalar, model.params, jnp.asarray(TOKENS)).hidden)
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        assert main([f"--workdir={tmp_path}/run", f"--out={tmp_path}/{name}", *options]) == 0
    classes = transformers.AutoModelForSequenceClassification
    half = [f"--out={tmp_path}/half", "--dtype=bfloat16"]
    assert main([f"--workdir={tmp_path}/run", *half]) == 0
    kept = load_file(tmp_path / "half/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in kept.values()} == {"bfloat16"}
    on_base = classes.from_pretrained(tmp_path / "base", num_labels=1)
    on_base = peft.PeftModel.from_pretrained(on_base, tmp_path / "adapter")
    for theirs in (on_base, classes.from_pretrained(tmp_path / "merged")):
        theirs.config.pad_token_id = 0
        with torch.no_grad():
            found = theirs.eval()(torch.tensor(TOKENS + 1)).logits[:, 0].numpy()
        ids = jnp.asarray(TOKENS + 1)
        ours = scores(scalar, model.params, apply(scalar, model.params, ids).hidden)[:, -1]
        np.testing.assert_allclose(ours, found, rtol=1e-4, atol=1e-4)


def test_a_part_of_a_tensor_cannot_be_written(tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt2", **GPT2)
    )
    theirs.save_pretrained(tmp_path)
    model, config = read_config(tmp_path)
    adapter = AdapterConfig(rank=2)
    params = lora.attach(read_weights(tmp_path, model, config), adapter, jax.random.key(0))
    with pytest.raises(UserError, match=r"attention/(query|key|value) is a part of one tensor"):
        write_adapter(tmp_path, config, params, adapter, tmp_path)


def test_an_adapter_without_its_base_is_named(tmp_path):
    (tmp_path / "base").mkdir()
    tokenizer = write(tmp_path / "base", "chatml")
    config = dataclasses.replace(
        read_config_of(SHAPE | {"vocab_size": tokenizer.vocab_size}, tmp_path / "made"),
        compute_dtype="float32",
    )
    write_weights(tmp_path / "base", config, init(config, jax.random.key(0)))
    policy = as_trainable(load_model(tmp_path / "base"), AdapterConfig(rank=2, base="nf4"), 0)
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", policy)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "run").params, policy.params)
    with pytest.raises(UserError, match="the model has an adapter with base = 'nf4', the config"):
        as_trainable(load_model(tmp_path / "run"), AdapterConfig(rank=2), 0)
    merged = as_trainable(load_model(tmp_path / "run"), AdapterConfig(), 0)
    assert merged.adapter is None and not lora.has_adapter(merged.params)
    write_weights(tmp_path / "base", config, init(config, jax.random.key(1)))
    with pytest.raises(UserError, match="base, which has changed since"):
        load_model(tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base, which is not there"):
        load_model(tmp_path / "run")


def read_config_of(shape, directory):
    transformers.AutoConfig.for_model("llama", **shape).save_pretrained(directory)
    return read_config(directory)[1]
