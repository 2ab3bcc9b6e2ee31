"""Trees of arrays by name: a leaf's name is its path, joined with "/"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"/"-joined path: leaf} in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the regular expressions is found in the name."""
    return any(re.search(pattern, name) for pattern in patterns)
