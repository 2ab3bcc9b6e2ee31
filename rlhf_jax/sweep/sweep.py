"""A sweep from its command line to its table and page: of a grid, or of what a search proposes."""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object, write_json
from rlhf_jax.main import parse
from rlhf_jax.report.tables import format_metric, format_seconds, print_table
from rlhf_jax.stages.chain import default_workdir
from rlhf_jax.sweep import tradeoff
from rlhf_jax.sweep.engines import Engine, on_cluster, on_cores
from rlhf_jax.sweep.forks import forks
from rlhf_jax.sweep.grid import Cell, make_cells, parse_grid
from rlhf_jax.sweep.jobs import Job, run_jobs
from rlhf_jax.sweep.outcomes import check_metric
from rlhf_jax.sweep.page import write_page
from rlhf_jax.sweep.plan import Jobs, Sweep, check_grid, find_cell, make_jobs
from rlhf_jax.sweep.results import Results, read_results, write_runs, write_tables
from rlhf_jax.sweep.search import Search, corners, parse_space, search
from rlhf_jax.sweep.tables import (
    COLUMNS,
    DIFFERENCES,
    differences_of,
    estimates,
    of_search,
    sentences,
)
from rlhf_jax.training.meanings import is_less_better
from rlhf_jax.training.run_lock import acquire, release
from rlhf_jax.training.summary import read_summary

VARIED, JOURNAL = "varied.json", "search.journal"
AS_IT_IS = Cell("as-it-is", {})  # the config without what a search sets


@dataclass(frozen=True)
class Runner:
    """How jobs are run: where, how many at a time, and with which flags beside their own."""

    directory: Path
    workers: int
    engine: Engine
    further: tuple[str, ...]

    def run(self, jobs: Jobs, metric: str) -> dict[Job, str]:
        """Runs shared parents, each on all cores, then the rest; returns what failed, and why.

        Raises:
            UserError: a shared parent failed, or the first run has no such metric.
        """
        runs, total, logs = jobs.seeded, len(jobs.runs), self.directory / "logs"
        print(f"{total} runs in {self.directory}, {self.workers} at a time", flush=True)
        shared = [*jobs.shared.values()]
        lost = run_jobs(shared, 1, logs, lambda job: None, self.further, self.engine)
        for job, why in lost.items():
            raise UserError(f"{job.name}, a parent of all, failed: {why} ({logs}/{job.name}.log)")
        counted = iter(range(1, total + 1))

        def tell(job: Job) -> None:
            if job in jobs.runs.values():
                summary = read_summary(job.directory)
                if metric:
                    check_metric(job.directory, summary["metrics"], metric)
                seconds = format_seconds(summary["wall_seconds"])
                print(f"{next(counted)} of {total}: {job.name} is done ({seconds})", flush=True)

        return run_jobs(runs, self.workers, logs, tell, self.further, self.engine)


