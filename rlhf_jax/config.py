"""Options as fields: the ConfigDict of an experiment becomes frozen dataclasses, once.

Each section of a config is a dataclass beside what reads it, whose fields are made by `option`. A
field that is read only under another's value says so with `Only`; the options of a loss are
the fields of the dataclass that its name chooses from a table (`variants`). What a run is recorded
and told apart by is its `document`: all fields that are read, with their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.losses.checks import check_choice, check_within
from rlhf_jax.own_code import make_variant

_TYPES = {"float": float, "int": int, "str": str, "bool": bool}
_LARGEST = 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class Config:
    """A stage's options: its sections, None where the stage has no such section."""

    stage: str
    seed: int = 0
    init: Any = None
    data: Any = None
    model: Any = None
    tokenizer: Any = None
    rollout: Any = None
    environment: Any = None
    reward: Any = None
    kl: Any = None
    lagrange: Any = None
    advantage: Any = None
    loss: Any = None
    critic: Any = None
    batch: Any = None
    optimizer: Any = None
    train: Any = None
    adapter: Any = None
    compute: Any = None
    mesh: Any = None
    normalize: Any = None
    best_of_n: Any = None
    feedback: Any = None
    eval: Any = None
    oracle: Any = None

    @property
    def sections(self) -> dict[str, Any]:
        """The sections the stage has, by name."""
        every = ((each.name, getattr(self, each.name)) for each in dataclasses.fields(self))
        return {name: value for name, value in every if dataclasses.is_dataclass(value)}


@dataclass(frozen=True)
class Only:
    """A condition on another field: that it is set, is `among`, or names a scorer.

    `containing` are the names of scorers of which the field lists one, ".py:" being any function.
    """

    field: str  # of the same section, or "section.field" of another
    among: tuple[Any, ...] = ()
    containing: tuple[str, ...] = ()
    told: str = ""  # the condition as a user would state it; "": as it stands

    def holds(self, config: Config, section: Any) -> bool:
        """Whether the other field has such a value, where the condition is of one of `section`."""
        where, _, name = self.field.rpartition(".")
        value = getattr(getattr(config, where) if where else section, name)
        if self.containing:
            names = [part.partition("=")[0].strip() for part in value.split(",")]
            functions = ".py:" in self.containing
            return any(n in self.containing or (functions and ".py:" in n) for n in names)
        return value in self.among if self.among else bool(value)

    def __str__(self) -> str:
        if self.told or self.containing:
            return self.told or f"{' or '.join(map(repr, self.containing))} in {self.field}"
        return f"{self.field} = {' or '.join(map(str, self.among))}" if self.among else self.field


def option(
    default: Any,
    *,
    least: int | None = None,
    within: str = "",
    choices: Sequence[str] = (),
    only: Only | None = None,
) -> Any:
    """A field of a section.

    Args:
        least: of a whole number.
        within: an interval of a number, as "[0, 1)".
        choices: the texts it may be.
        only: the condition under which it is read.
    """
    metadata = {"least": least, "within": within, "choices": tuple(choices), "only": only}
    return field(default=default, metadata=metadata)


def variants(table: Mapping[str, type], base: type) -> dict[str, Any]:
    """Metadata of a field that holds a dataclass of `table`, chosen by the section's `name`.

    Its options are spelled as fields of the section itself. Where the section's `file` names a
    function of the user's, it is a dataclass that calls it, a subclass of `base`.
    """
    return {"variants": table, "base": base}


def others(prefix: str) -> dict[str, Any]:
    """Metadata of a field that holds a mapping of all further fields that begin with `prefix`."""
    return {"prefix": prefix}


def own_fields(section: Any) -> dict[str, Field]:
    """The fields of a dataclass by name, without those made by `variants` and `others`."""
    special = {"variants", "prefix"}
    return {f.name: f for f in fields(section) if not special & set(f.metadata)}


def field_names(section: type) -> set[str]:
    """All names a config may state in a section, those of every variant's options among them."""
    tables = [f.metadata["variants"] for f in fields(section) if "variants" in f.metadata]
    return set(own_fields(section)).union(
        *(own_fields(part) for table in tables for part in table.values())
    )


def surface(section: type) -> dict[str, Any]:
    """A section's fields with their defaults, to be changed; of no variant's options."""
    return {
        name: config_dict.placeholder(_TYPES[each.type.split(" | ")[0]])
        if each.default is None
        else each.default
        for name, each in own_fields(section).items()
    }


