"""Weights of Hugging Face models in *.safetensors ↔ our parameters.

Every header is checked before the first weight is read. Then tensors come one by one and are
written piece by piece into the stacked parameters where they lie: beside the parameters themselves
no more than one tensor is ever in memory.
Nothing is unpickled: *.bin and *.pt files are refused.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.hub.hf_config import FAMILIES, to_document
from rlhf_jax.hub.hf_files import INDEX, Header, headers, opened
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.trees import named_leaves

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FLOATS = ("F32", "BF16", "F16")
PIECE = 2**20  # numbers converted at a time


@dataclass(frozen=True)
class Rule:
    """A Hugging Face tensor and the parameters it holds.

    Attributes:
      theirs: its name, after the base, "{i}" for the layer, "{e}" for the expert.
      ours: "/"-joined paths, those below layers/ stacked over layers, then over experts.
      layout: "same"; "transposed"; "joined": ours side by side on the last axis (GPT-2);
        "interleaved": theirs [heads·3·d, …] holds query, key and value of each head (GPT-NeoX).
      based: whether the family's base stands in front of the name.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "same"
    based: bool = True


def rules(kind: str, config: ModelConfig) -> list[Rule]:
    """Of all tensors that a model of this type and config has."""
    names = {"gpt2": _GPT2, "gpt_neox": _NEOX}.get(kind, _LLAMA | _OWN.get(kind, {}))
    shapes = _shapes(config)
    found = []
    for theirs, (layout, *ours) in names.items():
        present = [name for name in ours if name in shapes]
        if present:
            found.append(Rule(theirs, tuple(ours), layout, theirs not in _UNBASED))
    covered = {name for rule in found for name in rule.ours}
    assert covered == set(shapes), f"{kind}: {covered ^ set(shapes)}"
    return found


_UNBASED = ("lm_head.weight", "embed_out.weight", "score.weight")


def _dense(theirs: str, ours: str, layout: str = "transposed") -> dict[str, tuple[str, ...]]:
    return {
        f"layers.{{i}}.{theirs}.weight": (layout, f"layers/{ours}/kernel"),
        f"layers.{{i}}.{theirs}.bias": ("same", f"layers/{ours}/bias"),
    }


def _norm(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{theirs}.weight": ("same", f"{ours}/scale"),
        f"{theirs}.bias": ("same", f"{ours}/bias"),
    }


