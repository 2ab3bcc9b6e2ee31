"""Weights of Hugging Face models in *.safetensors ↔ our parameters.

Every header is checked before the first weight is read. Then tensors come one by one and are
written piece by piece into the stacked parameters where they lie: beside the parameters themselves
no more than one tensor is ever in memory.
Nothing is unpickled: *.bin and *.pt files are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.hub.families import FAMILIES, Family
from rlhf_jax.hub.hf_config import to_document
from rlhf_jax.hub.hf_files import INDEX, SINGLE, Header, open_tensors, read_headers
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.trees import named_leaves

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PIECE = 2**20  # numbers converted at a time


@dataclass(frozen=True)
class Rule:
    """A Hugging Face tensor and the parameters it holds.

    Attributes:
      theirs: its name, "{i}" for the layer, "{e}" for the expert; without the base if `based`.
      ours: "/"-joined paths, those below layers/ stacked over layers, then over experts; side by
        side on the last axis of ours.
      based: whether the family's base stands in front of the name.
      transposed: whether theirs has the axes of ours in the other order.
      per_head: theirs is [heads · len(ours) · d, …], all of `ours` of each head together.
    """

    theirs: str
    ours: tuple[str, ...]
    based: bool
    transposed: bool
    per_head: bool

    def places(self, config: ModelConfig, base: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Its tensors' names, and where in ours each lies: (), (layer,) or (layer, expert)."""
        counts = {"{i}": config.layers, "{e}": config.experts}
        name = base + self.theirs if self.based else self.theirs
        for place in np.ndindex(*(counts[k] for k in counts if k in name)):
            yield name.format(**dict(zip("ie", place, strict=False))), place

    def unpack(self, tensor: np.ndarray, head_dim: int) -> list[np.ndarray]:
        """Ours in theirs, or in some rows of theirs."""
        parts = [tensor]
        if self.per_head:
            rest = tensor.shape[1:]
            split = tensor.reshape(-1, len(self.ours), head_dim, *rest)
            parts = [split[:, k].reshape(-1, *rest) for k in range(len(self.ours))]
        elif len(self.ours) > 1:
            parts = np.split(tensor, len(self.ours), axis=-1)
        return [part.T for part in parts] if self.transposed else parts

    def pack(self, parts: list[np.ndarray], heads: int) -> np.ndarray:
        """Theirs, made of ours."""
        parts = [part.T for part in parts] if self.transposed else parts
        if not self.per_head:
            return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        rest = parts[0].shape[1:]
        split = [part.reshape(heads, 1, -1, *rest) for part in parts]
        return np.concatenate(split, axis=1).reshape(-1, *rest)

    def packed_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of theirs when ours have these."""
        rest, last = shapes[0][:-1], sum(shape[-1] for shape in shapes)
        return (last, *rest[::-1]) if self.transposed else (*rest, last)


def make_rules(family: Family, config: ModelConfig) -> list[Rule]:
    """Rules of all tensors that a model of this family and config has."""
    shapes = _find_shapes(config)
    rules = []
    for theirs, modules in family.modules.items():
        modules = (modules,) if isinstance(modules, str) else modules
        for name, leaf in _LEAVES:
            ours = tuple(f"{module}/{leaf}" for module in modules)
            if ours[0] in shapes:
                transposed = leaf == "kernel" and not (family.inputs_first and "{i}" in theirs)
                per_head, based = family.per_head and len(ours) > 1, modules[0] not in _HEADS
                rules.append(Rule(f"{theirs}.{name}", ours, based, transposed, per_head))
    covered = {name for rule in rules for name in rule.ours}
    assert covered == set(shapes), f"{family.class_name}: {covered ^ set(shapes)}"
    return rules


_LEAVES = (("weight", "kernel"), ("weight", "scale"), ("weight", "embedding"), ("bias", "bias"))
_HEADS = ("lm_head", "score_head")  # whose names have no base


def _find_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by "/"-joined name."""
    params = jax.eval_shape(partial(transformer.init, config), jax.random.key(0))
    return {name: leaf.shape for name, leaf in named_leaves(params).items()}


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
    held = read_headers(directory)
    _check_size(config, held, directory)
    shapes = _find_shapes(config)
    places = _place_tensors(kind, config, shapes, held, directory)
    params: dict[str, jax.Array] = {}
    for name, (rule, place) in places.items():
        for ours in rule.ours:
            if ours not in params:
                where = None if sharding is None else sharding(ours, shapes[ours])
                params[ours] = jnp.zeros(shapes[ours], jnp.float32, device=where)
        for start, piece in _read_pieces(held[name], name, rule, config.head_dim):
            parts = rule.unpack(piece, config.head_dim)
            for ours, part in zip(rule.ours, parts, strict=True):
                value = np.ascontiguousarray(part, np.float32)
                at = np.zeros(value.ndim, np.int32)
                at[-1 if rule.transposed else 0] = start
                params[ours] = _put(params[ours], value, np.array([*place, *at], np.int32))
    return _nest(params)


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, value: jax.Array, at: jax.Array) -> jax.Array:
    value = value.reshape((1,) * (whole.ndim - value.ndim) + value.shape)
    return jax.lax.dynamic_update_slice(whole, value, list(at))


