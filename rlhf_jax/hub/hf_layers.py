"""Parts of a config.json in both directions: a key, RoPE, and which layers have a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.hub.config_reader import ConfigReader, Json, Kind
from rlhf_jax.models.config import ModelConfig

NEEDED: Any = object()


@dataclass(frozen=True)
class Key:
    """A field of ours and the key of a config.json that says the same.

    Attributes:
      ours: the field of `ModelConfig`.
      theirs: the key that is written; "" where none is.
      kind: int, float, bool, or {their value: ours}; of two that are one here the first is written.
      absent: the value where the key is absent, in their words; NEEDED: it must be there.
      null: our value where theirs is null or absent, or a function of the fields read before.
      reads: the keys that are read, the first that is not null counts; None: the one that is
        written. `absent` is for the last of them.
      above_zero: whether theirs must be.
      to_ours, to_theirs: functions from one to the other, where the numbers differ.
    """

    ours: str
    theirs: str
    kind: Kind = int
    absent: Any = NEEDED
    null: Any = NEEDED
    reads: tuple[str, ...] | None = None
    above_zero: bool = False
    to_ours: Callable[[Any], Any] | None = None
    to_theirs: Callable[[ModelConfig], Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that are read."""
        return (self.theirs,) if self.reads is None else self.reads

    def read(self, reader: ConfigReader, fields: Json) -> Any:
        """Our value; `fields` are those read before."""
        values = {name: reader.get(name) for name in self.names}
        name = next((n for n, value in values.items() if value is not None), self.names[-1])
        if values[name] is None and self.null is not NEEDED:
            return self.null(fields) if callable(self.null) else self.null
        value = reader.typed(name, self.kind)
        if self.above_zero and value <= 0:
            raise reader.refused(f"{name} = {value} must be above 0")
        return value if self.to_ours is None else self.to_ours(value)

    def write(self, config: ModelConfig) -> Any:
        """Their value; KeyError where they have none."""
        if self.to_theirs is not None:
            return self.to_theirs(config)
        value = getattr(config, self.ours)
        if isinstance(self.kind, type):
            return value
        return {ours: theirs for theirs, ours in reversed(self.kind.items())}[value]


def read_keys(keys: Sequence[Key], reader: ConfigReader, fields: Json) -> Json:
    """`fields`, with those that the keys give in the reader's object."""
    for key in keys:
        if key.names:
            fields = fields | {key.ours: key.read(reader, fields)}
    return fields


def write_keys(keys: Sequence[Key], config: ModelConfig) -> Json:
    """A config in the words of the keys; KeyError where they have none."""
    return {key.theirs: key.write(config) for key in keys if key.theirs}


_FACTOR = Key("rope_factor", "factor", float, to_theirs=lambda c: float(c.rope_factor))
# The keys of each kind of scaling, without that of the original length.
_SCALINGS: dict[str, tuple[Key, ...]] = {
    "linear": (_FACTOR,),
    "llama3": (
        _FACTOR,
        Key("rope_low", "low_freq_factor", float),
        Key("rope_high", "high_freq_factor", float),
    ),
    "yarn": (
        _FACTOR,
        Key("rope_low", "beta_slow", float, null=1.0),
        Key("rope_high", "beta_fast", float, null=32.0),
        Key("rope_attention_factor", "attention_factor", float, null=None),
    ),
}
_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "llama3")}
_LENGTH, _SHARE = "original_max_position_embeddings", "partial_rotary_factor"


@dataclass(frozen=True)
class Rope:
    """RoPE, in transformers 5's layout and beside it in that of 4.x and most other readers.

    Attributes:
      theta: the older key of θ.
    """

    theta: str = "rope_theta"

    def read(self, reader: ConfigReader, fields: Json) -> Json:
        """RoPE's fields as transformers 5 reads them.

        `rope_scaling`, unless it is empty, stands for all of `rope_parameters`: what only the
        latter says does not count. Where the one that counts has no θ it is that of `theta`.
        """
        table, parameters = reader.table("rope_scaling"), reader.table("rope_parameters")
        table = table if len(table) else parameters
        if "full_attention" in table or "sliding_attention" in table:
            raise table.refused("its kinds of layers cannot differ in a model of this type")
        holder, key = (table, "rope_theta") if "rope_theta" in table else (reader, self.theta)
        theta = holder.typed(key, float)
        if "rope_theta" in parameters and (other := parameters.typed("rope_theta", float)) != theta:
            reader.say(
                "rope_scaling takes the place of rope_parameters: rope_theta is "
                f"{theta}, not {other}"
            )
        reader.get(self.theta)
        scaling = _read_scaling(reader, table, fields)
        for each in (table, reader) if scaling and "rotary_fraction" not in fields else ():
            if _SHARE in each and each.typed(_SHARE, float) != 1:
                raise each.refused(f"{_SHARE} is not supported for a model of this type")
        table.finish()
        return {"rope_theta": theta} | scaling

    def write(self, config: ModelConfig) -> Json:
        """Both layouts.

        transformers 5 takes `rope_scaling` before `rope_parameters`, so the two say the same; θ
        stands in the former too, because CTranslate2 looks for it there alone.
        """
        table = _write_scaling(config)
        return {
            "rope_parameters": table,
            "rope_theta": config.rope_theta,
            "rope_scaling": None if config.rope_scaling == "none" else {**table},
        }


