"""Runs a stage after its parents: those a config names in `config.init` run first, or are reused.

A parent is "experiments/sft.py[:variant]", run in `sft[-variant]` beside this run's directory and
reused when a finished run there is made from the same (see `identity`), or the directory of a
finished run.
"""

from __future__ import annotations

import importlib
import os
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import Config, document, stated
from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError, mistake_in
from rlhf_jax.report.report import describe_environment, write_report
from rlhf_jax.report.run_files import read_samples
from rlhf_jax.report.tables import METRICS, print_table
from rlhf_jax.stages.checks import check
from rlhf_jax.stages.defaults import STAGES, module_of, resolve
from rlhf_jax.stages.identity import made_from
from rlhf_jax.stages.memory import naming_memory
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.sources import settle_sources
from rlhf_jax.training.origin import changes, config_hash, tell_changes
from rlhf_jax.training.rundir import SUMMARY, AnotherRun, RunDirectory, fault_point
from rlhf_jax.training.summary import ancestry, read_summary

PARENTLESS = ("pretrain", "oracle")


def load_config(source: str) -> ConfigDict:
    """`get_config(variant)` of "experiments/file.py[:variant]"."""
    path, _, variant = source.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"config.init names {source!r}: there is no file {path}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no function get_config")
        return get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:
        raise mistake_in(path, error) or UserError(f"{source}: {error}") from error


def default_workdir(source: str, runs: Path) -> Path:
    """<runs>/<file>[-<variant>] of "experiments/<file>.py[:<variant>]"."""
    path, _, variant = source.partition(":")
    return runs / "-".join(filter(None, (Path(path).stem, variant)))


def run(
    config: ConfigDict,
    source: str,
    workdir: str | os.PathLike[str] | None = None,
    *,
    rerun: bool = False,
) -> Path:
    """Runs `config`'s stage, parents first, and returns its run directory.

    A run that is finished already is reported again, not repeated. One that was made from something
    else, of the parents too, is refused, or with `rerun` kept under another name and run again.

    Raises:
        UserError: an unknown stage, a parent that cannot be had, chains that run in a circle, or a
            directory that holds another run.
        Preempted: a stop was asked for; what is done is kept, and the next call goes on from it.
    """
    directory = Path(workdir) if workdir else default_workdir(source, Path("runs"))
    with naming_memory(config, directory):
        return _run(config, source, directory, descendants=(), rerun=rerun)


def prepare(config: ConfigDict) -> Config:
    """The options that are run: checked, and with what is empty in them settled."""
    if not isinstance(config, ConfigDict) or "stage" not in config:
        raise UserError("config: get_config returns none of rlhf_jax.stages.defaults")
    if config.stage not in STAGES:
        raise UserError(f"config.stage = {config.stage!r}: choose one of {', '.join(STAGES)}")
    if config.stage not in PARENTLESS and not config.get("init", {}).get("policy"):
        raise UserError("config: init.policy is empty; set --config.init.policy=/path/to/model")
    for section in STAGES[config.stage]:
        if section not in config and section != "critic":
            raise UserError(f"config: the {config.stage} stage needs the section {section}")
    options = resolve(settle_sources(config))
    check(options)
    return options


def _run(
    given: ConfigDict, source: str, workdir: Path, descendants: tuple[str, ...], rerun: bool
) -> Path:
    stop_point()
    config = prepare(given)
    lineage = (*descendants, source)
    parents = {}
    for role, parent in (stated(config.init) if config.init else {}).items():
        if parent:
            try:
                parents[role] = _parent(parent, workdir.parent, lineage, rerun)
            except AnotherRun as error:
                directory = default_workdir(parent, workdir.parent)
                if descendants or not (directory / SUMMARY).exists():
                    raise
                as_it_is = f"--config.init.{role}={directory} starts from what is there"
                raise UserError(f"{error}; {as_it_is}") from error
    pinned, origin = document(config), made_from(config, parents)
    done = (workdir / SUMMARY).exists()
    if done and read_summary(workdir)["config_hash"] == config_hash(pinned, origin):
        print(f"reusing {workdir}: it is finished and made from the same", flush=True)
        _tell_environment(workdir)
    else:
        print(f"running {source} in {workdir}", flush=True)
        with RunDirectory(workdir, pinned, origin, rerun=rerun) as held:
            stop_point()
            _run_stage(config, held, parents)
    stop_point()
    if not descendants:
        show(workdir)
    return workdir


