"""The model types of transformers that we compute: one table per family, read in both directions.

Each says which key of config.json is which field of ours, and which module of theirs is which of
our parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.hub.config_reader import ConfigReader, Json
from rlhf_jax.hub.hf_layers import (
    NEEDED,
    GemmaRope,
    Key,
    NeoxRope,
    OlmoRope,
    Rope,
    Windows,
    read_keys,
    write_keys,
)
from rlhf_jax.models.config import ModelConfig

Modules = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """How one model type writes its config and names its tensors.

    Attributes:
      class_name: that of its causal model in transformers, without "ForCausalLM".
      keys, parts: what its config.json says.
      modules: their modules, without the base, to ours of the same weights; "{i}" stands for the
        layer, "{e}" for the expert. A tuple is ours side by side in one of theirs.
      fixed: fields of ours that all its models have; values, or functions of the fields read.
      defaults: what transformers assumes where a key of `parts` is absent.
      only: keys of which we compute these values alone; the first is written.
      bases: prefixes that its modules' names may have; the first is written.
      causal_name: of its causal model, where it has another one.
      inputs_first: whether layers' kernels are stored as [inputs, outputs], as ours are.
      per_head: whether a tuple's parts are interleaved: [heads · parts · head_dim, …].
      buffers: ends of the names of masks and tables that older files hold beside the weights.
    """

    class_name: str
    keys: tuple[Key, ...]
    parts: tuple[Rope | Windows, ...]
    modules: Modules
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    bases: tuple[str, ...] = ("model.",)
    causal_name: str = ""
    inputs_first: bool = False
    per_head: bool = False
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def completed(self, document: Mapping[str, Any]) -> Json:
        """A config.json with what transformers assumes of what it does not say."""
        assumed = {k.names[-1]: k.absent for k in self.keys if k.names and k.absent is not NEEDED}
        return {**assumed, **self.defaults, **document}

    def read(self, reader: ConfigReader) -> Json:
        """Fields of a `ModelConfig`, but for its head, from a completed config.json."""
        fields = read_keys(self.keys, reader, {})
        for name, value in self.fixed.items():
            fields[name] = value(fields) if callable(value) else value
        for part in self.parts:
            fields |= part.read(reader, fields)
        return fields

    def write(self, config: ModelConfig) -> Json:
        """A config.json that says what it can of a config; KeyError where it has no word for it."""
        document = write_keys(self.keys, config) | {k: v[0] for k, v in self.only.items()}
        for part in self.parts:
            document |= part.write(config)
        return document

    def tensor(self, module: str) -> str:
        """The name, without a base, of the tensor that holds one of our modules' weights."""
        return next(theirs for theirs, ours in self.modules.items() if ours == module) + ".weight"


def _split_width(fields: Json) -> int:
    if fields["heads"] < 1 or fields["width"] % fields["heads"]:
        raise UserError(
            f"config.json: hidden_size = {fields['width']} does not split over "
            f"num_attention_heads = {fields['heads']}"
        )
    return fields["width"] // fields["heads"]


def _heads(fields: Json) -> int:
    return fields["heads"]


def _embed_scale(fields: Json) -> float:
    return math.sqrt(fields["width"]) if fields["width"] > 0 else 1.0


def _query_scalar(config: ModelConfig) -> float:
    """query_pre_attn_scalar, whole if it can be."""
    scalar = round((config.query_scale or config.head_dim**-0.5) ** -2, 6)
    return int(scalar) if scalar == int(scalar) else scalar


_SILU = {"silu": "swiglu"}
_GATED = _SILU | {"gelu_pytorch_tanh": "geglu"}
_TANH = {"gelu_pytorch_tanh": "geglu"}
_GEMMA1 = _TANH | {"gelu": "geglu"}  # its older files meant the tanh one by "gelu"
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_SHAPE = (
    Key("vocab_size", "vocab_size"),
    Key("layers", "num_hidden_layers"),
    Key("width", "hidden_size"),
    Key("heads", "num_attention_heads"),
    Key("mlp_width", "intermediate_size"),
    Key("max_length", "max_position_embeddings"),
)
_KV_HEADS = Key("kv_heads", "num_key_value_heads", null=_heads)
_SPLIT = Key("head_dim", "", reads=("head_dim",), null=_split_width)
_INIT_STD = Key("init_std", "initializer_range", float, absent=0.02)
_BIASED = Key("attention_bias", "attention_bias", bool, absent=False)


def _tied(tied: bool) -> Key:
    return Key("tied_embeddings", "tie_word_embeddings", bool, absent=tied)