class OlmoRope(Rope):
    """OLMo-2's: transformers 4 refuses a linear scaling under any other key."""

    def write(self, config: ModelConfig) -> Json:
        """Both layouts."""
        document = super().write(config)
        if config.rope_scaling == "linear":
            document["rope_scaling"] = {"type": "linear", "factor": float(config.rope_factor)}
        return document


class NeoxRope(Rope):
    """GPT-NeoX's, which rotates a part of a head."""

    def read(self, reader: ConfigReader, fields: Json) -> Json:
        """RoPE's fields, and the part that is rotated."""
        table = reader.table("rope_scaling")
        table = table if len(table) else reader.table("rope_parameters")
        holder, key = (table, _SHARE) if _SHARE in table else (reader, "rotary_pct")
        share = {"rotary_fraction": holder.typed(key, float)}
        for key in ("rope_theta", "rotary_emb_base", "rotary_pct"):  # other names of the same
            reader.get(key)
        return share | super().read(reader, fields | share)

    def write(self, config: ModelConfig) -> Json:
        """Both layouts."""
        document = super().write(config)
        document["rope_parameters"][_SHARE] = config.rotary_fraction
        return document | {
            "rotary_emb_base": config.rope_theta,
            "rotary_pct": config.rotary_fraction,
        }


class GemmaRope(Rope):
    """Gemma 3's: layers with a window have a θ of their own, and no scaling."""

    def read(self, reader: ConfigReader, fields: Json) -> Json:
        """The fields of both kinds of layers."""
        # As in transformers `rope_scaling` changes what layers without a window have.
        ropes, scaling = reader.table("rope_parameters"), reader.table("rope_scaling")
        whole, local = ropes.table("full_attention"), ropes.table("sliding_attention")
        if len(ropes) and "full_attention" not in ropes and "sliding_attention" not in ropes:
            raise ropes.refused("there is neither full_attention nor sliding_attention")
        flat = whole.merged(scaling)
        # Only the length beside the factor counts here.
        length = {_LENGTH: flat.get(_LENGTH, fields["max_length"])}
        changed = reader.changed(rope_parameters=flat, rope_scaling=None, **length)
        whole_fields = super().read(changed, fields)
        if _read_kind(local) != "default":
            raise local.refused("layers with a window must be of type default")
        reader.get("rope_local_base_freq")
        key = "rope_theta" if "rope_theta" in local else "rope_local_base_freq"
        theta = (local if key == "rope_theta" else reader).typed(key, float)
        local.finish()
        ropes.finish()
        return whole_fields | {"rope_local_theta": theta}

    def write(self, config: ModelConfig) -> Json:
        """Both layouts."""
        document = super().write(config)
        theta = config.rope_local_theta or config.rope_theta
        local = {"rope_theta": theta, "rope_type": "default"}
        ropes = {"full_attention": document["rope_parameters"], "sliding_attention": local}
        return document | {"rope_parameters": ropes, "rope_local_base_freq": theta}


def _read_kind(table: ConfigReader) -> str:
    """The kind that `rope_type`, or `type` of old, names."""
    names = [key for key in ("rope_type", "type") if key in table]
    kinds = {table.typed(name, _KINDS) for name in names}
    if len(kinds) > 1:
        raise table.refused("its rope_type and its type differ")
    return kinds.pop() if kinds else "default"


