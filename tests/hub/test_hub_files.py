"""Model directories of other makes: older configs, several files, and every mistake named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.errors import UserError, lack_of_memory
from rlhf_jax.hub import hf_files
from rlhf_jax.hub.families import FAMILIES
from rlhf_jax.hub.hf_config import read_config, to_document
from rlhf_jax.hub.hf_files import INDEX
from rlhf_jax.hub.hf_weights import read_weights, write_weights
from rlhf_jax.models import PRESETS, init
from tests.models.hub_shapes import SHAPE

LLAMA = dataclasses.replace(
    PRESETS["8b"], vocab_size=61, layers=2, width=16, heads=4, kv_heads=2, head_dim=4,
    mlp_width=24, max_length=64, compute_dtype="float32", remat="none",
)  # fmt: skip
WINDOWED = {"sliding_window": 5, "window_pattern": "wwwwwg", "layers": 6}
GEMMA3 = dataclasses.replace(
    LLAMA, tied_embeddings=True, norm_plus_one=True, norm_place="around", qk_norm=True,
    activation="geglu", embed_scale=4.0, query_scale=0.5, norm_eps=1e-6, rope_theta=1e6,
    rope_local_theta=1e4, rope_scaling="linear", rope_factor=8.0, **WINDOWED,
)  # fmt: skip
PYTHIA = dataclasses.replace(
    LLAMA, kv_heads=4, norm="layer", norm_bias=True, attention_bias=True, mlp_bias=True,
    parallel=True, activation="gelu", rope_theta=10_000.0, rotary_fraction=0.5,
)  # fmt: skip
YARN = dataclasses.replace(
    LLAMA, rope_scaling="yarn", rope_factor=4.0, rope_original_length=16, rope_high=32.0
)


@pytest.fixture(name="directory")
def _directory(tmp_path):
    write_weights(tmp_path, LLAMA, init(LLAMA, jax.random.key(0)))
    return tmp_path


def change_config(directory, **changes):
    path = directory / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "gone"}))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def read(directory):
    return read_weights(directory, *read_config(directory))


def doubled(text, name, value):
    """JSON of an object in which a name stands once more, escaped, before the others."""
    return "{" + json.dumps(name).replace("o", "\\u006f") + ":" + json.dumps(value) + "," + text[1:]


def double_tensor(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode()
    name, where = next((n, v) for n, v in json.loads(header).items() if "o" in n)
    more = doubled(header, name, where).encode()
    path.write_bytes(len(more).to_bytes(8, "little") + more + data[8 + size :])
    return name


def test_a_tensor_that_a_header_names_twice_is_refused(directory):
    name = double_tensor(directory / "model.safetensors")
    assert name in load_file(directory / "model.safetensors")  # which the library takes
    with pytest.raises(UserError, match=rf"model\.safetensors .*its header names '{name}' twice"):
        read(directory)


def test_a_name_that_stands_twice_is_refused(directory):
    table = doubled('{"model": "model.safetensors"}', "model", "other.safetensors")
    (directory / INDEX).write_text(f'{{"weight_map": {table}}}')
    with pytest.raises(UserError, match="names 'model' twice"):
        read(directory)
    (directory / INDEX).unlink()
    config = directory / "config.json"
    config.write_text(doubled(config.read_text(), "model_type", "llama"))
    with pytest.raises(UserError, match=r"config\.json names 'model_type' twice"):
        read(directory)


@pytest.mark.parametrize("config", [LLAMA, GEMMA3, PYTHIA, YARN])
def test_older_spellings_say_the_same(tmp_path, config):
    kind, document = to_document(config)
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path) == (kind, dataclasses.replace(config, copy_init=False))
    new = document.pop("rope_parameters")
    if kind == "gemma3_text":
        new, local = new["full_attention"], new["sliding_attention"]
        old = {"rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": 6}
        del document["layer_types"]
    elif kind == "gpt_neox":
        old = {"rotary_emb_base": new["rope_theta"], "rotary_pct": new["partial_rotary_factor"]}
    else:
        old = {}
    if new["rope_type"] != "default":
        scaling = {k: v for k, v in new.items() if k not in ("rope_theta", "rope_type")}
        old["rope_scaling"] = scaling | {"type": new["rope_type"]}
    document |= {"rope_theta": new["rope_theta"], "torch_dtype": "bfloat16"} | old
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path) == (kind, dataclasses.replace(config, copy_init=False))


def test_what_no_model_type_computes_is_refused_by_name():
    with pytest.raises(UserError, match=r"no Hugging .* none with short_convolution = 4; it"):
        to_document(dataclasses.replace(LLAMA, short_convolution=4))


@pytest.mark.parametrize(
    "stated, window",
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2"}, None),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096),
    ],
)
def test_a_window_that_is_not_stated_is_that_of_transformers(tmp_path, stated, window):
    layers = {"layer_types": ["sliding_attention"] * SHAPE["num_hidden_layers"]}
    document = SHAPE | stated | {"tie_word_embeddings": False}
    document |= layers if stated["model_type"] == "qwen2" else {}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path)[1].sliding_window == window


def test_what_is_not_used_is_said(directory, capsys):
    change_config(directory, made_by="somebody")
    read(directory)
    assert "not used: made_by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported; supported are llama"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "run code of its own"),
        ({"quantization_config": {"bits": 4}}, "has quantised weights"),
        ({"hidden_size": "gone"}, "there is no hidden_size; it should be a whole number"),
        ({"hidden_size": 16.5}, "hidden_size = '16.5' should be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' should be a number"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' should be one of silu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "should be one of"),
        ({"num_key_value_heads": 3}, "heads = 4 is not a multiple of model.kv_heads = 3"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not"),
        ({"num_hidden_layers": 3}, "the first is model.layers.2"),
        ({"num_hidden_layers": 1}, "the first is model.layers.1"),
        ({"intermediate_size": 25}, "has shape"),
        ({"tie_word_embeddings": None}, "there is no tie_word_embeddings"),
    ],
)
def test_a_config_that_cannot_be_followed_is_named(directory, changes, message):
    change_config(directory, **changes)
    with pytest.raises(UserError) as error:
        read(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_gelu_means_the_tanh_one_in_gemma_1_alone(tmp_path, kind):
    """As in transformers, which computes Gemma 2's and 3's "gelu" by erf."""
    name = "hidden_act" if kind == "gemma" else "hidden_activation"
    config = SHAPE | {"model_type": kind, name: "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "gemma":
        assert read_config(tmp_path)[1].activation == "geglu"
        return
    with pytest.raises(UserError, match="hidden_activation = 'gelu' should be one of gelu_pyt"):
        read_config(tmp_path)


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "qwen3_moe"])
def test_mixtures_have_a_window_in_all_layers_whatever_their_types(tmp_path, kind, capsys):
    """transformers reads `layer_types` of Mistral, as Ministral's, and not of these mixtures."""
    types = ["sliding_attention", "full_attention"] * 2
    config = SHAPE | {"model_type": kind, "sliding_window": 5, "layer_types": types}
    mixture = kind != "mistral"
    if mixture:
        config |= {"use_sliding_window": True, "moe_intermediate_size": 24}
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)[1].windowed == (True, mixture, True, mixture)
    assert ("not used: layer_types" in capsys.readouterr().out) == mixture


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"1 tensors are missing, the first is {NORM}"),
        (lambda t: t.update(more=t[NORM]), "the first is more"),
        (lambda t: t.update({NORM: t[NORM][1:]}), "has shape [15], not [16]"),
        (lambda t: t.update({NORM: t[NORM].astype(np.int32)}), "is of I32; weights must be of"),
    ],
)
def test_tensors_that_do_not_fit_are_named(directory, change, message):
    change_tensors(directory, change)
    with pytest.raises(UserError) as error:
        read(directory)
    assert message in str(error.value)