def _read_pieces(
    header: Header, name: str, rule: Rule, head_dim: int
) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor in pieces of a few rows, and where each belongs on the axis of ours they lie on."""
    count = size = header.shape[0]
    share, unit = (len(rule.ours), len(rule.ours) * head_dim) if rule.per_head else (1, 1)
    if len(header.shape) > 1:
        size = max(1, PIECE // (math.prod(header.shape[1:]) * unit)) * unit
    with open_tensors(header.path) as file:  # closed after each, which frees the pages it read
        for start in range(0, count, size):
            try:
                piece = file.get_slice(name)[start : min(start + size, count)]
            except (SafetensorError, ValueError, TypeError) as error:
                raise UserError(f"{header.path}: cannot read {name}: {str(error)[:200]}") from error
            yield start // share, piece


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


def _place_tensors(
    kind: str,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    held: Mapping[str, Header],
    directory: Path,
) -> dict[str, tuple[Rule, tuple[int, ...]]]:
    """Each tensor's rule and place, having checked that the files hold just what they must."""
    family = FAMILIES[kind]
    bases = [b for b in family.bases if b and any(n.startswith(b) for n in held)]
    base = bases[0] if bases else family.bases[-1]
    places = {
        name: (rule, place)
        for rule in make_rules(family, config)
        for name, place in rule.places(config, base)
    }
    if missing := [name for name in places if name not in held]:
        raise UserError(
            f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    head = family.tensor("lm_head")
    tied = {head} & set(held) if config.tied_embeddings else set()
    if tied and config.head == "scalar":
        print(f"{directory}: {head} is not used: the model is a classifier", flush=True)
    unknown = sorted(set(held) - set(places) - tied)
    if extra := [name for name in unknown if not name.endswith(family.buffers)]:
        raise UserError(
            f"{directory}: {len(extra)} tensors are not of a {kind} model with this config, the "
            f"first is {extra[0]}"
        )
    for name, (rule, place) in places.items():
        header = held[name]
        shape = rule.packed_shape([shapes[ours][len(place) :] for ours in rule.ours])
        if header.shape != shape:
            raise UserError(
                f"{header.path}: {name} has shape {list(header.shape)}, not {list(shape)}"
            )
        if header.dtype not in _FLOATS:
            raise UserError(
                f"{header.path}: {name} is of {header.dtype}; weights must be of "
                f"{', '.join(_FLOATS)}"
            )
    return places


def _nest(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def stored_dtype(directory: Path) -> str:
    """The name in `DTYPES` of a directory's weights; "float32" where they differ.

    Raises:
        UserError: as `read_weights` does.
    """
    ignored = tuple(end for family in FAMILIES.values() for end in family.buffers)
    kinds = {h.dtype for name, h in read_headers(directory).items() if not name.endswith(ignored)}
    return _FLOATS.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


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


def rounded(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor in that dtype, in C's order; UserError if it cannot hold one of the numbers."""
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(tensor).astype(dtype)
    beyond = np.isinf(made) & np.isfinite(tensor)
    if beyond.any():
        raise UserError(
            f"{name} holds {np.abs(tensor[beyond]).max():g}, and {np.dtype(dtype).name} ends at "
            f"{float(ml_dtypes.finfo(dtype).max):g}: write it with --dtype=bfloat16 or float32"
        )
    return made


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
        UserError: no model type computes what the config says, an unknown dtype, or one that
            cannot hold a weight.
    """
    numpy_type = weights_dtype(dtype)
    kind, document = to_document(config)
    temporary: list[Path] = []
    shard_of: dict[str, int] = {}
    size = 0
    tensors = _name_tensors(FAMILIES[kind], config, params, numpy_type)
    try:
        for shard in _split_shards(tensors, shard_bytes):
            path = directory / f"shard-{len(temporary)}.tmp"
            save_tensors(shard, path)
            shard_of |= dict.fromkeys(shard, len(temporary))
            size += sum(tensor.nbytes for tensor in shard.values())
            temporary.append(path)
            shard.clear()  # before the next is made
    except UserError:
        for path in temporary:
            path.unlink()
        raise
    count = len(temporary)
    final = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    final = final if count > 1 else [SINGLE]
    for path, name in zip(temporary, final, strict=True):
        path.replace(directory / name)
    if count > 1:
        table = {name: final[k] for name, k in shard_of.items()}
        index = {"metadata": {"total_size": size}, "weight_map": table}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    document |= {"dtype": dtype, **(extra or {})}
    (directory / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def _split_shards(
    tensors: Iterator[tuple[str, np.ndarray]], most: int
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors in files of at most so many bytes, or of one tensor."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _name_tensors(
    family: Family, config: ModelConfig, params: Mapping[str, Any], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by its Hugging Face name."""
    flat = named_leaves(params)
    for rule in make_rules(family, config):
        for name, place in rule.places(config, family.bases[0]):
            packed = rule.pack([np.asarray(flat[n][place]) for n in rule.ours], config.heads)
            yield name, rounded(name, packed, dtype)