def _gated(
    activation: Key | None = None,
    *,
    eps: float = 1e-6,
    tied: bool = False,
    head_dim: Any = NEEDED,
) -> tuple[Key, ...]:
    """The keys that all families with a gated MLP and RMS norms share."""
    return (
        *(*_SHAPE, _KV_HEADS, Key("head_dim", "head_dim", absent=head_dim, null=_split_width)),
        Key("norm_eps", "rms_norm_eps", float, absent=eps),
        *(_INIT_STD, _tied(tied)),
        activation or Key("activation", "hidden_act", _GATED, absent="silu"),
    )


def _experts(key: str, count: int, each: int) -> tuple[Key, ...]:
    """The keys of a mixture; transformers 4 and 5 write different ones."""
    both = ("num_experts", "num_local_experts")
    return (
        Key("experts", key, absent=count, reads=both, above_zero=True),
        Key("experts_per_token", "num_experts_per_tok", absent=each),
    )


def _caps(logits: Any, attention: Any) -> tuple[Key, ...]:
    """The keys of soft caps, with what transformers assumes of them."""
    return (
        Key("logit_softcap", "final_logit_softcapping", float, absent=logits, null=None),
        Key("attention_softcap", "attn_logit_softcapping", float, absent=attention, null=None),
    )


def _gemma(written: str, activations: dict[str, str]) -> tuple[Key, ...]:
    both, absent = ("hidden_activation", "hidden_act"), "gelu_pytorch_tanh"
    activation = Key("activation", written, activations, absent=absent, reads=both)
    return (*_gated(activation, tied=True, head_dim=256), _BIASED)


_GEMMA2 = (
    *_gemma("hidden_activation", _TANH),
    Key(
        "query_scale",
        "query_pre_attn_scalar",
        float,
        absent=256,
        above_zero=True,
        to_ours=lambda scalar: scalar**-0.5,
        to_theirs=_query_scalar,
    ),
)
_EXPERT_ACTIVATION = Key("activation", "hidden_act", _SILU, absent="silu")

_GEMMA_FIXED = {"norm_plus_one": True, "embed_scale": _embed_scale}
_AROUND = _GEMMA_FIXED | {"norm_place": "around"}
_LAYER_NORM = {"kv_heads": _heads, "norm": "layer", "norm_bias": True} | {
    "attention_bias": True,
    "mlp_bias": True,
}
_THETA = {"rope_theta": 10_000.0}
_WINDOW = {"sliding_window": 4096}
_FLAG = _WINDOW | {"use_sliding_window": False}

_ATTENTION = ("query", "key", "value")
_LLAMA_BODY: dict[str, str] = {
    "embed_tokens": "embed",
    "layers.{i}.input_layernorm": "layers/attention_norm",
    **{f"layers.{{i}}.self_attn.{n[0]}_proj": f"layers/attention/{n}" for n in _ATTENTION},
    "layers.{i}.self_attn.o_proj": "layers/attention/out",
    "layers.{i}.self_attn.q_norm": "layers/attention/query_norm",
    "layers.{i}.self_attn.k_norm": "layers/attention/key_norm",
    "layers.{i}.post_attention_layernorm": "layers/mlp_norm",
    **{f"layers.{{i}}.mlp.{n}_proj": f"layers/mlp/{n}" for n in ("gate", "up", "down")},
    "norm": "final_norm",
    "lm_head": "lm_head",
    "score": "score_head",
}
_AROUND_BODY = _LLAMA_BODY | {
    "layers.{i}.post_attention_layernorm": "layers/attention_post_norm",
    "layers.{i}.pre_feedforward_layernorm": "layers/mlp_norm",
    "layers.{i}.post_feedforward_layernorm": "layers/mlp_post_norm",
}