def run_sweep(given: argparse.Namespace) -> None:
    """Runs what is missing of a sweep, prints its table and writes its files.

    Args:
        given: the flags of `rlhf_jax.sweep`; those of `rlhf_jax.main` in `rest`.

    Raises:
        UserError: a mistake in the grid or the config, before anything runs; another sweep works in
            the directory; a shared parent failed, or no run has finished.
    """
    config, source, _, others = parse(given.rest)
    alone = ("preflight", "print", "version", "coordinator", "processes", "process", "parents")
    if stated := [f"--{name}" for name in alone if others[name].present]:
        raise UserError(f"of rlhf_jax.main alone: {', '.join(stated)}")
    if given.metric:
        is_less_better(given.metric)  # an error if that is not known
    if given.search and (given.grid or given.baseline or not given.metric):
        raise UserError("--search needs --metric, and has no --grid and no --baseline")
    if given.vmap_seeds and (given.search or given.seeds_from or given.seeds < 2):
        raise UserError("--vmap-seeds needs --seeds=2 or more, and has no --search or --seeds-from")
    if (given.slurm and given.engine != "slurm") or (given.storage and not given.search):
        raise UserError("--slurm needs --engine=slurm, and --storage needs --search")
    flags = tuple(_fields(given.rest, others))
    space = parse_space(given.search) if given.search else {}
    grid = parse_grid(given.grid)
    cells = [AS_IT_IS, *corners(space)] if space else make_cells(grid)
    varied = {"grid": grid, "search": given.search, "flags": sorted(flags)}
    varied |= {"seeds_from": given.seeds_from}
    default = default_workdir(source, Path("runs"))
    default = default.with_name(f"{default.name}-sweep")
    directory = Path(given.workdir or find_directory(default, varied, cells))
    sweep = Sweep(source, flags, tuple(cells), directory, given.seeds_from, given.vmap_seeds)
    baseline = find_cell(cells, given.baseline) if given.baseline else cells[0]
    check_grid(sweep, given.max_cells)
    make_jobs(sweep, cells, range(1), Jobs())  # a parent that cannot be had is told here
    engines = _engine(given, directory)
    further = ("--rerun",) if given.rerun else ()
    directory.mkdir(parents=True, exist_ok=True)
    lock = acquire(directory / "lock")
    try:
        write_json(directory / VARIED, varied)
        with engines as engine:
            runner = Runner(directory, given.workers, engine, further)
            if not space:
                run_grid(sweep, runner, baseline, given.seeds, given.metric)
            else:
                storage = Path(given.storage or directory / JOURNAL)
                made_from = {"--config": source, "--search": given.search, "flags": [*flags]}
                study = Search(storage, directory, given.metric, config.train.steps, made_from)
                measure = _Measure(sweep, runner, given.metric)
                search(study, space, given.trials, given.workers, measure)
                confirm(sweep, runner, study, given.seeds, given.metric)
    finally:
        release(lock)


def _fields(words: Sequence[str], read: Any) -> Iterator[str]:
    """The flags among `words` that set fields, each in one word; `read` is what `parse` made."""
    following = iter(words)
    for word in following:
        name, equals, _ = word.lstrip("-").partition("=")
        if word.startswith("-") and name.startswith(("config.", "noconfig.")):
            alone = equals or name.startswith("no") or (name in read and read[name].boolean)
            yield f"--{word.lstrip('-')}" + ("" if alone else f"={next(following)}")


def find_directory(default: Path, varied: Mapping[str, Any], cells: Sequence[Cell]) -> Path:
    """The default directory, or <default>-2 and so on where that holds another sweep.

    A sweep is the same if it differs at most in having more or fewer values of the same fields.
    """
    for place in itertools.chain([default], (Path(f"{default}-{n}") for n in itertools.count(2))):
        known = read_object(place / VARIED) if (place / VARIED).exists() else None
        if _is_same(known, varied) if known else _may_be_same(place, varied, cells):
            break
        print(f"{place} holds another sweep", flush=True)
    return place


def _is_same(known: Mapping[str, Any], varied: Mapping[str, Any]) -> bool:
    before, grid = known.get("grid", {}), varied["grid"]
    if before.keys() != grid.keys() or {**known, "grid": 0} != {**varied, "grid": 0}:
        return False
    pairs = [(set(before[field]), set(grid[field])) for field in grid]
    return all(one <= other or other <= one for one, other in pairs)


def _may_be_same(place: Path, varied: Mapping[str, Any], cells: Sequence[Cell]) -> bool:
    """Whether a directory without VARIED, as older versions left it, holds no runs or such ones."""
    if varied["search"] and (place / JOURNAL).exists():
        return True
    found = {path.name for path in place.glob("*,seed=*")}
    return not found or any(f"{cell.name},seed=0" in found for cell in cells)


def _engine(given: argparse.Namespace, directory: Path) -> AbstractContextManager[Engine]:
    """What starts runs, while it is entered."""
    if given.engine == "slurm":
        return nullcontext(on_cluster(directory / "slurm", _options(given.slurm)))
    if sys.platform == "linux":
        return forks()
    return nullcontext(on_cores)  # libraries of macOS do not survive a fork


