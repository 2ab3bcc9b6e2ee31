"""summary.json of a finished run, and the report's evaluation.json beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import SUMMARY_FIELDS, check_fields, read_object, write_json
from rlhf_jax.training.rundir import SUMMARY
from rlhf_jax.training.saved_model import fingerprint, is_hub_directory, what_is_there


def read_summary(workdir: Path, *, whole: bool = True) -> dict[str, Any]:
    """summary.json of a finished run, or of a Hugging Face directory what stands for it.

    Raises:
        UserError: it is neither, or its summary.json is damaged, or if `whole` lacks a field.
    """
    if is_hub_directory(workdir):
        return {
            "stage": "hub",
            "status": "done",
            "config_hash": fingerprint(workdir),
            "parents": {},
            "wall_seconds": 0.0,
            "metrics": {},
        }
    path = workdir / SUMMARY
    summary = read_object(path) if path.exists() else {}
    if not summary or summary.get("status", "done") != "done":
        there = what_is_there(workdir)
        raise UserError(f"{workdir} is not the directory of a finished run{there}")
    check_fields(path, summary, SUMMARY_FIELDS, required=whole)
    return summary


def ancestry(workdir: Path) -> list[Path]:
    """The runs a model comes from, oldest first, itself last."""
    parent = read_summary(workdir)["parents"].get("policy")
    return [*(ancestry(Path(parent)) if parent else []), workdir]


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each run of a lineage: its directory's, with the folder above where a later run,
    which keeps it, has the same.
    """
    names: list[str] = []
    for path in reversed(paths):
        parts = path.absolute().parts
        named = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names.insert(0, next(name for name in named if name not in names))
    return names


def write_evaluation(
    run: Path, tables: Sequence[Any] = (), plots: Sequence[Any] = (), **further: Any
) -> None:
    """Writes evaluation.json, which the report draws; `further` are other keys it knows."""
    document = {"tables": list(tables), "plots": list(plots), **further}
    write_json(run / "evaluation.json", document)
