"""JSON files that hold one object, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_jax.errors import UserError

# What summary.json says of a finished run, see `check_fields`.
SUMMARY_FIELDS = MappingProxyType(
    {
        "stage": str,
        "status": str,
        "config_hash": str,
        "parents": {"role": str},
        "wall_seconds": int | float,
        "metrics": {"name": int | float},
    }
)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
      ValueError: it is something else, or a name stands twice in an object of it, of which readers
        would take one or the other.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is not JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, not a {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: there is no such file, it cannot be read, or `parse_object` refuses it.
    """
    try:
        return parse_object(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error


def check_fields(
    path: Path, value: Mapping[str, Any], fields: Mapping[str, Any], *, required: bool = True
) -> None:
    """Compares what a file holds with what it must.

    Args:
      fields: {name: type}; {name: {…: type}} is an object of any names, its values of that type.
      required: whether every field must be there.

    Raises:
      UserError: a field is missing or of another type.
    """
    for name, kind in fields.items():
        if name not in value and not required:
            continue
        if not _fits(value.get(name), kind):
            what = f"{name} is of another type" if name in value else f"it has no {name}"
            raise UserError(f"{path} is not as this package writes it: {what}")


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, dict):
        return isinstance(value, kind)
    (inner,) = kind.values()
    return isinstance(value, dict) and all(_fits(each, inner) for each in value.values())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {twice[:80]!r} twice")
    return value