def _parent(parent: str, runs: Path, lineage: tuple[str, ...], rerun: bool) -> Path:
    """The run directory of a parent, run first if it is an experiment."""
    if ".py" not in parent:
        read_summary(Path(parent))
        return Path(parent)
    if parent in lineage:
        raise UserError(f"config.init runs in a circle: {' <- '.join((*lineage, parent))}")
    directory = default_workdir(parent, runs)
    config = load_config(parent)
    with naming_memory(config, directory):
        return _run(config, parent, directory, lineage, rerun)


def _run_stage(config: Config, held: RunDirectory, parents: Mapping[str, Path]) -> None:
    stage = importlib.import_module(module_of(config.stage))
    metrics = stage.run(config, held, parents)
    origin = held.made_from
    meanwhile = changes(origin, made_from(config, parents) | {"commit": origin["commit"]})
    if meanwhile:
        print(f"warning: during the run {tell_changes(meanwhile)}", flush=True)
    summary = {
        "stage": config.stage,
        "status": "done",
        "config_hash": held.config_hash,
        "parents": {role: str(path.resolve()) for role, path in parents.items()},
        "wall_seconds": round(held.wall_seconds(), 3),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "command": shlex.join(["python", "-m", "rlhf_jax.main", *sys.argv[1:]]),
        "made_from": origin | {"code": json_digest(origin["code"])},
        "environment": describe_environment(),
    }
    fault_point("report")
    write_report(held.path, summary)
    held.write_summary(summary)


def _tell_environment(workdir: Path) -> None:
    """Says with which other libraries, or on which other device, a run was made."""
    then, now = read_summary(workdir).get("environment", {}), describe_environment()
    changed = [
        f"{name} {then[name]} (here {now[name]})"
        for name in now
        if name != "platform" and then.get(name, now[name]) != now[name]
    ]
    if changed:
        print(f"{workdir} was made with {', '.join(changed)}", flush=True)


def show(workdir: Path) -> None:
    """Prints what a run came to: a table of its lineage, three samples, the report's path."""
    runs = ancestry(workdir)
    summaries = [read_summary(path) for path in runs]
    rows = summary_rows([s["metrics"] for s in summaries])
    rows.append(["Wall time (s)", *(s["wall_seconds"] for s in summaries)])
    chosen = pick_samples(read_samples(workdir))
    print_table(f"{workdir}", ["", *(path.name for path in runs)], rows, chosen)
    print(f"report: {workdir / 'report.html'}", flush=True)


def summary_rows(metrics: Sequence[Mapping[str, float]]) -> list[list[Any]]:
    """Rows of the console's table, a column a run: what any run reports, with its 95 % interval."""
    rows: list[list[Any]] = []
    for name, (label, *_) in METRICS.items():
        if not any(name in each for each in metrics):
            continue
        rows.append([label, *(each.get(name) for each in metrics)])
        bounds = [(each.get(f"{name}_low"), each.get(f"{name}_high")) for each in metrics]
        if any(low is not None for low, _ in bounds):
            texts = (None if low is None else f"{low:.3g}–{high:.3g}" for low, high in bounds)
            rows.append(["  95 % interval", *texts])
    return rows


def pick_samples(samples: list[dict[str, Any]], count: int = 3) -> list[dict[str, Any]]:
    """For the console: the first sample on which the last two models differ of each family.

    Families come in the order of how many samples they have; without families, the first few.
    """
    first: dict[Any, dict[str, Any]] = {}
    for i, sample in enumerate(samples):
        texts = list(sample["responses"].values())[-2:]
        if len(set(texts)) == len(texts):
            first.setdefault(sample.get("family", i), sample)
    sizes = Counter(sample.get("family") for sample in samples)
    return sorted(first.values(), key=lambda sample: -sizes[sample.get("family")])[:count]
