"""config.json of Hugging Face models ↔ ModelConfig.

Llama, Mistral, Mixtral, Qwen2 and 2.5, Qwen3 and its MoE, Gemma 1 to 3 (text), OLMo-2, GPT-2,
GPT-NeoX (Pythia). What changes what a model computes is read or refused; a key that is not known
is named aloud.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object
from rlhf_jax.hub.hf_files import headers, same_numbers
from rlhf_jax.models.config import ModelConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How one model type writes its config: `fields` reads it, `document` writes it.

    Attributes:
      class_name: of its causal model in transformers, without "ForCausalLM".
      fields: (reader) → fields of a ModelConfig.
      document: (config) → config.json without what all have.
      defaults: what transformers assumes where a key is absent.
      bases: prefixes its tensors' names may have, the first is what is written.
      embedding, head: names of the tensors that may be tied, that of the embedding after the base.
    """

    class_name: str
    fields: Callable[[_Reader], Json]
    document: Callable[[ModelConfig], Json]
    defaults: Json
    bases: tuple[str, ...] = ("model.",)
    embedding: str = "embed_tokens.weight"
    head: str = "lm_head.weight"


def read_config(directory: Path) -> tuple[str, ModelConfig]:
    """(model type, config) of a Hugging Face directory.

    As in transformers a head in its files that is not the embedding is used, whatever config.json
    says of tying the two.

    Raises:
        UserError: there is no config.json, it wants code of its own (`auto_map`) or quantised
            weights, or a field is missing, of the wrong type or of a kind we do not compute.
    """
    path = directory / "config.json"
    document = read_object(path)
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path}: model_type = {kind!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    for key, why in (
        ("auto_map", "wants to run code of its own, which is never done"),
        ("quantization_config", "has quantised weights; export them in float first"),
    ):
        if document.get(key):
            raise UserError(f"{path}: the model {why} ({key})")
    family = FAMILIES[kind]
    reader = _Reader(path, family.defaults | document)
    fields = family.fields(reader) | {"head": _head(path, document)}
    reader.finish()
    try:
        config = ModelConfig(**fields).validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if config.tied_embeddings and config.head == "lm" and _has_own_head(family, directory):
        reader.say(f"tie_word_embeddings is true, but {family.head} is another: not tied")
        config = dataclasses.replace(config, tied_embeddings=False)
    return kind, config


def _has_own_head(family: Family, directory: Path) -> bool:
    if not any(directory.glob("*.safetensors")):
        return False  # `read_weights` names what is there instead
    held = headers(directory)
    embedding = next(
        (b + family.embedding for b in family.bases if b + family.embedding in held), ""
    )
    return (
        bool(embedding) and family.head in held and not same_numbers(held, embedding, family.head)
    )


def _head(path: Path, document: Json) -> str:
    """That of a model with one score, or a language model's."""
    named = document.get("architectures")
    classifier = "ForSequenceClassification"
    if not isinstance(named, list) or not any(str(name).endswith(classifier) for name in named):
        return "lm"
    labels = document.get("id2label", {"0": "", "1": ""})  # what transformers assumes
    if not isinstance(labels, dict) or len(labels) != 1:
        raise UserError(
            f"{path}: a classifier of {len(labels) if isinstance(labels, dict) else labels!r} "
            "labels; a reward model has one score (num_labels = 1)"
        )
    return "scalar"


def to_document(config: ModelConfig) -> tuple[str, Json]:
    """(model type, config.json) of the first family that can say all of what the config computes.

    Raises:
        UserError: none can.
    """
    wanted = _computed(config)
    for kind, family in FAMILIES.items():
        try:
            document = family.document(config)
            reader = _Reader(Path("config.json"), family.defaults | document, quiet=True)
            if _computed(ModelConfig(**family.fields(reader)).validate()) != wanted:
                continue
        except (UserError, KeyError):
            continue
        task = "ForCausalLM" if config.head == "lm" else "ForSequenceClassification"
        name = {"gpt2": "GPT2LMHeadModel"}.get(kind, family.class_name + task)
        if config.head == "scalar":
            name = family.class_name + task
            document |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return kind, {"architectures": [name], "model_type": kind, **document}
    raise UserError(
        "no Hugging Face model type computes what this model does: "
        f"{ {k: v for k, v in wanted.items() if v != _DEFAULTS.get(k)} }"
    )


# What a config does not compute with, or only while it trains.
_FREE = ("init_std", "copy_init", "compute_dtype", "remat", "unroll", "head", "unused")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}