def build(section: type, given: Mapping[str, Any], path: str) -> Any:
    """The dataclass `section` with the values that a config gives under `path`.

    Raises:
        UserError: there is no such field, a value has another type or is outside its range, or is
            an option of another variant than the one that is named.
    """
    own = own_fields(section)
    rest = {name: value for name, value in given.items() if name not in own}
    try:
        values = {
            name: _read_value(f"{path}.{name}", own[name], value)
            for name, value in given.items()
            if name in own
        }
        for each in fields(section):
            if "prefix" in each.metadata:
                values[each.name] = {name: value for name, value in rest.items() if value}
                rest = {}
            elif "variants" in each.metadata:
                name, table = values.get("name", own["name"].default), each.metadata["variants"]
                if file := values.get("file"):
                    made = make_variant(file, f"{path}.file", each.metadata["base"])
                    name, table = file, {file: made}
                _check_variant(name, table, list(rest), path)
                values[each.name] = part = build(table[name], rest, path)
                for name, value in vars(part).items():
                    if isinstance(value, float) and value < 0:
                        raise UserError(f"config: {path}.{name} must be in [0, inf), got {value}")
                rest = {}
        for name in rest:
            near = nearest(name, own)
            raise UserError(f"config: {path} has no field {name}; did you mean {near}?")
        made = section(**values)
        if hasattr(made, "settled"):
            made = made.settled()
        if hasattr(made, "validate"):
            made.validate()
    except ValueError as error:
        prefix = f"{path}." if str(error).split()[0] in own else ""
        raise UserError(f"config: {prefix}{error}") from error
    return made


def _check_variant(name: str, table: Mapping[str, type], options: Sequence[str], path: str) -> None:
    """UserError for a name that is not in the table, or an option that the one of it lacks."""
    if name not in table:
        # A loss has another name in its paper, with which its docstring begins: "DPO: …".
        titled = [
            k for k, kind in table.items() if (kind.__doc__ or "").startswith(f"{name.upper()}:")
        ]
        near = (titled or [nearest(name, table)])[0]
        hint = f"did you mean {near!r}? Known: {', '.join(table)}"
        raise UserError(f"config: {path}.name = {name!r} is unknown; {hint}")
    known = own_fields(table[name])
    for stated in options:
        if stated not in known:
            having = [other for other, kind in table.items() if stated in own_fields(kind)]
            raise UserError(
                f"config: {path}.{stated} is an option of {', '.join(having) or 'none'}; {name!r} "
                f"has no option {stated}, only {', '.join(known) or 'those of all'}"
            )


def _read_value(name: str, each: Field, value: Any) -> Any:
    """A value as the field's annotation has it: whole numbers may stand for others, lists too.

    Raises:
        ValueError: it has another type, or is outside the limits that `option` was given.
    """
    kind, limits = each.type.split(" | ")[0], each.metadata
    if value is None and each.type.endswith("None"):
        return None
    if kind.startswith("tuple"):
        return (value,) if isinstance(value, str) else tuple(value)
    if kind == "float" and type(value) is int:
        value = float(value)
    known = type(value) is _TYPES[kind]
    if not known:
        raise ValueError(f"{name} = {value!r} must be of type {kind}")
    if kind == "float" and not abs(value) <= _LARGEST:
        raise ValueError(f"{name} = {value} is no number that float32 can hold")
    if (least := limits.get("least")) is not None and value < least:
        raise ValueError(f"{name} = {value} must be at least {least}")
    if limits.get("choices"):
        check_choice(name, value, limits["choices"])
    if interval := limits.get("within"):
        check_within(name, value, interval)
    return value


def document(config: Config) -> dict[str, Any]:
    """The config as config.json holds it: every field that is read, as JSON has it."""
    whole: dict[str, Any] = {"stage": config.stage, "seed": config.seed}
    return whole | {name: section_document(config, name) for name in config.sections}


def section_document(config: Config, name: str) -> dict[str, Any]:
    """The fields of a section that are read, as JSON has them, a variant's among them."""
    section = getattr(config, name)
    values: dict[str, Any] = {}
    for each in fields(section):
        value, only = getattr(section, each.name), each.metadata.get("only")
        if "variants" in each.metadata:
            values |= vars(value)
        elif "prefix" in each.metadata:
            values |= value
        elif only is None or only.holds(config, section):
            values[each.name] = list(value) if isinstance(value, tuple) else value
    return values


def unread(config: Config, name: str) -> str | None:
    """A line about the dotted name of a field that other fields' values make meaningless."""
    section, _, last = name.partition(".")
    values = getattr(config, section)
    each = own_fields(values).get(last) if dataclasses.is_dataclass(values) else None
    only = each and each.metadata.get("only")
    if not only or only.holds(config, values):
        return None
    return f"{name} is read only with {'' if '.' in only.field else f'{section}.'}{only}"


def leaves(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            values |= leaves(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