_LLAMA: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("same", "embed/embedding"),
    **_norm("layers.{i}.input_layernorm", "layers/attention_norm"),
    **_dense("self_attn.q_proj", "attention/query"),
    **_dense("self_attn.k_proj", "attention/key"),
    **_dense("self_attn.v_proj", "attention/value"),
    **_dense("self_attn.o_proj", "attention/out"),
    **_norm("layers.{i}.self_attn.q_norm", "layers/attention/query_norm"),
    **_norm("layers.{i}.self_attn.k_norm", "layers/attention/key_norm"),
    **_norm("layers.{i}.post_attention_layernorm", "layers/mlp_norm"),
    **_dense("mlp.gate_proj", "mlp/gate"),
    **_dense("mlp.up_proj", "mlp/up"),
    **_dense("mlp.down_proj", "mlp/down"),
    **_norm("norm", "final_norm"),
    "lm_head.weight": ("transposed", "lm_head/kernel"),
    "score.weight": ("transposed", "score_head/kernel"),
}
_AROUND = {
    **_norm("layers.{i}.post_attention_layernorm", "layers/attention_post_norm"),
    **_norm("layers.{i}.pre_feedforward_layernorm", "layers/mlp_norm"),
    **_norm("layers.{i}.post_feedforward_layernorm", "layers/mlp_post_norm"),
}
_OWN = {
    "gemma2": _AROUND,
    "gemma3_text": _AROUND,
    "olmo2": _AROUND,
    "mixtral": {
        **_dense("block_sparse_moe.gate", "mlp/router"),
        **_dense("block_sparse_moe.experts.{e}.w1", "mlp/experts/gate"),
        **_dense("block_sparse_moe.experts.{e}.w3", "mlp/experts/up"),
        **_dense("block_sparse_moe.experts.{e}.w2", "mlp/experts/down"),
    },
    "qwen3_moe": {
        **_dense("mlp.gate", "mlp/router"),
        **_dense("mlp.experts.{e}.gate_proj", "mlp/experts/gate"),
        **_dense("mlp.experts.{e}.up_proj", "mlp/experts/up"),
        **_dense("mlp.experts.{e}.down_proj", "mlp/experts/down"),
    },
}
_QKV = ("attention/query", "attention/key", "attention/value")
_GPT2: dict[str, tuple[str, ...]] = {
    "wte.weight": ("same", "embed/embedding"),
    "wpe.weight": ("same", "position_embed/embedding"),
    **_norm("h.{i}.ln_1", "layers/attention_norm"),
    "h.{i}.attn.c_attn.weight": ("joined", *(f"layers/{n}/kernel" for n in _QKV)),
    "h.{i}.attn.c_attn.bias": ("joined", *(f"layers/{n}/bias" for n in _QKV)),
    **_norm("h.{i}.ln_2", "layers/mlp_norm"),
    **{
        f"h.{{i}}.{theirs}.{a}": ("same", f"layers/{ours}/{b}")
        for theirs, ours in (
            ("attn.c_proj", "attention/out"),
            ("mlp.c_fc", "mlp/up"),
            ("mlp.c_proj", "mlp/down"),
        )
        for a, b in (("weight", "kernel"), ("bias", "bias"))
    },
    **_norm("ln_f", "final_norm"),
    "lm_head.weight": ("transposed", "lm_head/kernel"),
    "score.weight": ("transposed", "score_head/kernel"),
}
_NEOX: dict[str, tuple[str, ...]] = {
    "embed_in.weight": ("same", "embed/embedding"),
    **_norm("layers.{i}.input_layernorm", "layers/attention_norm"),
    "layers.{i}.attention.query_key_value.weight": (
        *("interleaved", *(f"layers/{n}/kernel" for n in _QKV)),
    ),
    "layers.{i}.attention.query_key_value.bias": (
        *("interleaved", *(f"layers/{n}/bias" for n in _QKV)),
    ),
    **_dense("attention.dense", "attention/out"),
    **_norm("layers.{i}.post_attention_layernorm", "layers/mlp_norm"),
    **_dense("mlp.dense_h_to_4h", "mlp/up"),
    **_dense("mlp.dense_4h_to_h", "mlp/down"),
    **_norm("final_layer_norm", "final_norm"),
    "embed_out.weight": ("transposed", "lm_head/kernel"),
    "score.weight": ("transposed", "score_head/kernel"),
}
# Masks and tables that older files hold beside the weights.
_BUFFERS = ("rotary_emb.inv_freq",)
_OWN_BUFFERS = {
    "gpt2": (".attn.bias", ".attn.masked_bias"),
    "gpt_neox": (".attention.bias", ".attention.masked_bias"),
}


