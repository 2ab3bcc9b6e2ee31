"""What a sweep varies: the grid of a command line as cells, each with a name for its directory."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_jax.errors import UserError

_LONGEST = 160  # characters of a cell's name; a directory's may have 255 bytes


@dataclass(frozen=True)
class Cell:
    """A point of the grid: `values` are its fields' texts as a command line has them."""

    name: str
    values: Mapping[str, str]

    @property
    def flags(self) -> list[str]:
        """The flags of `rlhf_jax.main` that set its fields."""
        return [f"--config.{field}={value}" for field, value in self.values.items()]


def parse_grid(text: str, flag: str = "--grid") -> dict[str, list[str]]:
    """{dotted field: values} of "loss.beta=0.05,0.1; loss.name=sigmoid,ipo".

    A value with a comma or semicolon in it stands in double quotes; so does one that is empty.

    Raises:
        UserError: a field without values, named twice, or with the same value twice.
    """
    grid: dict[str, list[str]] = {}
    for part in filter(str.strip, _split(text, ";", flag)):
        field, equals, values = part.partition("=")
        field = field.strip().removeprefix("--").removeprefix("config.")
        texts = [value.strip() for value in _split(values, ",", flag)]
        if not equals or not field or "" in texts:
            raise UserError(f"{flag}: {part.strip()!r} is no field=value,value")
        texts = [value.replace('"', "") for value in texts]
        if field == "seed":
            raise UserError(f"{flag}: seeds are set by --seeds")
        if field in grid or len(set(texts)) < len(texts):
            raise UserError(f"{flag}: {field} is named twice, or has a value twice")
        grid[field] = texts
    return grid


def make_cells(grid: Mapping[str, Sequence[str]]) -> list[Cell]:
    """The cells of a grid, the last field's values varying fastest; one without fields if empty."""
    shorts = short_names(list(grid))
    return [
        Cell(cell_name(shorts, values), values)
        for values in (
            dict(zip(grid, each, strict=True)) for each in itertools.product(*grid.values())
        )
    ]


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, the whole one where that stands for two."""
    lasts = [field.rpartition(".")[2] for field in fields]
    return {
        field: last if lasts.count(last) == 1 else field
        for field, last in zip(fields, lasts, strict=True)
    }


def cell_name(shorts: Mapping[str, str], values: Mapping[str, str]) -> str:
    """A directory's name for what differs, such as "beta=0.05,name=ipo"; "all" for nothing.

    Where characters are replaced or left out, since a file system or a shell would mind them, a
    digest of the whole text follows.
    """
    whole = ",".join(f"{shorts[field]}={value}" for field, value in values.items())
    name = re.sub(r"[^\w.,=+-]", "_", whole)[:_LONGEST]
    if name != whole:
        name += "-" + hashlib.sha256(whole.encode()).hexdigest()[:6]
    return name or "all"


def _split(text: str, separator: str, flag: str) -> list[str]:
    """The parts of a text between separators that are not in double quotes."""
    parts = re.split(rf'{separator}(?=(?:[^"]*"[^"]*")*[^"]*$)', text)
    if text.count('"') % 2:
        raise UserError(f"{flag}: {text.strip()!r} has a quote that does not end")
    return parts