def _computed(config: ModelConfig) -> Json:
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    if config.rope_scaling == "none":
        for name in ("rope_factor", "rope_low", "rope_high", "rope_original_length"):
            fields[name] = None
    elif config.rope_scaling == "linear":
        for name in ("rope_low", "rope_high", "rope_original_length"):
            fields[name] = None
    if config.rope_scaling != "yarn":
        fields["rope_attention_factor"] = None
    if config.position == "learned":
        fields |= {"rope_theta": None, "rotary_fraction": None}
    fields["windowed"] = config.windowed
    fields["query_scale"] = config.query_scale or config.head_dim**-0.5
    if not any(config.windowed):
        fields |= {"sliding_window": None, "rope_local_theta": None}
    if not config.attention_bias:
        fields["attention_out_bias"] = None
    if not config.qk_norm:
        fields["qk_norm_whole"] = None
    if not config.experts:
        fields |= {"experts_per_token": None, "expert_renormalize": None}
    del fields["window_pattern"]
    return fields


# Keys that say nothing of what the model computes.
_NEUTRAL = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "pretraining_tp"),
    *("_name_or_path", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop"),
    *("attn_pdrop", "summary_type", "summary_use_proj", "summary_activation"),
    *("task_specific_params", "summary_proj_to_labels", "summary_first_dropout"),
    *("reorder_and_upcast_attn", "id2label", "label2id", "cache_implementation"),
    *("is_decoder", "max_window_layers", "auto_map"),
    *("quantization_config", "problem_type", "n_ctx", "output_hidden_states", "output_attentions"),
    *("return_dict", "is_encoder_decoder", "_attn_implementation_autoset", "num_labels"),
    # Of training in transformers; ours has neither the noise nor the balancing loss.
    *("router_jitter_noise", "router_aux_loss_coef", "output_router_logits"),
}  # fmt: skip
# Keys of which we compute one value only, where a family does not ask for them.
_ONLY: Json = {
    "use_bidirectional_attention": (None, False),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "num_experts_per_tok": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "no_rope_layers": (None,),
}


