"""Runs a stage after its parents: those a config names in `config.init` run first, or are reused.

A parent is "experiments/sft.py[:variant]", run in `sft[-variant]` beside this run's directory and
reused when a finished run there is made from the same (see `identity`), or the directory of a
finished run. A run in runs/sweep/cell finds its parents in runs/, too (see `parent_directory`).
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

from rlhf_jax import hosts
from rlhf_jax.config import Config, document, section_document, unread
from rlhf_jax.digests import json_digest
from rlhf_jax.errors import UserError, mistake_in
from rlhf_jax.report.changes import console_rows, judge_changes
from rlhf_jax.report.report import describe_environment, write_report
from rlhf_jax.report.run_files import read_run, read_samples
from rlhf_jax.report.tables import print_table, with_unit
from rlhf_jax.stages.checks import check, check_devices
from rlhf_jax.stages.defaults import STAGES, module_of, resolve, unknown_field
from rlhf_jax.stages.experiments import find_experiment, names_experiment
from rlhf_jax.stages.identity import made_from
from rlhf_jax.stages.memory import naming_memory
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.sources import settle_sources
from rlhf_jax.training.origin import changes, config_hash, plain, tell_changes
from rlhf_jax.training.rundir import CONFIG, SUMMARY, AnotherRun, RunDirectory, fault_point
from rlhf_jax.training.summary import ancestry, names_of, read_summary

PARENTLESS = ("pretrain", "oracle")


def load_config(source: str) -> ConfigDict:
    """`get_config(variant)` of "experiments/file.py[:variant]", see `find_experiment`."""
    path, _, variant = find_experiment(source).partition(":")
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


def parent_directory(parent: str, directory: Path, parents: Path | None = None) -> Path:
    """Where the run of a parent "experiments/file.py[:variant]" is, or is to be.

    That is in `parents`. If none is given it is beside `directory`, the run that starts from it;
    or, where that lies deeper in the working directory's runs/, in the nearest directory above that
    holds it already.
    """
    if parents is not None:
        return default_workdir(parent, parents)
    beside = default_workdir(parent, directory.parent)
    above = []
    for place in directory.parent.parents:
        if not place.resolve().is_relative_to(Path("runs").resolve()):
            break
        above.append(default_workdir(parent, place))
    return next((path for path in (beside, *above) if (path / CONFIG).exists()), beside)


def run(
    given: ConfigDict,
    source: str,
    workdir: str | os.PathLike[str] | None = None,
    stated: Sequence[str] = (),
    *,
    parents: str | os.PathLike[str] | None = None,
    rerun: bool = False,
    descendants: tuple[str, ...] = (),
) -> Path:
    """Runs a config's stage, parents first, and returns its run directory.

    A run that is finished already is reported again, not repeated. One that was made from something
    else, of the parents too, is refused, or with `rerun` kept under another name and run again.

    Args:
        source: "experiments/file.py[:variant]", where the config is from.
        workdir: the run directory; None: `default_workdir`.
        stated: fields that the command line sets, by their dotted names.
        parents: the directory of the parents' runs; None: see `parent_directory`.
        rerun: whether to keep a run that was made from something else, and run this one.
        descendants: sources of the runs that this one is a parent of.

    Raises:
        UserError: an unknown stage, a parent that cannot be had, chains that run in a circle, or a
            directory that holds another run.
        Preempted: a stop was asked for; what is done is kept, and the next call goes on from it.
    """
    directory = Path(workdir) if workdir else default_workdir(source, Path("runs"))
    with naming_memory(given, directory):
        stop_point(together=True)
        with hosts.agreeing():
            config = prepare(given, stated)
            if not (directory / SUMMARY).exists():  # a finished run may be from other devices
                check_devices(config)
        pinned = document(config)
        _check_alike({"config": pinned, "workdir": str(directory)})
        home = Path(parents) if parents else None
        made = _run_parents(config, directory, home, (*descendants, source), rerun)
        with hosts.agreeing():
            origin = made_from(config, made)
        _check_alike(origin | {"commit": ""})
        if hosts.by_first(lambda: _is_finished(directory, config_hash(pinned, origin))):
            print(f"reusing {directory}: it is finished and made from the same", flush=True)
            _tell_environment(directory)
        else:
            print(f"running {source} in {directory}", flush=True)
            with RunDirectory(directory, pinned, origin, rerun=rerun) as held:
                stop_point(together=True)
                stage = importlib.import_module(module_of(config.stage))
                metrics = stage.run(config, held, made)
                with hosts.telling():
                    if hosts.is_first():
                        _finish(config, held, made, metrics)
        stop_point(together=True)
        if not descendants:
            show(directory)
    return directory


def _check_alike(made: Mapping[str, Any]) -> None:
    """Compares what each process would run.

    Raises:
        UserError: one would run something else than the first one; the message names it.
    """
    if hosts.count() == 1:
        return
    (first, expected), *others = hosts.exchange([hosts.name(), plain(made)])
    for process, other in others:
        if differing := changes(expected, other):
            told = tell_changes(differing, of_files="is not the same")
            raise UserError(f"{process} would run something else than {first}: {told}")


def _is_finished(directory: Path, made: str) -> bool:
    """Whether a directory holds a finished run of that `config_hash`."""
    finished = (directory / SUMMARY).exists()
    return finished and read_summary(directory)["config_hash"] == made


def prepare(given: ConfigDict, stated: Sequence[str] = ()) -> Config:
    """The options that are run: checked, and with what is empty in them settled.

    Raises:
        UserError: a mistake in the config, or a field that is `stated` on the command line and that
            the stage, as it is set, does not read.
    """
    if not isinstance(given, ConfigDict) or "stage" not in given:
        raise UserError("config: get_config returns none of rlhf_jax.stages.defaults")
    if given.stage not in STAGES:
        raise UserError(f"config.stage = {given.stage!r}: choose one of {', '.join(STAGES)}")
    for name in stated:
        if line := unknown_field(given.stage, name, given):
            raise UserError(f"in the command line: {line}")
    if given.stage not in PARENTLESS and not given.get("init", {}).get("policy"):
        raise UserError("config: init.policy is empty; set --config.init.policy=/path/to/model")
    for section in STAGES[given.stage]:
        if section not in given and section != "critic":
            raise UserError(f"config: the {given.stage} stage needs the section {section}")
    config = resolve(settle_sources(given))
    for name in stated:
        if line := unread(config, name):
            raise UserError(f"in the command line: {line}")
    check(config)
    return config


def _run_parents(
    config: Config, directory: Path, home: Path | None, lineage: tuple[str, ...], rerun: bool
) -> dict[str, Path]:
    """The run directories of a config's parents by role, run first if they are experiments."""
    parents, starts = {}, section_document(config, "init") if config.init else {}
    for role, named in starts.items():
        if named and names_experiment(named):
            _check_scale(config, role, find_experiment(named, lineage[-1]))
    for role, named in starts.items():
        if named and not names_experiment(named):
            read_summary(Path(named))
            parents[role] = Path(named)
        elif named:
            parent = find_experiment(named, lineage[-1])
            if parent in lineage:
                circle = " <- ".join((*lineage, parent))
                raise UserError(f"config.init runs in a circle: {circle}")
            place = parent_directory(parent, directory, home)
            given = load_config(parent)
            try:
                parents[role] = run(
                    given, parent, place, parents=home, rerun=rerun, descendants=lineage
                )
            except AnotherRun as error:
                if len(lineage) > 1 or not (place / SUMMARY).exists():
                    raise
                raise UserError(
                    f"{error}; --config.init.{role}={place} starts from what is there, and "
                    "--parents=DIR runs the parents in another directory"
                ) from error
    return parents


