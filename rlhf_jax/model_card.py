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
        what: what it is: "language model", "reward model", or an adapter of one.
        dtype: of its weights.
        library: that loads it: "transformers" or "peft".
    """
    made = _lineage(workdir)
    base = made.pop(0)[0] if is_hub_directory(made[0][0]) else None
    task = "text-classification" if "reward" in what else "text-generation"
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": ["rlhf_jax"]}
    lines = [f"A {what} in {dtype}, written by rlhf_jax {rlhf_jax.__version__}."]
    if base is not None:
        head |= _licence(base)
        if (known := _hub_id(base)) is not None:
            head["base_model"] = known
        lines.append(f"Base model: {known or base.name}.")
    hub_data = []
    for _, summary, config in made:
        if not (stage := summary.get("stage")):
            continue
        loss, data = config.get("loss") or {}, str((config.get("data") or {}).get("train", ""))
        shown = f"{stage}, {loss['name']}," if loss.get("name") else stage
        lines.append(f"- Trained by {shown}" + (f" on `{data}`" if data else ""))
        if command := summary.get("command"):
            lines.append(textwrap.indent(str(command), " " * 6))
        for source in data.split(","):
            part = source.strip().removeprefix(PREFIX).partition("@")[0].partition("=")[0]
            found = _HUB_ID.match(part)
            if source.strip().startswith(PREFIX) and found and not Path(part).exists():
                hub_data.append(found[0])
    if hub_data:
        head["datasets"] = list(dict.fromkeys(hub_data))
    written = [f"{key}: {json.dumps(value)}" for key, value in head.items()]  # JSON is YAML
    return "\n".join(["---", *written, "---", "", f"# {name}", "", "\n\n".join(lines), ""])


def _lineage(workdir: Path) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(directory, summary, config) of the models it comes from, oldest first, itself last."""
    found: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    path: Path | None = workdir.resolve()
    while path is not None and all(path != other for other, *_ in found):
        summary = {} if is_hub_directory(path) else _object(path / "summary.json", SUMMARY_FIELDS)
        config = _object(path / "config.json", _CONFIG_FIELDS) if summary else {}
        found.append((path, summary, config))
        parent = (summary.get("parents") or {}).get("policy")
        path = Path(parent) if parent else None
    return found[::-1]


def _hub_id(directory: Path) -> str | None:
    """owner/name of a directory in the Hub's cache, models--owner--name/snapshots/…"""
    named = next((p.name for p in directory.parents if p.name.startswith("models--")), "")
    found = named.removeprefix("models--").replace("--", "/", 1)
    return found if _HUB_ID.fullmatch(found) else None


def _licence(directory: Path) -> dict[str, str]:
    """What a model's card says of its licence."""
    try:
        text = (directory / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n")
    stated = parts[1] if text.startswith("---\n") and len(parts) > 2 else ""
    return {key: value.strip().strip("\"'") for key, value in _LICENCE.findall(stated)}


def _object(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of the fields; empty where there is no file."""
    document = read_object(path) if path.exists() else {}
    check_fields(path, document, fields, required=False)
    return document
