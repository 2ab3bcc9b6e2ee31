"""Functions of the user's own, "mine.py:cauchy".

Losses and advantages run in this process. Rewards, tools and judges run in a process of their own;
here it is only seen, before anything runs, whether their files have them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax.child import load_module
from rlhf_jax.errors import UserError, mistake_in, nearest

# A file that uses one of these may make names that its text does not bind.
_MAKES_NAMES = {"*", "__getattr__", "exec", "globals", "locals", "setattr", "vars"}


def check_bound(target: str, field: str) -> None:
    """Looks for the function or class "path.py:name" in its file, which is read and not run.

    Raises:
        UserError: there is no such file, or it binds no such name.
    """
    path, _, name = target.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"config: {field} names {target!r}: there is no file {path}")
    try:
        nodes = list(ast.walk(ast.parse(Path(path).read_bytes())))
    except (SyntaxError, ValueError):  # its own process says where
        return
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bound = {node.name for node in nodes if isinstance(node, definitions)}
    imported = (node.asname or node.name for node in nodes if isinstance(node, ast.alias))
    others = {name.partition(".")[0] for name in imported}
    others |= {node.id for node in nodes if isinstance(node, ast.Name)}
    if name not in bound | others and not _MAKES_NAMES & (bound | others):
        near = nearest(name, sorted(bound) or ["none"])
        raise UserError(
            f"config: {field} names {target!r}: {path} has no {name!r}; did you mean {near}?"
        )


@functools.cache
def load_function(target: str, field: str) -> Callable[..., Any]:
    """The function that a field names as "path.py:name"; its file is run once.

    What it raises later is a UserError with the line of that file.

    Raises:
        UserError: there is no such file or function, or the file raises.
    """
    path, _, name = target.rpartition(":")
    if not path:
        raise UserError(f"config: {field} = {target!r} names no function; write mine.py:function")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"config: {field} = {target!r}: there is no file {path}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = load_module(path)
    except Exception as error:
        raise mistake_in(path, error) or error from error
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = [each for each, _ in inspect.getmembers(module, inspect.isfunction)] or ["none"]
        near = nearest(name, functions)
        raise UserError(f"config: {path} has no function {name!r}; did you mean {near}?")

    @functools.wraps(function)
    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:
            raise mistake_in(path, error) or error from error

    return told


def make_variant(target: str, field: str, base: type) -> type:
    """A subclass of the dataclass `base` that calls a function; its options are the class's fields.

    A function (arrays, *, width=1.0) has the option width beside those of `base`, which it is given
    too if it names them. It returns as many values as the first of the arrays has.

    Raises:
        UserError: as `load_function`, or an option has no default.
    """
    function = load_function(target, field)
    _, *options = inspect.signature(function).parameters.values()
    known = {each.name for each in dataclasses.fields(base)}
    added = [each for each in options if each.name not in known]
    for each in added:
        if not isinstance(each.default, bool | int | float | str):
            raise UserError(f"config: {target}: its option {each.name} needs a default, a number")

    def call(self: Any, given: Any) -> Any:
        result = function(given, **{each.name: getattr(self, each.name) for each in options})
        shape = getattr(getattr(result, "values", result), "shape", None)
        if shape != given[0].shape:
            raise UserError(
                f"{target} returned {'no array' if shape is None else f'the shape {shape}'} where "
                f"{given[0].shape} is needed: each value apart, they are averaged later"
            )
        return result

    fields = [(e.name, type(e.default).__name__, e.default) for e in added]
    namespace = {"__call__": call, "__doc__": function.__doc__}
    name = target.rpartition(":")[2]
    return dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True, namespace=namespace)