def _read_scaling(reader: ConfigReader, table: ConfigReader, fields: Json) -> Json:
    """The fields that say how frequencies are divided; none where they are not."""
    kind = _read_kind(table)
    if kind == "default":
        return {}
    if kind == "dynamic":  # NTK by length begins only beyond the trained one
        table.typed("factor", float)
        reader.say(f"dynamic RoPE: exact up to {fields['max_length']} tokens")
        return {}
    scaled = {"rope_scaling": kind} | read_keys(_SCALINGS[kind], table, {})
    if kind == "linear":
        return scaled
    holder = next((each for each in (reader, table) if _LENGTH in each), None)
    stated = fields["max_length"] if holder is None else holder.typed(_LENGTH, int)
    table.get(_LENGTH)
    if kind == "yarn":
        if "truncate" in table and not table.typed("truncate", bool):
            raise table.refused("YaRN's truncate = false is not supported")
        scales = [Key("", name, float, null=None) for name in ("mscale", "mscale_all_dim")]
        one, all_dims = (key.read(table, {}) for key in scales)
        if scaled["rope_attention_factor"] is None and one and all_dims:
            growth = 0.1 * math.log(max(scaled["rope_factor"], 1))
            scaled["rope_attention_factor"] = (one * growth + 1) / (all_dims * growth + 1)
    return scaled | {"rope_original_length": stated}


def _write_scaling(config: ModelConfig) -> Json:
    """A table of θ and how frequencies are divided."""
    if config.rope_scaling == "none":
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    table: Json = {"rope_theta": config.rope_theta, "rope_type": config.rope_scaling}
    table |= write_keys(_SCALINGS[config.rope_scaling], config)
    if table.get("attention_factor", 0) is None:
        del table["attention_factor"]
    if config.rope_scaling != "linear":
        table[_LENGTH] = config.rope_original_length
    return table


@dataclass(frozen=True)
class Windows:
    """How a family says which layers see only a window.

    Attributes:
      flag: `use_sliding_window` says whether any does.
      types: `layer_types` names each layer's kind; else all have the window or none.
      told: whether `layer_types` is read; transformers computes mixtures without it.
      every: without `layer_types` each such layer sees everything; 0: none does.
      pattern: `sliding_window_pattern` may say otherwise.
    """

    flag: bool = False
    types: bool = False
    told: bool = True
    every: int = 0
    pattern: bool = False

    def read(self, reader: ConfigReader, fields: Json) -> Json:
        """The window and the pattern of layers that have it, if any has."""
        window = reader.get("sliding_window")
        types = reader.get("layer_types") if self.told else None
        if self.flag and not reader.typed("use_sliding_window", bool):
            return {}
        if self.flag and self.types and types is None:
            raise reader.refused("use_sliding_window without layer_types is not supported")
        every = self.every
        for key in ("sliding_window_pattern", "_sliding_window_pattern") if self.pattern else ():
            if reader.get(key) is not None:
                every = reader.typed(key, int)
        if window is None:
            return {}
        if types is None:
            pattern = "w" * (every - 1) + "g" if every else "w"
        else:
            pattern = _find_period(_read_letters(reader, types, fields["layers"]))
        return {"sliding_window": reader.typed("sliding_window", int), "window_pattern": pattern}

    def write(self, config: ModelConfig) -> Json:
        """The keys that say it."""
        windowed = config.windowed
        document: Json = {"use_sliding_window": any(windowed)} if self.flag else {}
        if not self.types:
            return document | {"sliding_window": config.sliding_window if all(windowed) else None}
        names = ["sliding_attention" if each else "full_attention" for each in windowed]
        document |= {"sliding_window": config.sliding_window, "layer_types": names}
        every = len(config.window_pattern)
        if self.pattern and config.window_pattern == "w" * (every - 1) + "g":
            document["sliding_window_pattern"] = every  # for readers without layer_types
        return document


def _read_letters(reader: ConfigReader, types: Any, layers: int) -> str:
    letters = {"sliding_attention": "w", "full_attention": "g"}
    known = isinstance(types, list) and all(isinstance(t, str) and t in letters for t in types)
    if not known or len(types) != layers:
        raise reader.refused(
            f"layer_types must be {layers} times sliding_attention or full_attention"
        )
    return "".join(letters[each] for each in types)


def _find_period(letters: str) -> str:
    """The shortest beginning that, repeated, gives the letters."""
    for size in range(1, len(letters) + 1):
        unit = letters[:size]
        if (unit * len(letters))[: len(letters)] == letters:
            return unit
    return letters
