"""The *.safetensors of a directory: their headers, and whether two tensors are equal."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import UserError, lack_of_memory
from rlhf_jax.files import parse_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS = 1024  # compared at a time


class Header(NamedTuple):
    """The place, shape and type of a tensor, as its file states them."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(directory: Path) -> dict[str, Header]:
    """The headers of all tensors in the directory's files, by name.

    Those are the files of its index, or else `SINGLE` alone, or without one all there are.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in directory.glob(s))
        if pickled:
            raise UserError(
                f"{directory}/{pickled[0]} is a pickle, which could run code when it is read; "
                "convert it to safetensors"
            )
        raise UserError(f"{directory} holds no *.safetensors")
    if (index := directory / INDEX).exists():
        names = sorted(set(_read_index(index).values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise UserError(f"{index} names {absent[0]}, which is not there")
        if names and (directory / SINGLE).exists() and SINGLE not in names:
            raise UserError(
                f"{directory} holds {SINGLE} beside an index of other files: remove the older ones"
            )
        paths = [directory / name for name in names]
    elif (whole := directory / SINGLE) in paths and len(paths) > 1:  # as transformers does
        _say_once(directory, tuple(path.name for path in paths if path != whole))
        paths = [whole]
    held: dict[str, Header] = {}
    for path in paths:
        with open_tensors(path) as file:
            _check_unique(path)
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in held:
                    raise UserError(
                        f"tensor {name} is in {held[name].path.name} and in {path.name}"
                    )
                part = file.get_slice(name)
                held[name] = Header(path, tuple(part.get_shape()), part.get_dtype())
    return held


@functools.cache
def _say_once(directory: Path, others: tuple[str, ...]) -> None:
    """Says which files are left out; headers are read several times."""
    print(f"{directory}: {SINGLE} is read, {' and '.join(others)} not", flush=True)


def _read_index(path: Path) -> dict[str, str]:
    try:
        table = parse_object(path.read_text("utf-8"))["weight_map"]
        if not all(isinstance(v, str) for v in table.values()):
            raise TypeError("a file name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of safetensors ({str(error)[:100]})") from error
    for name in table.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names {name[:80]!r}, which is no file beside it")
    return table


def open_tensors(path: Path) -> Any:
    """A safetensors file to read from; UserError naming it if it is none."""
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError, ValueError) as error:
        if lack_of_memory(error):
            raise
        raise UserError(f"{path} is no safetensors file: {str(error)[:200]}") from error


def _check_unique(path: Path) -> None:
    """Refuses a name that stands twice in the header, of which the library takes the last."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")  # which the library found true
            parse_object(file.read(size))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file: its header {str(error)[:200]}") from error


def are_equal(held: Mapping[str, Header], one: str, other: str) -> bool:
    """Whether two tensors are equal as float32; NaN equals nothing."""
    shape = held[one].shape
    if shape != held[other].shape:
        return False
    with open_tensors(held[one].path) as first, open_tensors(held[other].path) as second:
        slices = first.get_slice(one), second.get_slice(other)
        for start in range(0, shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, shape[0]))
            try:
                a, b = (np.asarray(part[rows], np.float32) for part in slices)
            except (SafetensorError, ValueError, TypeError) as error:
                raise UserError(f"cannot compare {one} and {other}: {str(error)[:200]}") from error
            if not np.array_equal(a, b):
                return False
    return True