def run_grid(sweep: Sweep, runner: Runner, baseline: Cell, seeds: int, metric: str) -> None:
    """Runs every cell with every seed, then the best one and the baseline with as many others."""
    jobs, cells = Jobs(), sweep.cells
    make_jobs(sweep, cells, range(seeds), jobs)
    failed = runner.run(jobs, metric)
    results = read_results(cells, baseline.name, jobs.runs, failed, metric)
    if not any(results.outcomes.values()):
        raise UserError(f"no run has finished: {next(iter(failed.values()))}")
    fresh, everything = None, dict(jobs.runs)
    best = results.best
    if best and seeds > 1 and len(cells) > 1:
        chosen = [cell for cell in cells if cell.name in (best.name, baseline.name)]
        again = Jobs()
        make_jobs(sweep, chosen, range(seeds, 2 * seeds), again)
        print(f"the best so far, {best.name}, is run again on fresh seeds", flush=True)
        failed |= runner.run(again, results.metric)
        fresh = read_results(chosen, baseline.name, again.runs, failed, results.metric)
        everything |= again.runs
    write_tables(sweep.directory, results, fresh)
    write_runs(sweep.directory, cells, everything, failed)
    told = sentences(results, fresh)
    print_results(sweep.directory, results, told)
    curve = tradeoff.read_curve(
        {
            name: {seed: jobs.runs[name, seed].directory for seed in of_seeds}
            for name, of_seeds in results.outcomes.items()
        }
    )
    if curve:
        print_table("Over the curve of the starts", curve.columns, tradeoff.table(curve))
    page = write_page(sweep.directory, sweep.source, results, fresh, jobs.runs, told, curve=curve)
    print(f"report: {page}", flush=True)


def confirm(sweep: Sweep, runner: Runner, study: Search, seeds: int, metric: str) -> None:
    """Runs the best cell of a search, and the config as it is, with seeds that no trial had."""
    best, trials = study.best(), study.trials()
    if best is None:
        raise UserError(f"no trial has finished: {next((why for *_, why in trials if why), '')}")
    jobs, cells = Jobs(), [AS_IT_IS, best]
    make_jobs(sweep, cells, range(1, seeds + 1), jobs)
    print(f"the best of {len(trials)} trials, {best.name}, is run on fresh seeds", flush=True)
    failed = runner.run(jobs, metric)
    results = read_results(cells, AS_IT_IS.name, jobs.runs, failed, metric)
    write_tables(sweep.directory, results, None)
    write_runs(sweep.directory, cells, jobs.runs, failed)
    rows = [[cell, steps, format_metric("", value), why] for cell, steps, value, why in trials]
    print_table("Trials", ("cell", "steps", metric, "failed"), rows)
    told = of_search(results, best.name, len(trials))
    print_results(sweep.directory, results, told)
    page = write_page(sweep.directory, sweep.source, results, None, jobs.runs, told, rows)
    print(f"report: {page}", flush=True)


@dataclass(frozen=True)
class _Measure:
    """What cells have that are run for so many steps, with the seed 0."""

    sweep: Sweep
    runner: Runner
    metric: str

    def __call__(self, cells: list[tuple[Cell, int]]) -> list[float | str]:
        """The metric of each; a text where a run failed, and why."""
        jobs = Jobs()
        for cell, steps in cells:
            at = Cell(f"{cell.name},steps={steps}", {**cell.values, "train.steps": str(steps)})
            make_jobs(self.sweep, [at], range(1), jobs)
        failed = self.runner.run(jobs, self.metric) if cells else {}
        values: list[float | str] = []
        for cell, steps in cells:
            job = jobs.runs[f"{cell.name},steps={steps}", 0]
            if job in failed:
                values.append(failed[job])
            else:
                value = read_summary(job.directory)["metrics"][self.metric]
                values.append(value if isfinite(value) else f"its {self.metric} is {value}")
        return values


def _options(text: str) -> dict[str, Any]:
    """{name: value} of "slurm_partition=gpu,timeout_min=60"; what is no literal is a text."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--slurm: {part!r} is no name=value")
        try:
            options[name.strip()] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name.strip()] = value
    return options


def print_results(directory: Path, results: Results, told: Sequence[str]) -> None:
    """Prints the tables, a row a cell, and the sentences that say what they mean."""
    print_table(f"{results.metric}, {directory}", COLUMNS, estimates(results))
    compared = differences_of(results)
    if compared:
        print_table(f"Over {results.baseline}", DIFFERENCES, compared)
    for row in results.rows:
        for seed, why in row.failures.items():
            print(f"{row.name}, seed {seed} failed: {why}")
    for line in told:
        print(line)