def _check_scale(config: Config, role: str, parent: str) -> None:
    """UserError for a reward model yet to be run that will keep no scale of its scores."""
    if role.startswith("reward") and getattr(getattr(config, "reward", None), "normalize", False):
        kept = load_config(parent).get("normalize", {}).get("prompts")
        if kept == 0 and not unread(config, "reward.normalize"):
            raise UserError(
                f"config: {parent} has normalize.prompts = 0 and keeps no statistics of its "
                "scores; set reward.normalize = False"
            )


def _finish(
    config: Config, held: RunDirectory, parents: Mapping[str, Path], metrics: Mapping[str, float]
) -> None:
    """Writes the report and, last of all, the summary of a stage that has run."""
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
    names, metrics = names_of(runs), summaries[-1]["metrics"]
    others = read_run(workdir).evaluation.get("others", {})
    rows = console_rows(metrics, others, names[:-1])
    rates = [s["metrics"].get("train/tokens_per_second") for s in summaries]
    rows.append([with_unit("train/tokens_per_second"), *rates, "–"])
    rows.append(["Wall time (s)", *(s["wall_seconds"] for s in summaries), "–"])
    columns = ["", *names, "change"]
    if len(runs) == 1:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(f"{workdir}", columns, rows, pick_samples(read_samples(workdir)))
    for sentence in judge_changes(metrics):
        print(sentence)
    print(f"report: {workdir / 'report.html'}", flush=True)


def pick_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three for the console: the first sample on which the last two models differ of each family.

    Families come in the order of how many samples they have; without families, the first ones.
    """
    first: dict[Any, dict[str, Any]] = {}
    for i, sample in enumerate(samples):
        texts = list(sample["responses"].values())[-2:]
        if len(set(texts)) == len(texts):
            first.setdefault(sample.get("family", i), sample)
    sizes = Counter(sample.get("family") for sample in samples)
    return sorted(first.values(), key=lambda sample: -sizes[sample.get("family")])[:3]
