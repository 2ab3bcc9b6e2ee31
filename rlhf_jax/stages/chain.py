"""Runs a stage after its parents: those a config names in `config.init` run first, or are reused.

A parent is "experiments/sft.py[:variant]", run in `sft[-variant]` beside this run's directory and
reused when a finished run there has the same config hash, or the directory of a finished run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import runpy
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.errors import UserError
from rlhf_jax.training.rundir import RunDirectory

STAGES = ("pretrain", "sft", "reward", "preference")


def config_hash(config: ConfigDict) -> str:
    """First 12 hex digits of the SHA-256 of the config's canonical JSON."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_config(source: str) -> ConfigDict:
    """`get_config(variant)` of "experiments/file.py[:variant]"."""
    path, _, variant = source.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"config.init names {source!r}: there is no file {path}")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(variant) if variant else get_config()


def default_workdir(source: str, runs: Path) -> Path:
    """<runs>/<file>[-<variant>] of "experiments/<file>.py[:<variant>]"."""
    path, _, variant = source.partition(":")
    return runs / "-".join(filter(None, (Path(path).stem, variant)))


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """summary.json of a finished run, None if there is none."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        return summary if summary["status"] == "done" else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's summary ({error!r}); delete the run") from error


def run(
    config: ConfigDict,
    source: str,
    workdir: str | os.PathLike[str] | None = None,
    *,
    allow_changes: bool = False,
) -> Path:
    """Runs `config`'s stage, parents first, and returns its run directory.

    A run that is finished already is reported again, not repeated.

    Raises:
        UserError: an unknown stage, a parent that cannot be had, or chains that run in a circle.
    """
    directory = Path(workdir) if workdir else default_workdir(source, Path("runs"))
    return _run(config, source, directory, allow_changes, descendants=())


def _run(
    config: ConfigDict, source: str, workdir: Path, allow_changes: bool, descendants: tuple[str, ...]
) -> Path:
    if config.stage not in STAGES:
        raise UserError(f"config.stage = {config.stage!r}: choose one of {', '.join(STAGES)}")
    parents, hashes = {}, {}
    for role, parent in config.init.items():
        if parent:
            parents[role] = _parent(parent, workdir.parent, (*descendants, source))
            hashes[role] = _require_summary(parents[role])["config_hash"]
    identity = hashlib.sha256(f"{config_hash(config)}{sorted(hashes.items())}".encode())
    digest = identity.hexdigest()[:12]
    summary = read_summary(workdir)
    if summary and summary["config_hash"] == digest:
        print(f"reusing {workdir}: it is finished and its config is the same", flush=True)
    else:
        print(f"running {source} in {workdir}", flush=True)
        summary = _run_stage(config, source, workdir, parents, digest, allow_changes)
    if not descendants:
        _print_end(workdir, summary)
    return workdir