def _named(rule: Rule, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Its tensors' names, and where in ours each lies: (), (layer,) or (layer, expert)."""
    counts = {"{i}": config.layers, "{e}": config.experts}
    for place in np.ndindex(*(counts[k] for k in counts if k in rule.theirs)):
        yield rule.theirs.format(**dict(zip("ie", place, strict=False))), place


def _unpack(rule: Rule, head_dim: int, tensor: np.ndarray) -> list[np.ndarray]:
    match rule.layout:
        case "same":
            return [tensor]
        case "transposed":
            return [tensor.T]
        case "joined":
            return np.split(tensor, len(rule.ours), axis=-1)
    split = tensor.reshape(-1, len(rule.ours), head_dim, *tensor.shape[1:])
    parts = [split[:, k].reshape(-1, *tensor.shape[1:]) for k in range(len(rule.ours))]
    return [part.T for part in parts]


def _pack(rule: Rule, heads: int, parts: list[np.ndarray]) -> np.ndarray:
    match rule.layout:
        case "same":
            return parts[0]
        case "transposed":
            return parts[0].T
        case "joined":
            return np.concatenate(parts, axis=-1)
    rest = parts[0].T.shape[1:]
    split = [part.T.reshape(heads, 1, -1, *rest) for part in parts]
    return np.concatenate(split, axis=1).reshape(-1, *rest)


def _packed_shape(rule: Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of their tensor that holds ours of these shapes."""
    match rule.layout:
        case "same":
            return shapes[0]
        case "transposed":
            return shapes[0][::-1]
        case "joined":
            return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return (sum(shape[-1] for shape in shapes), *shapes[0][:-1][::-1])


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by "/"-joined name."""
    made = jax.eval_shape(partial(transformer.init, config), jax.random.key(0))
    return {name: leaf.shape for name, leaf in named_leaves(made).items()}


def read_weights(
    directory: Path,
    kind: str,
    config: ModelConfig,
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> dict[str, Any]:
    """The float32 parameters of a Hugging Face directory.

    Args:
        kind, config: from `hf_config.read_config`.
        sharding: (name, shape) → where a parameter lies; None: on the default device.

    Raises:
        UserError: a file is missing, damaged or not of safetensors; a tensor is missing, unknown,
            in two files, of another shape or not of float32, bfloat16 or float16.
    """
    held = headers(directory)
    _check_size(config, held, directory)
    places = _places(kind, config, held, directory)
    params: dict[str, jax.Array] = {}
    for name, (rule, place, shapes) in places.items():
        for ours in rule.ours:
            if ours not in params:
                where = None if sharding is None else sharding(ours, shapes[ours])
                params[ours] = jnp.zeros(shapes[ours], jnp.float32, device=where)
        for start, piece in _pieces(held[name], name, rule, config):
            parts = _unpack(rule, config.head_dim, piece)
            for ours, part in zip(rule.ours, parts, strict=True):
                value = np.ascontiguousarray(part, np.float32)
                at = np.zeros(value.ndim, np.int32)
                at[-1 if rule.layout in ("transposed", "interleaved") else 0] = start
                at = np.array([*place, *at], np.int32)
                params[ours] = _put(params[ours], value, at)
    return _nested(params)


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, value: jax.Array, at: jax.Array) -> jax.Array:
    value = value.reshape((1,) * (whole.ndim - value.ndim) + value.shape)
    return jax.lax.dynamic_update_slice(whole, value, list(at))


def _pieces(
    header: Header, name: str, rule: Rule, config: ModelConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor in pieces of a few rows, and where each belongs on the axis of ours they lie on."""
    count = header.shape[0]
    share = len(rule.ours) if rule.layout == "interleaved" else 1
    unit = share * config.head_dim if share > 1 else 1
    size = count
    if len(header.shape) > 1:
        size = max(1, PIECE // (math.prod(header.shape[1:]) * unit)) * unit
    with opened(header.path) as file:  # closed after each, which frees the pages it read
        for start in range(0, count, size):
            try:
                piece = file.get_slice(name)[start : min(start + size, count)]
            except (SafetensorError, ValueError, TypeError) as error:
                raise UserError(f"{header.path}: cannot read {name}: {str(error)[:200]}") from error
            yield start // share, piece


class _Place(NamedTuple):
    """Where a tensor goes: (layer, expert) of stacked parameters, or less."""

    rule: Rule
    place: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]


def _check_size(config: ModelConfig, held: Mapping[str, Header], directory: Path) -> None:
    """Refuses a config of more than the files hold before anything of that size is made."""
    numbers = sum(math.prod(header.shape) for header in held.values())
    fields = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width")
    for name in (*fields, *(("max_length",) if config.position == "learned" else ())):
        if getattr(config, name) > numbers:
            raise UserError(
                f"{directory}: config.json asks for {name} = {getattr(config, name)}, but its "
                f"files hold {numbers} numbers in all"
            )
    for what, count in (("layers", config.layers), ("experts", config.layers * config.experts)):
        if count > len(held):
            raise UserError(
                f"{directory}: config.json asks for {count} {what}, its files hold {len(held)} "
                "tensors"
            )


def _places(
    kind: str, config: ModelConfig, held: Mapping[str, Header], directory: Path
) -> dict[str, _Place]:
    """Where each tensor goes, having checked that the files hold just what they must."""
    family, shapes = FAMILIES[kind], _shapes(config)
    bases = [b for b in family.bases if b and any(n.startswith(b) for n in held)]
    base = bases[0] if bases else family.bases[-1]
    found: dict[str, _Place] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in rules(kind, config):
        prefix = base if rule.based else ""
        ours = {name: shapes[name] for name in rule.ours}
        for name, place in _named(rule, config):
            found[prefix + name] = _Place(rule, place, ours)
            each = [shape[len(place) :] for shape in ours.values()]
            wanted[prefix + name] = _packed_shape(rule, each)
    if missing := [name for name in found if name not in held]:
        raise UserError(
            f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    tied = {family.head} & set(held) if config.tied_embeddings else set()
    if tied and config.head == "scalar":
        print(f"{directory}: {family.head} is not used: the model is a classifier", flush=True)
    ignored = _BUFFERS + _OWN_BUFFERS.get(kind, ())
    extra = [n for n in sorted(set(held) - set(found) - tied) if not n.endswith(ignored)]
    if extra:
        raise UserError(
            f"{directory}: {len(extra)} tensors are not of a {kind} model with this config, the "
            f"first is {extra[0]}"
        )
    for name, shape in wanted.items():
        header = held[name]
        if header.shape != shape:
            raise UserError(
                f"{header.path}: {name} has shape {list(header.shape)}, not {list(shape)}"
            )
        if header.dtype not in _FLOATS:
            raise UserError(
                f"{header.path}: {name} is of {header.dtype}; weights must be of "
                f"{', '.join(_FLOATS)}"
            )
    return found


def _nested(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def stored_dtype(directory: Path) -> str:
    """The name in `DTYPES` that a directory's weights are in; "float32" where they differ.

    Raises:
        UserError: as `read_weights` does.
    """
    names = {"BF16": "bfloat16", "F16": "float16"}
    ignored = (*_BUFFERS, *itertools.chain.from_iterable(_OWN_BUFFERS.values()))
    kinds = {h.dtype for name, h in headers(directory).items() if not name.endswith(ignored)}
    return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file that whoever may read the user's other new files may read."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # for the user's own eyes
    path.chmod(mode)


def weights_dtype(name: str) -> Any:
    """NumPy's dtype of a name in `DTYPES`, or UserError."""
    if name not in DTYPES:
        raise UserError(f"dtype = {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def write_weights(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and *.safetensors that transformers loads, in files of `shard_bytes`.

    float32 is exact; the others round to nearest. `extra` stands in config.json too.

    Raises:
        UserError: no model type computes what the config says, or an unknown dtype.
    """
    kept = weights_dtype(dtype)
    kind, document = to_document(config)
    tensors = _tensors(kind, config, params, kept)
    shards: list[dict[str, np.ndarray]] = [{}]
    names: dict[str, int] = {}
    temporary: list[Path] = []
    total = size = 0

    def flush() -> None:
        path = directory / f"shard-{len(temporary)}.tmp"
        save_tensors(shards.pop(), path)
        temporary.append(path)

    for name, tensor in tensors:
        if shards[0] and size + tensor.nbytes > shard_bytes:
            flush()
            shards.append({})
            size = 0
        shards[0][name] = tensor
        names[name] = len(temporary)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    count = len(temporary)
    single = ["model.safetensors"]
    final = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    final = final if count > 1 else single
    for path, name in zip(temporary, final, strict=True):
        path.replace(directory / name)
    if count > 1:
        table = {name: final[k] for name, k in names.items()}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    document |= {"dtype": dtype, **(extra or {})}
    (directory / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def _tensors(
    kind: str, config: ModelConfig, params: Mapping[str, Any], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by its Hugging Face name."""
    flat = named_leaves(params)
    base = FAMILIES[kind].bases[0]
    for rule in rules(kind, config):
        prefix = base if rule.based else ""
        for name, place in _named(rule, config):
            packed = _pack(rule, config.heads, [np.asarray(flat[n][place]) for n in rule.ours])
            yield prefix + name, np.ascontiguousarray(packed).astype(dtype)
