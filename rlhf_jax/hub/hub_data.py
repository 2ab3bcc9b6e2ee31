"""Data sets as the optional package `datasets` loads them, from the Hub or from a folder."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

PREFIX = "hf:"


def check_hub_name(name: str) -> None:
    """UserError unless `name` can be one, and `datasets` is installed."""
    _parts(name)
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data: {name!r} needs the package datasets: pip install datasets")


def load_rows(name: str, split: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a split of "hf:name[/config]", "hf:owner/name[/config]" or "hf:folder".

    A folder is one of this machine. `trust_remote_code` is not passed: data sets that are code do
    not load.

    Raises UserError: `datasets` is not installed, or cannot load it.
    """
    check_hub_name(name)
    path, config = _parts(name)
    try:
        rows = importlib.import_module("datasets").load_dataset(path, config, split=split)
    except Exception as error:  # whatever the package meets: no network, no such name or split
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: cannot load {name!r}, split {split!r}: {reason}") from error
    return rows


def _parts(name: str) -> tuple[str, str | None]:
    """(path, config) of a name: with one slash it is owner/name."""
    path = name.removeprefix(PREFIX)
    if path and Path(path).is_dir():
        return path, None
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(
            f"data: {name!r} is no folder here and no name; names look like hf:owner/name, "
            "hf:owner/name/config or hf:name"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