def _mixture(mlp: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Llama's modules with experts of these names in `mlp`."""
    names = {"gate": gate, "up": up, "down": down}
    return _LLAMA_BODY | {
        f"layers.{{i}}.{mlp}.gate": "layers/mlp/router",
        **{
            f"layers.{{i}}.{mlp}.experts.{{e}}.{theirs}": f"layers/mlp/experts/{ours}"
            for ours, theirs in names.items()
        },
    }


_JOINED = tuple(f"layers/attention/{name}" for name in _ATTENTION)
_GPT2_BODY: Modules = {
    "wte": "embed",
    "wpe": "position_embed",
    "h.{i}.ln_1": "layers/attention_norm",
    "h.{i}.attn.c_attn": _JOINED,
    "h.{i}.ln_2": "layers/mlp_norm",
    "h.{i}.attn.c_proj": "layers/attention/out",
    "h.{i}.mlp.c_fc": "layers/mlp/up",
    "h.{i}.mlp.c_proj": "layers/mlp/down",
    "ln_f": "final_norm",
    "lm_head": "lm_head",
    "score": "score_head",
}
_NEOX_BODY: Modules = {
    "embed_in": "embed",
    "layers.{i}.input_layernorm": "layers/attention_norm",
    "layers.{i}.attention.query_key_value": _JOINED,
    "layers.{i}.attention.dense": "layers/attention/out",
    "layers.{i}.post_attention_layernorm": "layers/mlp_norm",
    "layers.{i}.mlp.dense_h_to_4h": "layers/mlp/up",
    "layers.{i}.mlp.dense_4h_to_h": "layers/mlp/down",
    "final_layer_norm": "final_norm",
    "embed_out": "lm_head",
    "score": "score_head",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        (*_gated(), _BIASED, Key("mlp_bias", "mlp_bias", bool, absent=False)),
        (Rope(),),
        _LLAMA_BODY,
        defaults=_THETA,
    ),
    "mistral": Family(
        "Mistral", _gated(), (Rope(), Windows()), _LLAMA_BODY, defaults=_THETA | _WINDOW
    ),
    "mixtral": Family(
        "Mixtral",
        (*_gated(_EXPERT_ACTIVATION, eps=1e-5), *_experts("num_local_experts", 8, 2)),
        (Rope(), Windows(told=False)),
        _mixture("block_sparse_moe", "w1", "w3", "w2"),
        defaults={"rope_theta": 1_000_000.0},
    ),
    "qwen2": Family(
        "Qwen2",
        _gated(),
        (Rope(), Windows(flag=True, types=True)),
        _LLAMA_BODY,
        fixed={"attention_bias": True, "attention_out_bias": False},
        defaults=_THETA | _FLAG,
    ),
    "qwen3": Family(
        "Qwen3",
        (*_gated(), _BIASED),
        (Rope(), Windows(flag=True, types=True)),
        _LLAMA_BODY,
        fixed={"qk_norm": True},
        defaults=_THETA | _FLAG,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        (
            *_gated(_EXPERT_ACTIVATION),
            Key("mlp_width", "moe_intermediate_size"),
            Key("expert_renormalize", "norm_topk_prob", bool, absent=False),
            _BIASED,
            *_experts("num_experts", 128, 8),
        ),
        (Rope(), Windows(flag=True, told=False)),
        _mixture("mlp", "gate_proj", "up_proj", "down_proj"),
        fixed={"qk_norm": True},
        defaults=_THETA | _FLAG,
        only={"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)},
    ),
    "gemma": Family(
        "Gemma",
        _gemma("hidden_act", _GEMMA1),
        (Rope(),),
        _LLAMA_BODY,
        fixed=_GEMMA_FIXED,
        defaults=_THETA,
    ),
    "gemma2": Family(
        "Gemma2",
        (*_GEMMA2, *_caps(30.0, 50.0)),
        (Rope(), Windows(types=True, every=2)),
        _AROUND_BODY,
        fixed=_AROUND,
        defaults=_THETA | _WINDOW,
    ),
    "gemma3_text": Family(
        "Gemma3",
        (*_GEMMA2, *_caps(None, None)),
        (GemmaRope(), Windows(types=True, every=6, pattern=True)),
        _AROUND_BODY,
        fixed=_AROUND | {"qk_norm": True},
        defaults=_WINDOW | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    ),
    "olmo2": Family(
        "Olmo2",
        (*_gated(eps=1e-5), _BIASED),
        (OlmoRope(),),
        _AROUND_BODY,
        fixed={"norm_place": "after", "qk_norm": True, "qk_norm_whole": True},
        defaults=_THETA,
    ),
    "gpt2": Family(
        "GPT2",
        (
            Key("vocab_size", "vocab_size"),
            Key("layers", "n_layer"),
            Key("width", "n_embd"),
            Key("heads", "n_head"),
            Key("max_length", "n_positions"),
            Key("max_length", "n_ctx", reads=()),
            _SPLIT,
            Key("mlp_width", "n_inner", null=lambda fields: 4 * fields["width"]),
            Key("activation", "activation_function", _GELU, absent="gelu_new"),
            Key("norm_eps", "layer_norm_epsilon", float, absent=1e-5),
            *(_INIT_STD, _tied(True)),
        ),
        (),
        _GPT2_BODY,
        fixed=_LAYER_NORM | {"position": "learned"},
        bases=("transformer.", ""),
        causal_name="GPT2LMHeadModel",
        inputs_first=True,
        buffers=("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        (
            *(*_SHAPE, _SPLIT),
            Key("activation", "hidden_act", _GELU, absent="gelu"),
            Key("norm_eps", "layer_norm_eps", float, absent=1e-5),
            *(_INIT_STD, _tied(False)),
            Key("parallel", "use_parallel_residual", bool, absent=True),
        ),
        (NeoxRope("rotary_emb_base"),),
        _NEOX_BODY,
        fixed=_LAYER_NORM,
        defaults={"rotary_emb_base": 10_000.0, "rotary_pct": 0.25},
        only={"attention_bias": (True,)},
        bases=("gpt_neox.",),
        per_head=True,
        buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
}
"""By model type, those first that others contain."""
