"""config.json of Hugging Face models ↔ ModelConfig.

Llama, Mistral, Mixtral, Qwen2 and 2.5, Qwen3 and its MoE, Gemma 1 to 3 (text), OLMo-2, GPT-2,
GPT-NeoX (Pythia). What changes what a model computes is read or refused; a key that is not known
is named aloud.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object
from rlhf_jax.hub.config_reader import ConfigReader, Json
from rlhf_jax.hub.families import FAMILIES, Family
from rlhf_jax.hub.hf_files import are_equal, read_headers
from rlhf_jax.models.config import ModelConfig

# Fields with which a config does not compute, or only while it trains.
_FREE = ("init_std", "copy_init", "compute_dtype", "remat", "unroll", "head", "unused")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}


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
    reader = ConfigReader(path, family.completed(document))
    fields = family.read(reader) | {"head": _read_head(path, document)}
    reader.finish(family.only)
    try:
        config = ModelConfig(**fields).validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if config.tied_embeddings and config.head == "lm" and _has_own_head(family, directory):
        head = family.tensor("lm_head")
        reader.say(f"tie_word_embeddings is true, but {head} is another: not tied")
        config = dataclasses.replace(config, tied_embeddings=False)
    return kind, config


def _has_own_head(family: Family, directory: Path) -> bool:
    if not any(directory.glob("*.safetensors")):
        return False  # `read_weights` names what is there instead
    held, head = read_headers(directory), family.tensor("lm_head")
    names = (base + family.tensor("embed") for base in family.bases)
    embedding = next((name for name in names if name in held), None)
    return embedding is not None and head in held and not are_equal(held, embedding, head)


def _read_head(path: Path, document: Json) -> str:
    """ "scalar" for a model with one score, "lm" for a language model."""
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
    computed = _computed(config)
    lacking = {name: value for name, value in computed.items() if value != _DEFAULTS.get(name)}
    for kind, family in FAMILIES.items():
        try:
            document = family.write(config)
            reader = ConfigReader(Path("config.json"), family.completed(document), quiet=True)
            theirs = _computed(ModelConfig(**family.read(reader)).validate())
        except (UserError, KeyError):
            continue
        if lost := {name: value for name, value in computed.items() if theirs[name] != value}:
            lacking = min(lacking, lost, key=len)
            continue
        name = family.causal_name or f"{family.class_name}ForCausalLM"
        if config.head == "scalar":
            name = f"{family.class_name}ForSequenceClassification"
            document |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return kind, {"architectures": [name], "model_type": kind, **document}
    stated = ", ".join(f"{name} = {value!r}" for name, value in lacking.items())
    raise UserError(
        f"no Hugging Face model type computes what this model does, none with {stated}; it can be "
        "used by the commands of this package alone"
    )


def _computed(config: ModelConfig) -> Json:
    """The fields that say what a model computes; None for one that does not count in it."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    del fields["window_pattern"]  # `windowed` says it
    windowed, scaling = config.windowed, config.rope_scaling
    idle = {
        ("rope_factor",): scaling == "none",
        ("rope_low", "rope_high", "rope_original_length"): scaling in ("none", "linear"),
        ("rope_attention_factor",): scaling != "yarn",
        ("rope_theta", "rotary_fraction"): config.position == "learned",
        ("sliding_window", "rope_local_theta"): not any(windowed),
        ("attention_out_bias",): not config.attention_bias,
        ("qk_norm_whole",): not config.qk_norm,
        ("experts_per_token", "expert_renormalize"): not config.experts,
    }
    for names, is_idle in idle.items():
        fields |= dict.fromkeys(names) if is_idle else {}
    scale = config.query_scale or config.head_dim**-0.5
    return fields | {"windowed": windowed, "query_scale": scale}
