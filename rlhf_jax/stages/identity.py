"""Identifies a run by all it is made from: its config, the contents of its inputs, parents, code.

`made_from.json` of a run directory holds

    version    of this package
    commit     of this package's checkout, "" where there is none; recorded only
    code       {file of this package: digest} of what the stage uses (see `digests`)
    contents   {"field of the config: file or data set": digest}
    parents    {role: digest of that model's weights, tokenizer and shape}

Two runs are the same if these (but the commit) and their configs are. Versions of libraries and the
device are no part of it: they are kept in summary.json and checkpoints, and said where they differ.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax import __version__
from rlhf_jax.config import Config
from rlhf_jax.digests import ROOT as PACKAGE
from rlhf_jax.digests import code_of, commit, file_digest
from rlhf_jax.hub.hub_data import load_rows
from rlhf_jax.rewards.scorers import parse_rewards
from rlhf_jax.stages.defaults import module_of
from rlhf_jax.stages.experiments import CONSTITUTION
from rlhf_jax.tasks.builders import sources_digest
from rlhf_jax.tasks.sources import parse_source, parse_sources
from rlhf_jax.training.saved_model import fingerprint

# Code that only shows what a run came to.
SHOWING = tuple(f"report/{path.name}" for path in (PACKAGE / "report").glob("*.py"))
_SPLITS = {
    "data.train": "train",
    "data.replay": "train",
    "data.ptx": "train",
    "data.validation": "validation",
    "eval.source": "validation",
}


def made_from(config: Config, parents: Mapping[str, Path]) -> dict[str, Any]:
    """Returns the contents of made_from.json for a prepared config and the parents' directories."""
    return {
        "version": __version__,
        "commit": commit(),
        "code": code_of(module_of(config.stage), without=SHOWING),
        "contents": _contents(config),
        "parents": {role: fingerprint(path) for role, path in parents.items()},
    }


def _contents(config: Config) -> dict[str, str]:
    contents: dict[str, str] = {}
    for field, split in _SPLITS.items():
        section, name = field.split(".")
        spec = getattr(getattr(config, section), name, "")
        for source in parse_sources(spec) if spec else ():
            contents[f"{field}: {source}"] = _source_digest(source, split)
    if config.feedback is not None:
        path = Path(config.feedback.constitution or CONSTITUTION)
        contents[f"feedback.constitution: {config.feedback.constitution}"] = file_digest(path)
    template = getattr(config.data, "chat_template", "")
    if template.endswith(".jinja"):
        contents[f"data.chat_template: {template}"] = file_digest(Path(template))
    scorers = parse_rewards(config.reward.scorers) if config.reward else ()
    own = [("reward.scorers", name) for name in scorers if ".py:" in name]
    for section in ("loss", "advantage"):
        if target := getattr(getattr(config, section), "file", ""):
            own.append((f"{section}.file", target))
    if config.environment is not None:
        named = config.environment.named
        own += [("environment", target) for target in named if ".py:" in target]
    if config.feedback is not None and ".py:" in config.feedback.judge:
        own.append(("feedback.judge", config.feedback.judge))
    for field, target in own:
        if Path(target).resolve().is_relative_to(PACKAGE):  # whose code is recorded as such
            continue
        for file in _with_imports(Path(target.rpartition(":")[0])):
            contents[f"{field}: {file}"] = file_digest(file)
    return {name: digest for name, digest in contents.items() if digest}


def _source_digest(source: str, split: str) -> str:
    """Returns a digest of a whole source, whatever part of it is read; "" if code makes it up."""
    parsed = parse_source(source)
    if parsed.is_file:
        return file_digest(Path(parsed.name))
    if not parsed.is_hub:
        return sources_digest(parsed.name)
    digest = hashlib.sha256()
    for row in load_rows(parsed.name, parsed.split or split):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:12]


def _with_imports(path: Path) -> Iterator[Path]:
    """A user's Python file, and those that it imports from where its process looks for them."""
    folders = [path.parent, path.resolve().parent, Path()]
    folders += map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    pending, seen = [path], set()
    while pending:
        file = pending.pop(0)
        if file.resolve() in seen or not file.is_file():
            continue
        seen.add(file.resolve())
        yield file
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # its reward function's process says so
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            stem, level = getattr(node, "module", None) or "", getattr(node, "level", 0)
            looked = [file.resolve().parents[level - 1]] if level else folders
            for alias in node.names:
                parts = list(filter(None, f"{stem}.{alias.name}".split(".")))
                if not level and parts[0] == PACKAGE.name:  # whose code is recorded as such
                    continue
                for folder, end in itertools.product(looked, range(len(parts))):
                    module = folder.joinpath(*parts[: end + 1])
                    pending += [module.with_name(f"{module.name}.py"), module / "__init__.py"]
