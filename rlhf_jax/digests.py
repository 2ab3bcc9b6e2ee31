"""Digests of what made a result: files, this package's modules, and the package's commit."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent  # of the package


def file_digest(path: Path) -> str:
    """The first 12 hex digits of the SHA-256 of a file's bytes, read again only if it changed."""
    status = path.stat()
    return _file_digest(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def json_digest(document: Any) -> str:
    """The first 12 hex digits of the SHA-256 of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def code_of(module: str, without: Collection[str] = ()) -> dict[str, str]:
    """{file: digest} of a module of this package and of all that it imports from this package.

    Args:
      module: such as "rlhf_jax.stages.sft".
      without: files, relative to the package, that are left out, and what only they import.

    Returns:
      The first 12 hex digits of a SHA-256 by the file's path relative to the package, sorted. It
      is of what Python makes of the file: comments, docstrings and formatting don't count. A TOML
      or Jinja file that a module names, relative to its folder, is part of the code, by its bytes.
    """
    first, code = _file(module), {}
    pending = [] if first is None else [first]
    while pending:
        path = pending.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in code and name not in without:
            code[name], imported = _read(path)
            pending += imported
    return dict(sorted(code.items()))


def code_digest(module: str) -> str:
    """One digest of all of `code_of`."""
    return json_digest(code_of(module))


def commit() -> str:
    """The commit this package is at, "… with changes", or "" where it is in no git checkout."""
    if not _git("ls-files", "--", str(ROOT / "__init__.py")):
        return ""  # a folder that holds it may be somebody else's checkout
    changes = " with changes" if _git("status", "--porcelain", "--", str(ROOT)) else ""
    return _git("rev-parse", "HEAD")[:12] + changes


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _file(module: str) -> Path | None:
    """The file of a module of this package; None for a name that is no module of it."""
    first, *rest = module.split(".")
    if first != ROOT.name:
        return None
    path = ROOT.joinpath(*rest)
    files = (path / "__init__.py", path.with_suffix(".py")) if rest else (ROOT / "__init__.py",)
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _read(path: Path) -> tuple[str, frozenset[Path]]:
    """(digest, files of the package that are imported) of a file of this package."""
    if path.suffix != ".py":
        return file_digest(path), frozenset()
    tree = ast.parse(path.read_text("utf-8"))
    shape = "\n".join(_shape(tree, []))
    imported = set(filter(None, map(_file, set(_imported(tree, path)))))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    names = (str(name) for name in strings if re.fullmatch(r"[\w/]+\.(toml|jinja)", str(name)))
    beside = (path.parent / name for name in names)
    imported.update(file for file in beside if file.is_file())
    return hashlib.sha256(shape.encode()).hexdigest()[:12], frozenset(imported)


def _imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, or names because they run in another process.

    These are named as `python -m` has it, or as a file beside this one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if _file(name) else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
            if re.fullmatch(r"\w+\.py", node.value):
                folder = path.relative_to(ROOT.parent).parent
                yield ".".join((*folder.parts, node.value.removesuffix(".py")))


def _shape(node: ast.AST, parts: list[str]) -> list[str]:
    """Appends a syntax tree's text to `parts`, the same in every version of Python.

    For that, empty fields are left out. So is whether a name is read or set, which its place says.
    """
    parts.append(type(node).__name__)
    for field in node._fields:
        value = getattr(node, field, None)
        if value is None or value == [] or field == "ctx":
            continue
        parts.append(field)
        for each in value if isinstance(value, list) else (value,):
            if not isinstance(each, ast.AST):
                parts.append(repr(each))
            elif not _is_docstring(each):
                _shape(each, parts)
    parts.append(")")
    return parts


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