class _Reader:
    """A parsed config.json whose fields are asked for by type; knows which nobody asked for."""

    def __init__(self, path: Path, document: Mapping[str, Any], quiet: bool = False):
        self._path, self._document, self._quiet = path, document, quiet
        self._asked = set(_NEUTRAL)
        self._tables: dict[str, _Reader] = {}

    def get(self, key: str) -> Any:
        self._asked.add(key)
        return self._document.get(key)

    def whole(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def real(self, key: str) -> float:
        return self._number(key, self.get(key))

    def optional(self, key: str) -> float | None:
        value = self.get(key)
        return None if value is None else self._number(key, value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def one_of(self, key: str, choices: Mapping[str, str]) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self._wrong(key, value, f"one of {', '.join(choices)}")
        return choices[value]

    def table(self, key: str) -> _Reader:
        """A nested object, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        if key not in self._tables:
            self._tables[key] = _Reader(Path(f"{self._path}: {key}"), value or {}, self._quiet)
        return self._tables[key]

    def changed(self, **values: Any) -> _Reader:
        """The same with other values; what is asked of it is asked of this one."""
        other = _Reader(self._path, {**self._document, **values}, self._quiet)
        other._asked = self._asked
        return other

    def merged(self, other: _Reader) -> Json:
        """The object, with what `other` says in its place."""
        return {**self._document, **other._document}

    def say(self, what: str) -> None:
        if not self._quiet:
            print(f"{self._path}: {what}", flush=True)

    def refused(self, why: str) -> UserError:
        return UserError(f"{self._path}: {why}")

    def __contains__(self, key: str) -> bool:
        return key in self._document

    def __len__(self) -> int:
        return len(self._document)

    def finish(self) -> None:
        """Says which keys nobody asked for.

        Raises:
            UserError: one of them changes what the model computes.
        """
        for key in sorted(_ONLY.keys() & self._document.keys() - self._asked):
            if (value := self._document[key]) not in _ONLY[key]:
                raise UserError(f"{self._path}: {key} = {value!r:.80} is not supported")
        unknown = sorted(set(self._document) - self._asked - set(_ONLY))
        if unknown:
            self.say(f"not used: {', '.join(unknown)}")

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if not math.isfinite(result):
            raise self._wrong(key, value, "a finite number")
        return result

    def _wrong(self, key: str, value: Any, wanted: str) -> UserError:
        if value is None:
            return UserError(f"{self._path}: there is no {key}; it should be {wanted}")
        return UserError(f"{self._path}: {key} = {str(value)[:80]!r} should be {wanted}")


_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
_SHAPE = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
}


def _gated(reader: _Reader, activation: str | None = None) -> Json:
    """What all families with a gated MLP and RMS norms share."""
    fields: Json = {
        ours: reader.whole(theirs) for ours, theirs in _SHAPE.items() if ours != "kv_heads"
    }
    shared = reader.get("num_key_value_heads")
    fields["kv_heads"] = fields["heads"] if shared is None else reader.whole("num_key_value_heads")
    fields["head_dim"] = _head_dim(reader, fields)
    fields |= {
        "norm_eps": reader.real("rms_norm_eps"),
        "init_std": reader.real("initializer_range"),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
        "activation": activation or reader.one_of("hidden_act", _ACTIVATIONS),
    }
    return fields | _rope(reader, fields)


def _head_dim(reader: _Reader, fields: Json) -> int:
    if reader.get("head_dim") is not None:
        return reader.whole("head_dim")
    if fields["heads"] < 1 or fields["width"] % fields["heads"]:
        raise UserError(
            f"config.json: hidden_size = {fields['width']} does not split over "
            f"num_attention_heads = {fields['heads']}"
        )
    return fields["width"] // fields["heads"]


def _rope(reader: _Reader, fields: Json, theta: str = "rope_theta") -> Json:
    """RoPE's fields as transformers 5 reads them.

    `rope_scaling`, unless it is empty, stands for all of `rope_parameters`: what only the latter
    says does not count. Where the one that counts has no θ it is that of the key `theta`.
    """
    table, parameters = reader.table("rope_scaling"), reader.table("rope_parameters")
    table = table if len(table) else parameters
    if "full_attention" in table or "sliding_attention" in table:
        raise table.refused("its kinds of layers cannot differ in a model of this type")
    stated = table.real("rope_theta") if "rope_theta" in table else reader.real(theta)
    if "rope_theta" in parameters and (other := parameters.real("rope_theta")) != stated:
        reader.say(
            f"rope_scaling takes the place of rope_parameters: rope_theta is {stated}, not {other}"
        )
    reader.get(theta)
    made = {"rope_theta": stated} | _rope_scaling(reader, table, fields)
    share = "partial_rotary_factor"
    for each in (table, reader) if len(made) > 1 and "rotary_fraction" not in fields else ():
        if share in each and each.real(share) != 1:
            raise each.refused(f"{share} is not supported for a model of this type")
    table.finish()
    return made


def _rope_kind(table: _Reader) -> str:
    """What `rope_type`, or `type` of old, says."""
    known = {k: k for k in ("default", "linear", "dynamic", "yarn", "llama3")}
    names = [key for key in ("rope_type", "type") if key in table]
    kinds = {table.one_of(name, known) for name in names}
    if len(kinds) > 1:
        raise table.refused("its rope_type and its type differ")
    return kinds.pop() if kinds else "default"


def _rope_scaling(reader: _Reader, table: _Reader, fields: Json) -> Json:
    """How the table divides frequencies."""
    how = _rope_kind(table)
    if how == "default":
        return {}
    factor = table.real("factor")
    if how == "dynamic":  # NTK by length begins only beyond the trained one
        reader.say(f"dynamic RoPE: exact up to {fields['max_length']} tokens")
        return {}
    made: Json = {"rope_scaling": how, "rope_factor": factor}
    if how == "linear":
        return made
    length = "original_max_position_embeddings"  # that of the top level comes first
    holder = next((each for each in (reader, table) if length in each), None)
    made["rope_original_length"] = fields["max_length"] if holder is None else holder.whole(length)
    table.get(length)
    if how == "llama3":
        low, high = table.real("low_freq_factor"), table.real("high_freq_factor")
        return made | {"rope_low": low, "rope_high": high}
    if "truncate" in table and not table.flag("truncate"):
        raise table.refused("YaRN's truncate = false is not supported")
    slow, fast = table.optional("beta_slow"), table.optional("beta_fast")
    attention = table.optional("attention_factor")
    one, all_dims = table.optional("mscale"), table.optional("mscale_all_dim")
    if attention is None and one and all_dims:
        growth = 0.1 * math.log(max(factor, 1))
        attention = (one * growth + 1) / (all_dims * growth + 1)
    return made | {
        "rope_low": 1.0 if slow is None else slow,
        "rope_high": 32.0 if fast is None else fast,
        "rope_attention_factor": attention,
    }


def _windows(reader: _Reader, layers: int, every: int = 0) -> Json:
    """sliding_window and its pattern; `every`: without layer_types each such layer sees all."""
    window = reader.get("sliding_window")
    types = reader.get("layer_types")
    if window is None:
        return {}
    if types is None:
        pattern = "w" * (every - 1) + "g" if every else "w"
    else:
        letters = {"sliding_attention": "w", "full_attention": "g"}
        known = isinstance(types, list) and all(t in letters for t in types if isinstance(t, str))
        if not known or len(types) != layers or not all(isinstance(t, str) for t in types):
            raise UserError(
                f"config.json: layer_types must be {layers} times sliding_attention or "
                "full_attention"
            )
        pattern = _period("".join(letters[t] for t in types))
    return {"sliding_window": reader.whole("sliding_window"), "window_pattern": pattern}


def _period(letters: str) -> str:
    """The shortest beginning that, repeated, gives the letters."""
    for size in range(1, len(letters) + 1):
        unit = letters[:size]
        if (unit * len(letters))[: len(letters)] == letters:
            return unit
    return letters


def _gated_document(config: ModelConfig) -> Json:
    if config.activation not in _ACTIVATIONS.values() or config.norm != "rms":
        raise UserError("no gated MLP")
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation]
    document: Json = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    document |= {
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": act,
    }
    return document | _rope_layouts(config)


def _rope_layouts(config: ModelConfig) -> Json:
    """RoPE as transformers 5 writes it, and beside it as 4.x and most other readers know it.

    transformers 5 takes `rope_scaling` before `rope_parameters`, so the two say the same; θ stands
    in the former too, because CTranslate2 looks for it there alone.
    """
    return {
        "rope_parameters": _rope_document(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else _rope_document(config),
    }


def _rope_document(config: ModelConfig) -> Json:
    document: Json = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling == "none":
        return document
    document |= {"rope_type": config.rope_scaling, "factor": float(config.rope_factor)}
    if config.rope_scaling != "linear":
        document["original_max_position_embeddings"] = config.rope_original_length
    if config.rope_scaling == "llama3":
        document |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high}
    if config.rope_scaling == "yarn":
        document |= {"beta_slow": config.rope_low, "beta_fast": config.rope_high}
        if config.rope_attention_factor is not None:
            document["attention_factor"] = config.rope_attention_factor
    return document


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if w else "full_attention" for w in config.windowed]


def _llama_fields(reader: _Reader) -> Json:
    biased = {"attention_bias": reader.flag("attention_bias"), "mlp_bias": reader.flag("mlp_bias")}
    return _gated(reader) | biased


def _llama_document(config: ModelConfig) -> Json:
    biased = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return _gated_document(config) | biased


def _mistral_fields(reader: _Reader) -> Json:
    fields = _gated(reader)
    return fields | _windows(reader, fields["layers"])


def _mistral_document(config: ModelConfig) -> Json:
    window = config.sliding_window if all(config.windowed) else None
    return _gated_document(config) | {"sliding_window": window}


def _qwen_fields(reader: _Reader) -> Json:
    fields = _gated(reader)
    if not reader.flag("use_sliding_window"):
        reader.get("sliding_window"), reader.get("layer_types")
        return fields
    if reader.get("layer_types") is None:
        raise UserError("config.json: use_sliding_window without layer_types is not supported")
    return fields | _windows(reader, fields["layers"])


def _qwen_document(config: ModelConfig) -> Json:
    return _gated_document(config) | {
        "use_sliding_window": any(config.windowed),
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _qwen2_fields(reader: _Reader) -> Json:
    return _qwen_fields(reader) | {"attention_bias": True, "attention_out_bias": False}


def _qwen3_fields(reader: _Reader) -> Json:
    return _qwen_fields(reader) | {
        "attention_bias": reader.flag("attention_bias"),
        "qk_norm": True,
    }


def _qwen3_document(config: ModelConfig) -> Json:
    return _qwen_document(config) | {"attention_bias": config.attention_bias}


def _expert_fields(reader: _Reader) -> Json:
    """Of a mixture: transformers 4 and 5 write different keys."""
    key = "num_local_experts" if reader.get("num_experts") is None else "num_experts"
    count = reader.whole(key)
    if count < 1:
        raise UserError(f"config.json: {key} = {count} must be above 0")
    return {"experts": count, "experts_per_token": reader.whole("num_experts_per_tok")}


def _expert_document(config: ModelConfig) -> Json:
    if not config.experts:
        raise UserError("no experts")
    return {"num_experts_per_tok": config.experts_per_token}


def _mixtral_fields(reader: _Reader) -> Json:
    fields = _gated(reader, reader.one_of("hidden_act", {"silu": "swiglu"}))
    return fields | _windows(reader, fields["layers"]) | _expert_fields(reader)


def _mixtral_document(config: ModelConfig) -> Json:
    count = {"num_local_experts": config.experts}
    return _mistral_document(config) | _expert_document(config) | count


def _qwen3_moe_fields(reader: _Reader) -> Json:
    fields = _gated(reader, reader.one_of("hidden_act", {"silu": "swiglu"}))
    if reader.flag("use_sliding_window"):
        fields |= _windows(reader, fields["layers"])
    else:
        reader.get("sliding_window")
    fields |= {
        "mlp_width": reader.whole("moe_intermediate_size"),
        "expert_renormalize": reader.flag("norm_topk_prob"),
        "attention_bias": reader.flag("attention_bias"),
        "qk_norm": True,
    }
    return fields | _expert_fields(reader)


def _qwen3_moe_document(config: ModelConfig) -> Json:
    document = _mistral_document(config) | _expert_document(config)
    return document | {
        "num_experts": config.experts,
        "moe_intermediate_size": config.mlp_width,
        "norm_topk_prob": config.expert_renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": config.attention_bias,
        "use_sliding_window": any(config.windowed),
    }


def _gemma_fields(reader: _Reader) -> Json:
    reader.get("hidden_act")  # "gelu" in the first releases, which meant the tanh one
    named = reader.get("hidden_activation") is not None
    key = "hidden_activation" if named else "hidden_act"
    fields = _gated(reader, reader.one_of(key, {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}))
    return fields | {
        "attention_bias": reader.flag("attention_bias"),
        "norm_plus_one": True,
        "embed_scale": math.sqrt(fields["width"]) if fields["width"] > 0 else 1.0,
    }


def _gemma_document(config: ModelConfig) -> Json:
    return _gated_document(config) | {"attention_bias": config.attention_bias}


def _gemma2_fields(reader: _Reader, every: int = 2) -> Json:
    fields = _gemma_fields(reader)
    scalar = reader.real("query_pre_attn_scalar")
    if scalar <= 0:
        raise UserError(f"config.json: query_pre_attn_scalar = {scalar} must be above 0")
    return (
        fields
        | {
            "norm_place": "around",
            "query_scale": scalar**-0.5,
            "logit_softcap": reader.optional("final_logit_softcapping"),
            "attention_softcap": reader.optional("attn_logit_softcapping"),
        }
        | _windows(reader, fields["layers"], every)
    )


def _gemma2_document(config: ModelConfig) -> Json:
    document = _gated_document(config)
    scale = config.query_scale or config.head_dim**-0.5
    scalar = round(scale**-2, 6)
    return document | {
        "hidden_activation": document.pop("hidden_act"),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _gemma3_fields(reader: _Reader) -> Json:
    every = 6
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if reader.get(key) is not None:
            every = reader.whole(key)
    # Of transformers: `rope_scaling` changes what layers without a window have.
    ropes, scaling = reader.table("rope_parameters"), reader.table("rope_scaling")
    whole, local = ropes.table("full_attention"), ropes.table("sliding_attention")
    if len(ropes) and "full_attention" not in ropes and "sliding_attention" not in ropes:
        raise ropes.refused("there is neither full_attention nor sliding_attention")
    flat = whole.merged(scaling)
    length = "original_max_position_embeddings"  # only that beside the factor counts here
    own = {length: flat.get(length, reader.whole("max_position_embeddings"))}
    changed = reader.changed(rope_parameters=flat, rope_scaling=None, **own)
    fields = _gemma2_fields(changed, every) | {"qk_norm": True}
    if _rope_kind(local) != "default":
        raise local.refused("layers with a window must be of type default")
    named = "rope_theta" in local
    theta = local.real("rope_theta") if named else reader.real("rope_local_base_freq")
    reader.get("rope_local_base_freq")
    local.finish()
    ropes.finish()
    return fields | {"rope_local_theta": theta}


def _gemma3_document(config: ModelConfig) -> Json:
    theta = config.rope_local_theta or config.rope_theta
    local = {"rope_theta": theta, "rope_type": "default"}
    ropes = {"full_attention": _rope_document(config), "sliding_attention": local}
    document = _gemma2_document(config) | {"rope_parameters": ropes, "rope_local_base_freq": theta}
    every = len(config.window_pattern)
    if config.window_pattern == "w" * (every - 1) + "g":  # what readers without layer_types ask for
        document["sliding_window_pattern"] = every
    return document


def _olmo2_fields(reader: _Reader) -> Json:
    return _gated(reader) | {
        "attention_bias": reader.flag("attention_bias"),
        "norm_place": "after",
        "qk_norm": True,
        "qk_norm_whole": True,
    }


def _olmo2_document(config: ModelConfig) -> Json:
    document = _gemma_document(config)
    if config.rope_scaling == "linear":  # transformers 4 refuses OLMo-2's under any other key
        document["rope_scaling"] = {"type": "linear", "factor": float(config.rope_factor)}
    return document


_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_LAYER_NORM = {"norm": "layer", "norm_bias": True, "attention_bias": True, "mlp_bias": True}


def _gpt2_fields(reader: _Reader) -> Json:
    names = (
        *(("vocab_size", "vocab_size"), ("layers", "n_layer"), ("width", "n_embd")),
        *(("heads", "n_head"), ("max_length", "n_positions")),
    )
    fields: Json = {ours: reader.whole(theirs) for ours, theirs in names}
    inner = reader.get("n_inner")
    fields |= {
        "kv_heads": fields["heads"],
        "head_dim": _head_dim(reader, fields),
        "mlp_width": 4 * fields["width"] if inner is None else reader.whole("n_inner"),
        "position": "learned",
        "activation": reader.one_of("activation_function", _GELUS),
        "norm_eps": reader.real("layer_norm_epsilon"),
        "init_std": reader.real("initializer_range"),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
    }
    return fields | _LAYER_NORM


def _gpt2_document(config: ModelConfig) -> Json:
    if config.kv_heads != config.heads or config.head_dim * config.heads != config.width:
        raise UserError("GPT-2 has one width")
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,
        "n_inner": config.mlp_width,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _neox_fields(reader: _Reader) -> Json:
    fields: Json = {o: reader.whole(t) for o, t in _SHAPE.items() if o != "kv_heads"}
    fields |= {
        "kv_heads": fields["heads"],
        "head_dim": _head_dim(reader, fields),
        "activation": reader.one_of("hidden_act", _GELUS),
        "norm_eps": reader.real("layer_norm_eps"),
        "init_std": reader.real("initializer_range"),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
        "parallel": reader.flag("use_parallel_residual"),
    }
    scaling, parameters = reader.table("rope_scaling"), reader.table("rope_parameters")
    counts = scaling if len(scaling) else parameters
    share = "partial_rotary_factor"
    fields["rotary_fraction"] = counts.real(share) if share in counts else reader.real("rotary_pct")
    fields |= _rope(reader, fields, "rotary_emb_base")
    for key in ("rope_theta", "rotary_emb_base", "rotary_pct"):  # other names of the same
        reader.get(key)
    if not reader.flag("attention_bias"):
        raise UserError("config.json: attention_bias = false is not supported for gpt_neox")
    return fields | _LAYER_NORM


def _neox_document(config: ModelConfig) -> Json:
    if config.kv_heads != config.heads or config.head_dim * config.heads != config.width:
        raise UserError("GPT-NeoX has one width")
    document: Json = {theirs: getattr(config, o) for o, theirs in _SHAPE.items() if o != "kv_heads"}
    document |= _rope_layouts(config)
    document["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return document | {
        "hidden_act": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "use_parallel_residual": config.parallel,
        "attention_bias": True,
        "rotary_emb_base": document["rope_theta"],
        "rotary_pct": config.rotary_fraction,
    }


_LLAMA: Json = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
_GEMMA: Json = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "rope_theta": 10_000.0,
}
_MISTRAL = {k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "mlp_bias")}
_QWEN = _MISTRAL | {"use_sliding_window": False}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", _llama_fields, _llama_document, _LLAMA),
    "mistral": Family("Mistral", _mistral_fields, _mistral_document, _MISTRAL),
    "mixtral": Family(
        "Mixtral",
        _mixtral_fields,
        _mixtral_document,
        _MISTRAL
        | {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2": Family("Qwen2", _qwen2_fields, _qwen_document, _QWEN),
    "qwen3": Family("Qwen3", _qwen3_fields, _qwen3_document, _QWEN | {"attention_bias": False}),
    "qwen3_moe": Family(
        "Qwen3Moe",
        _qwen3_moe_fields,
        _qwen3_moe_document,
        _QWEN
        | {
            "attention_bias": False,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "gemma": Family("Gemma", _gemma_fields, _gemma_document, _GEMMA),
    "gemma2": Family(
        "Gemma2",
        _gemma2_fields,
        _gemma2_document,
        _GEMMA
        | {
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
        },
    ),
    "gemma3_text": Family(
        "Gemma3",
        _gemma3_fields,
        _gemma3_document,
        _GEMMA
        | {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "olmo2": Family(
        "Olmo2",
        _olmo2_fields,
        _olmo2_document,
        {k: v for k, v in _LLAMA.items() if k != "mlp_bias"} | {"rms_norm_eps": 1e-5},
    ),
    "gpt2": Family(
        "GPT2",
        _gpt2_fields,
        _gpt2_document,
        {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
        ("transformer.", ""),
        "wte.weight",
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        _neox_fields,
        _neox_document,
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
        },
        ("gpt_neox.",),
        "embed_in.weight",
        "embed_out.weight",
    ),
}
"""By model type, those first that others contain."""