TIED = dataclasses.replace(LLAMA, tied_embeddings=True)
HEADS = {
    "llama": (TIED, "model.embed_tokens.weight", "lm_head.weight"),
    "gpt_neox": (
        dataclasses.replace(PYTHIA, tied_embeddings=True),
        *("gpt_neox.embed_in.weight", "embed_out.weight"),
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_not_the_embedding_is_not_tied_to_it(tmp_path, kind, capsys):
    config, embedding, head = HEADS[kind]
    write_weights(tmp_path, config, init(config, jax.random.key(0)))
    given = load_file(tmp_path / "model.safetensors")[embedding]
    for dtype in (np.float32, np.float64):  # an equal copy may be of any type
        change_tensors(tmp_path, lambda t, d=dtype: t.update({head: given.astype(d)}))
        assert read_config(tmp_path)[1].tied_embeddings and "lm_head" not in read(tmp_path)
    other = given.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(1))
    change_tensors(tmp_path, lambda t: t.update({head: other}))
    (kind_read, found), params = read_config(tmp_path), read(tmp_path)
    assert kind_read == kind and not found.tied_embeddings
    assert f"tie_word_embeddings is true, but {head} is another" in capsys.readouterr().out
    np.testing.assert_array_equal(params["lm_head"]["kernel"], other.T)
    np.testing.assert_array_equal(params["embed"]["embedding"], given)
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", found, params)
    assert not read_config(tmp_path / "out")[1].tied_embeddings
    np.testing.assert_array_equal(read(tmp_path / "out")["lm_head"]["kernel"], other.T)


@pytest.mark.parametrize("name", ["embed_out.weight", "model.layers.0.self_attn.bias"])
def test_no_tensor_of_another_family_is_dropped_unread(tmp_path, name):
    write_weights(tmp_path, TIED, init(TIED, jax.random.key(0)))
    change_tensors(tmp_path, lambda t: t.update({name: t[NORM]}))
    with pytest.raises(UserError, match=f"the first is {name}"):
        read(tmp_path)


def test_files_that_are_wrong_are_named(directory, tmp_path_factory):
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"names b\.safetensors, which is not there"):
        read(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(UserError, match="which is no file beside it"):
        read(directory)
    (directory / "b.safetensors").write_bytes(b"")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(UserError, match="beside an index of other files"):
        read(directory)
    (directory / "b.safetensors").unlink()
    (directory / INDEX).unlink()
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "second.safetensors").write_bytes(whole)
    (directory / "model.safetensors").rename(directory / "first.safetensors")
    with pytest.raises(UserError, match=r"is in first\.safetensors and in second"):
        read(directory)
    (directory / "second.safetensors").unlink()
    (directory / "first.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="is no safetensors file"):
        read(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="is a pickle, which could run code"):
        read(directory)


def test_beside_a_whole_model_other_files_are_left_out_and_named_once(directory, capsys):
    """As Mistral's consolidated.safetensors, and as transformers does."""
    alone = read(directory)
    for name in ("adapter_model", "consolidated"):
        save_file({f"{name}.norm": np.ones(2)}, directory / f"{name}.safetensors")
    capsys.readouterr()
    jax.tree.map(np.testing.assert_array_equal, read(directory), alone)
    said = "model.safetensors is read, adapter_model.safetensors and consolidated.safetensors not"
    assert capsys.readouterr().out.count(said) == 1


def test_a_lack_of_memory_is_not_said_to_be_a_damaged_file(directory, monkeypatch):
    def open_nothing(*_):
        raise SafetensorError("I/O error: Cannot allocate memory (os error 12)")

    monkeypatch.setattr(hf_files, "safe_open", open_nothing)
    with pytest.raises(SafetensorError) as error:
        read(directory)
    assert lack_of_memory(error.value) == "Cannot allocate memory (os error 12)"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    params = init(LLAMA, jax.random.key(0))
    write_weights(tmp_path, LLAMA, params, dtype=dtype)
    found = read(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


LOAD = """
import resource, sys
from pathlib import Path
import jax
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.hub.hf_weights import read_weights

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))
before, directory = peak(), Path(sys.argv[1])
params = jax.block_until_ready(read_weights(directory, *read_config(directory)))
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_a_load_needs_little_more_memory_than_the_parameters(tmp_path):
    """Of a process of its own, above what JAX alone takes: at most target + 1.2 × a file."""
    config = dataclasses.replace(
        PRESETS["1b"], vocab_size=16_000, layers=8, width=512, heads=8, kv_heads=2, head_dim=64,
        mlp_width=2048, compute_dtype="float32",
    )  # fmt: skip
    params = init(config, jax.random.key(0))
    write_weights(tmp_path, config, params, dtype="bfloat16", shard_bytes=60_000_000)
    del params
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 50_000_000 < shard <= 61_000_000
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, target = map(int, result.stdout.split()[-2:])
    assert target > 150_000_000
    assert grown < 1.2 * shard + target


SCALINGS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    | {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25},
}
ROTARY = [kind for kind in FAMILIES if kind != "gpt2"]


def rope_case(kind, scaling, theta=500_000.0):
    """config.json of a family under a scaling, in transformers 5's layout alone."""
    whole = SCALINGS[scaling] | {"rope_theta": theta}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "gpt_neox":
        whole, more = whole | {"partial_rotary_factor": 0.5}, {"num_key_value_heads": 4}
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 20_000.0}
        whole = {"full_attention": whole, "sliding_attention": local}
        more |= {"num_hidden_layers": 6, "sliding_window": 5, "query_pre_attn_scalar": 12}
    if kind == "mistral":  # without a window it is a Llama
        more["sliding_window"] = 7
    if kind == "mixtral":
        more["num_local_experts"] = 4
    if kind == "qwen3_moe":
        more |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    tied = not kind.startswith("gemma")  # the other way than transformers assumes
    return (
        SHAPE
        | more
        | {"model_type": kind, "rope_parameters": whole}
        | {"tie_word_embeddings": tied}
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ROTARY)
def test_both_layouts_of_rope_are_written_and_say_the_same(tmp_path, kind, scaling):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(rope_case(kind, scaling)))
    _, config = read_config(tmp_path)
    written, document = to_document(config)
    assert (written, document["rope_theta"]) == (kind, 500_000.0)
    wanted = None if scaling == "none" else SCALINGS[scaling] | {"rope_theta": 500_000.0}
    if (kind, scaling) == ("olmo2", "linear"):  # the only keys transformers 4 takes there
        wanted = {"type": "linear", "factor": 2.0}
    assert document["rope_scaling"] == wanted
    old = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"}
    for removed in ({"rope_parameters"}, old):
        path.write_text(json.dumps({k: v for k, v in document.items() if k not in removed}))
        assert read_config(tmp_path) == (kind, config)
    if kind == "gemma3_text":
        assert document["rope_local_base_freq"] == 20_000.0
        assert document["sliding_window_pattern"] == 6
    if kind == "gpt_neox":
        assert (document["rotary_emb_base"], document["rotary_pct"]) == (500_000.0, 0.5)


OWN_WAY = ("gemma3_text", "gpt_neox", "olmo2")


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        pytest.param(k, s, marks=() if s == "yarn" or k in OWN_WAY else pytest.mark.slow)
        for k in ROTARY
        for s in SCALINGS
    ],
)
def test_transformers_computes_the_same_from_both_layouts(tmp_path, kind, scaling):
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    torch.manual_seed(0)
    fields = rope_case(kind, scaling)
    if kind in ("gpt_neox", "qwen2", "olmo2", "mistral"):
        del fields["head_dim"]
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields, attn_implementation="eager")
    ).eval()
    made.save_pretrained(tmp_path / "theirs")
    _, config = read_config(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", config, read(tmp_path / "theirs"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        wanted = made(tokens).logits
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager"
        ).eval()
        assert torch.equal(loaded(tokens).logits, wanted)
