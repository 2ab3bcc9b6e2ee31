"""A constitution: the principles that answers are judged, criticised and revised by, as JSON.

Constitutional AI: Harmlessness from AI Feedback (Bai et al., 2022), https://arxiv.org/abs/2212.08073
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import read_object
from rlhf_jax.stages.experiments import CONSTITUTION

DEFAULT = CONSTITUTION
"""The constitution that comes with the package; its principles fit the town."""


@dataclass(frozen=True)
class Principle:
    """One principle, and what a model is asked under it.

    Attributes:
      name: it stands for the principle on the command line and in tables.
      question: which of two answers is to be preferred, as a judge is asked.
      critique: asks a model what is wrong with its own answer.
      revision: asks it then for a better one.
      gold: the component of the exact verifier's verdict that the principle stands for, or "total";
        "" where no verifier knows it.
    """

    name: str
    question: str
    critique: str
    revision: str
    gold: str = ""


_FIELDS = tuple(each.name for each in fields(Principle))


def read_constitution(path: Path) -> list[Principle]:
    """The principles of a file {"principles": [{"name", "question", …}, …]}, one at least.

    Raises:
        UserError: it is no such file; the line names the principle and the field.
    """
    document = read_object(path)
    listed = document.get("principles")
    if document.keys() != {"principles"} or not isinstance(listed, list) or not listed:
        raise UserError(f'{path}: expected {{"principles": […]}}, a list of one at least')
    principles = [_make(f"{path}: principles[{i}]", each) for i, each in enumerate(listed)]
    names = [each.name for each in principles]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two principles are named {name!r}")
    return principles


def _make(where: str, given: Any) -> Principle:
    if not isinstance(given, dict):
        raise UserError(f"{where} is no object with the fields {', '.join(_FIELDS)}")
    for name, value in given.items():
        if name not in _FIELDS:
            near = nearest(name, _FIELDS)
            raise UserError(f"{where} has an unknown field {name!r}; did you mean {near!r}?")
        if not isinstance(value, str) or not (value.strip() or name == "gold"):
            raise UserError(f"{where}: field {name!r} must be a text that says something")
    if missing := [name for name in _FIELDS if name not in given and name != "gold"]:
        raise UserError(f"{where} lacks the field {missing[0]!r}")
    return Principle(**given)


def choose(principles: Sequence[Principle], names: str) -> list[Principle]:
    """The principles that "a,b" names, in that order; all of them for "".

    Raises:
        UserError: there is none of a name.
    """
    by_name = {each.name: each for each in principles}
    wanted = [part.strip() for part in names.split(",")] if names else [*by_name]
    for name in wanted:
        if name not in by_name:
            near = nearest(name, by_name)
            raise UserError(f"--principles: there is no {name!r}; did you mean {near!r}?")
    return [by_name[name] for name in dict.fromkeys(wanted)]
