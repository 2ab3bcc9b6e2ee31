"""README.md of an exported model: what it is, what it was made from and by which commands."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rlhf_jax
from rlhf_jax.files import SUMMARY_FIELDS, check_fields, read_object
from rlhf_jax.hub.hub_data import PREFIX
from rlhf_jax.tasks.sources import split_sources
from rlhf_jax.training.saved_model import is_hub_directory

_LICENCE = re.compile(r"^(license(?:_name|_link)?):[ \t]*([^\s#\[{].*)$", re.M)
_CONFIG_FIELDS = {"loss": dict, "data": dict}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(workdir: Path, name: str, *, what: str, dtype: str, library: str) -> str:
    """The card of the model in `workdir`, as Markdown under YAML that the Hub reads.

    Nothing is said that no file says: a licence only if the base model's own card names it, a base
    model or data set by its name on the Hub only where it has one.

    Args:
        name: the title.
        what: "language model", "reward model", or an adapter of one.
        dtype: the weights' type.
        library: the one that loads it, "transformers" or "peft".
    """
    lineage = _lineage(workdir)
    task = "text-classification" if "reward" in what else "text-generation"
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": ["rlhf_jax"]}
    lines = [f"A {what} in {dtype}, written by rlhf_jax {rlhf_jax.__version__}."]
    if is_hub_directory(base := lineage[0][0]):
        head |= _licence(base)
        if (hub_id := _hub_id(base)) is not None:
            head["base_model"] = hub_id
        lines.append(f"Base model: {hub_id or base.name}.")
    datasets: list[str] = []
    for _, summary, config in lineage:
        if not (stage := summary.get("stage")):
            continue
        loss, data = config.get("loss") or {}, str((config.get("data") or {}).get("train", ""))
        trained = f"{stage}, {loss['name']}," if loss.get("name") else stage
        lines.append(f"- Trained by {trained}" + (f" on `{data}`" if data else ""))
        if command := summary.get("command"):
            lines.append(textwrap.indent(str(command), " " * 6))
        for source in split_sources(data):
            part = source.removeprefix(PREFIX).partition("@")[0].partition("=")[0]
            match = _HUB_ID.match(part)
            if source.startswith(PREFIX) and match and not Path(part).exists():
                datasets.append(match[0])
    if datasets:
        head["datasets"] = list(dict.fromkeys(datasets))
    written = [f"{key}: {json.dumps(value)}" for key, value in head.items()]  # JSON is YAML
    return "\n".join(["---", *written, "---", "", f"# {name}", "", "\n\n".join(lines), ""])


def _lineage(workdir: Path) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(directory, summary, config) of the models it comes from, oldest first, itself last."""
    lineage: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    path: Path | None = workdir.resolve()
    while path is not None and all(path != other for other, *_ in lineage):
        summary = {} if is_hub_directory(path) else _read(path / "summary.json", SUMMARY_FIELDS)
        config = _read(path / "config.json", _CONFIG_FIELDS) if summary else {}
        lineage.append((path, summary, config))
        parent = (summary.get("parents") or {}).get("policy")
        path = Path(parent) if parent else None
    return lineage[::-1]


def _hub_id(directory: Path) -> str | None:
    """owner/name of a directory in the Hub's cache, models--owner--name/snapshots/…"""
    named = next((p.name for p in directory.parents if p.name.startswith("models--")), "")
    name = named.removeprefix("models--").replace("--", "/", 1)
    return name if _HUB_ID.fullmatch(name) else None


def _licence(directory: Path) -> dict[str, str]:
    """The fields of a model's card that name its licence."""
    try:
        text = (directory / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n")
    stated = parts[1] if text.startswith("---\n") and len(parts) > 2 else ""
    return {key: value.strip().strip("\"'") for key, value in _LICENCE.findall(stated)}


def _read(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file's object, its fields of the right types; empty where there is no file."""
    document = read_object(path) if path.exists() else {}
    check_fields(path, document, fields, required=False)
    return document
