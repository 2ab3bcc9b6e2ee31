"""Weights and logits against the transformers library, on random models of every family."""

from __future__ import annotations

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.hub.hf_config import read_config, to_document
from rlhf_jax.hub.hf_weights import read_weights, write_weights
from rlhf_jax.models import apply, init_cache, logits
from rlhf_jax.models.transformer import rope_frequencies
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from tests.models.hub_shapes import GPT2, SHAPE

torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0} | {
    "original_max_position_embeddings": 16
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
LINEAR_OLD = {"rope_type": "linear", "factor": 2.0}
MULTIHEAD = SHAPE | {"num_key_value_heads": 4}
QWEN3_MOE = SHAPE | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
CASES = {
    "llama": ("llama", SHAPE),
    "llama-tied-biased": (
        "llama",
        SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3.1": ("llama", SHAPE | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", SHAPE | {"rope_parameters": YARN}),
    "llama-linear": ("llama", SHAPE | {"rope_parameters": LINEAR}),
    "mistral": ("mistral", SHAPE | {"sliding_window": 5}),
    "qwen2": ("qwen2", SHAPE),
    "qwen2-windowed": (
        "qwen2",
        SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", SHAPE | {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", SHAPE | {"num_local_experts": 5, "sliding_window": 7}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-unnormalized": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}),
    "gemma": ("gemma", SHAPE),
    "gemma2": ("gemma2", SHAPE | {"sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3_text", SHAPE | {"sliding_window": 5, "query_pre_attn_scalar": 12}),
    "olmo2": ("olmo2", SHAPE),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", MULTIHEAD),
    "gpt-neox-serial": ("gpt_neox", MULTIHEAD | {"use_parallel_residual": False}),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(directory, the torch model, the same read by us)."""
    kind, fields = CASES[request.param]
    torch.manual_seed(0)
    if kind in ("gpt2", "gpt_neox", "qwen2", "olmo2", "mistral"):
        fields = {k: v for k, v in fields.items() if k != "head_dim"}
    config = transformers.CONFIG_MAPPING[kind](**fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases too, so that none can hide a mistake
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    kind, ours = read_config(directory)
    return directory, model, ours, read_weights(directory, kind, ours)


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 61, shape).astype(np.int32)


def test_logits_are_those_of_transformers(saved):
    _, model, config, params = saved
    tokens = random_tokens(2, 40)
    ours = logits(config, params, apply(config, params, jnp.asarray(tokens)).hidden)
    np.testing.assert_allclose(ours, theirs(model, tokens), **CLOSE)


def test_packed_rows_and_shared_prompts_give_the_same_logits(saved):
    _, model, config, params = saved
    lengths = (17, 9, 12)
    documents = [random_tokens(n, seed=n) for n in lengths]
    batch = {
        "segment_ids": np.repeat([1, 2, 3, 0], (*lengths, 2)),
        "positions": np.concatenate([*(np.arange(n) for n in lengths), [0, 0]]),
    }
    row = np.concatenate([*documents, [0, 0]])
    arrays = {name: jnp.asarray(x[None], jnp.int32) for name, x in batch.items()}
    hidden = apply(config, params, jnp.asarray(row[None], jnp.int32), **arrays).hidden
    ours = np.split(np.asarray(logits(config, params, hidden))[0], np.cumsum(lengths))
    for document, found in zip(documents, ours, strict=False):
        np.testing.assert_allclose(found, theirs(model, document[None])[0], **CLOSE)


STEPPED = ("llama", "gpt2", "gpt-neox", "mixtral", "gemma3")


@pytest.mark.parametrize(
    "saved",
    [c if c in STEPPED else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    indirect=True,
)
def test_cached_steps_of_padded_prompts_give_the_same_logits(saved):
    _, model, config, params = saved
    tokens, lengths = random_tokens(2, 20), np.array([11, 7], np.int32)
    whole = theirs(model, tokens)
    cache = init_cache(config, 2, 20)
    prompts = jnp.asarray(np.where(np.arange(11) < lengths[:, None], tokens[:, :11], 0))
    output = apply(config, params, prompts, cache=cache, prompt_lengths=jnp.asarray(lengths))
    for step in range(6):
        at = lengths + step
        following = jnp.asarray(tokens[np.arange(2), at][:, None])
        output = apply(config, params, following, cache=output.cache)
        found = np.asarray(logits(config, params, output.hidden))[:, 0]
        np.testing.assert_allclose(found, whole[np.arange(2), at], **CLOSE)


@pytest.mark.slow
def test_greedy_generation_agrees_for_64_tokens(saved):
    _, model, config, params = saved
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 4)]
    sampling = Sampling(64, temperature=0.0)
    for prompt, ours in zip(
        prompts, generate(config, params, prompts, sampling, seed=0), strict=True
    ):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert list(ours.tokens) == found[0, len(prompt) :].tolist()


def test_the_round_trip_is_bitwise(saved, tmp_path):
    directory, model, config, params = saved
    kind, _ = read_config(directory)
    assert to_document(config)[0] == kind
    write_weights(tmp_path, config, params, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    kind, again = read_config(tmp_path)
    assert dataclasses.replace(again, init_std=config.init_std) == config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    state = model.state_dict()
    found = loaded.state_dict()
    assert state.keys() == found.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, found[name]), name
    tokens = random_tokens(1, 30)
    np.testing.assert_array_equal(theirs(loaded.eval(), tokens), theirs(model, tokens))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "gpt_neox"])
def test_a_head_beside_a_tied_embedding_is_used(kind, tmp_path):
    """As an adapter on the head leaves it when it is merged."""
    fields = {"gpt2": GPT2, "gpt_neox": MULTIHEAD}.get(kind, SHAPE)
    if kind == "gpt_neox":
        fields = {k: v for k, v in fields.items() if k != "head_dim"}
    config = transformers.CONFIG_MAPPING[kind](**fields, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"
    tensors[head] = np.random.default_rng(0).normal(0, 0.2, (61, 32)).astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    family, ours = read_config(tmp_path)
    params, tokens = read_weights(tmp_path, family, ours), random_tokens(1, 20)
    found = logits(ours, params, apply(ours, params, jnp.asarray(tokens)).hidden)
    np.testing.assert_allclose(found, theirs(model, tokens), **CLOSE)


YARN_OLD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
STATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
ROPES = {
    "nothing": {},
    "the recipe for YaRN": STATED | {"rope_scaling": YARN_OLD},
    "and a theta beside it": STATED | {"rope_scaling": YARN_OLD, "rope_theta": 2e5},
    "and one in it": STATED | {"rope_scaling": YARN_OLD | {"rope_theta": 2e5}},
    "llama3 beside": STATED | {"rope_scaling": LLAMA3},
    "an empty scaling": STATED | {"rope_scaling": {}},
    "no theta": {"rope_parameters": YARN_OLD},
    "theta outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e5},
    "empty": {"rope_parameters": {}},
    "empty, theta outside": {"rope_parameters": {}, "rope_theta": 2e5},
    "null, theta outside": {"rope_parameters": None, "rope_theta": 2e5},
    "two thetas": STATED | {"rope_theta": 2e5},
    "length outside": {"rope_scaling": YARN_OLD, "original_max_position_embeddings": 32},
    "llama3, length outside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "no length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "both names": {"rope_scaling": LINEAR | {"type": "linear"}},
    "factor below 1": {"rope_scaling": YARN_OLD | {"factor": 0.5}},
    "ramp turned round": {
        "rope_scaling": YARN_OLD | {"original_max_position_embeddings": 10**9, "rope_theta": 50.0}
    },
    "mscale alone": {"rope_scaling": YARN_OLD | {"mscale": 0.7}},
    "both mscales": {"rope_scaling": YARN_OLD | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    "mscales overruled": {
        "rope_scaling": YARN_OLD | {"mscale": 0.7, "mscale_all_dim": 1.2, "attention_factor": 1.5}
    },
}
NEOX_ROPES = {
    "base": {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    "base, empty": {"rotary_emb_base": 5e4, "rotary_pct": 0.5, "rope_parameters": {}},
    "base, scaled": {"rotary_emb_base": 5e4, "rotary_pct": 0.5, "rope_scaling": LINEAR_OLD},
    "share inside": {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}},
}


def frequencies(directory, kind):
    """(frequencies, factor of cos and sin) as transformers makes them of a config.json."""
    config = transformers.AutoConfig.from_pretrained(directory)
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    name = {"llama": "Llama", "gpt_neox": "GPTNeoX", "mixtral": "Mixtral", "gemma3": "Gemma3"}
    made = getattr(module, f"{name[kind]}RotaryEmbedding")(config)
    if kind != "gemma3":
        return [(made.inv_freq.numpy(), made.attention_scaling)]
    return [
        (getattr(made, f"{n}_inv_freq").numpy(), getattr(made, f"{n}_attention_scaling"))
        for n in ("full_attention", "sliding_attention")
    ]


def write_rope(directory, kind, changes):
    fields = {
        "llama": SHAPE,
        "mixtral": SHAPE | {"num_local_experts": 4},
        "gpt_neox": {k: v for k, v in MULTIHEAD.items() if k != "head_dim"},
        "gemma3_text": SHAPE | {"sliding_window": 5, "sliding_window_pattern": 2},
    }
    (directory / "config.json").write_text(
        json.dumps({"model_type": kind} | fields[kind] | changes)
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(("llama", each) for each in ROPES.values()),
        *(("gpt_neox", each) for each in (ROPES | NEOX_ROPES).values()),
        *(("mixtral", ROPES[name]) for name in ("nothing", "empty", "the recipe for YaRN")),
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(kind, changes, tmp_path):
    write_rope(tmp_path, kind, changes)
    ((wanted, scale),) = frequencies(tmp_path, kind)
    found, factor = rope_frequencies(read_config(tmp_path)[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert factor == pytest.approx(scale, rel=1e-6)


FULL, LOCAL = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {}},
        {"rope_theta": 7e4, "rope_local_base_freq": 3e4},
        {"rope_scaling": LINEAR_OLD, "rope_theta": 7e4},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
        {"rope_parameters": {"full_attention": FULL}, "rope_local_base_freq": 3e4},
        {"rope_parameters": {"sliding_attention": LOCAL | {"rope_theta": 3e4}}, "rope_theta": 7e4},
        {"rope_parameters": {"full_attention": FULL}, "rope_scaling": LINEAR_OLD},
        {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_gemma3s_two_kinds_of_rope_are_read_as_transformers_reads_them(changes, tmp_path):
    write_rope(tmp_path, "gemma3_text", changes)
    config = read_config(tmp_path)[1]
    for windowed, (wanted, scale) in enumerate(frequencies(tmp_path, "gemma3")):
        found, factor = rope_frequencies(config, windowed=bool(windowed))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert factor == pytest.approx(scale, rel=1e-6)
