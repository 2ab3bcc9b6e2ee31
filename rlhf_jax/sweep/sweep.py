"""A sweep from its command line to its table and page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.main import parse
from rlhf_jax.report.tables import format_seconds, print_table
from rlhf_jax.stages.chain import default_workdir
from rlhf_jax.sweep.grid import make_cells, parse_grid
from rlhf_jax.sweep.jobs import Job, run_jobs
from rlhf_jax.sweep.outcomes import check_metric
from rlhf_jax.sweep.page import write_page
from rlhf_jax.sweep.plan import Jobs, Sweep, check_grid, find_cell, make_jobs
from rlhf_jax.sweep.results import Results, read_results, write_runs, write_tables
from rlhf_jax.sweep.tables import COLUMNS, DIFFERENCES, differences_of, estimates, sentences
from rlhf_jax.training.run_lock import acquire
from rlhf_jax.training.summary import read_summary


def run_sweep(given: argparse.Namespace) -> None:
    """Runs what is missing of a sweep, prints its table and writes its files.

    Args:
        given: the flags of `rlhf_jax.sweep`; those of `rlhf_jax.main` in `rest`.

    Raises:
        UserError: a mistake in the grid or the config, before anything runs; another sweep works in
            the directory; a shared parent failed, or no run has finished.
    """
    _, source, _, others = parse(given.rest)
    if others.preflight or others.coordinator:
        raise UserError("--preflight and --coordinator are of rlhf_jax.main")
    cells = make_cells(parse_grid(given.grid))
    baseline = find_cell(cells, given.baseline) if given.baseline else cells[0]
    default = default_workdir(source, Path("runs"))
    directory = Path(given.workdir or default.with_name(f"{default.name}-sweep"))
    flags = tuple(flag for flag in given.rest if flag.startswith(("--config.", "--noconfig.")))
    seeds, jobs = range(given.seeds), Jobs()
    sweep = Sweep(source, flags, tuple(cells), tuple(seeds), directory, given.seeds_from)
    check_grid(sweep, given.max_cells)
    make_jobs(sweep, cells, seeds, jobs)
    directory.mkdir(parents=True, exist_ok=True)
    lock = acquire(directory / "lock")
    try:
        failed = _run(jobs, directory, given.workers, given.metric, rerun=given.rerun)
        results = read_results(cells, baseline.name, jobs.runs, failed, given.metric)
        if not any(results.outcomes.values()):
            raise UserError(f"no run has finished: {next(iter(failed.values()))}")
        fresh, everything = None, dict(jobs.runs)
        best = results.best
        if best and given.seeds > 1 and len(cells) > 1:
            chosen = [cell for cell in cells if cell.name in (best.name, baseline.name)]
            more, again = range(given.seeds, 2 * given.seeds), Jobs()
            make_jobs(sweep, chosen, more, again)
            print(f"the best so far, {best.name}, is run again on fresh seeds", flush=True)
            failed |= _run(again, directory, given.workers, results.metric, rerun=given.rerun)
            fresh = read_results(chosen, baseline.name, again.runs, failed, results.metric)
            everything |= again.runs
        write_tables(directory, results, fresh)
        write_runs(directory, cells, everything)
        print_results(directory, results, fresh)
        page = write_page(directory, source, results, fresh, jobs.runs)
        print(f"report: {page}", flush=True)
    finally:
        os.ftruncate(lock, 0)
        os.close(lock)


def _run(jobs: Jobs, directory: Path, workers: int, metric: str, *, rerun: bool) -> dict[Job, str]:
    """Runs shared parents, each on all cores, and then the rest; returns what failed, and why.

    Raises:
        UserError: a shared parent failed, or the first run has no such metric.
    """
    runs, total = jobs.seeded, len(jobs.runs)
    print(f"{total} runs in {directory}, {workers} at a time", flush=True)
    further = ("--rerun",) if rerun else ()
    logs = directory / "logs"
    lost = run_jobs([*jobs.shared.values()], 1, logs, lambda job: None, further)
    for job, why in lost.items():
        raise UserError(f"{job.name}, a parent of all runs, failed: {why} ({logs}/{job.name}.log)")
    counted = iter(range(1, total + 1))

    def tell(job: Job) -> None:
        if job in jobs.runs.values():
            summary = read_summary(job.directory)
            if metric:
                check_metric(job.directory, summary["metrics"], metric)
            seconds = format_seconds(summary["wall_seconds"])
            print(f"{next(counted)} of {total}: {job.name} is done ({seconds})", flush=True)

    return run_jobs(runs, workers, logs, tell, further)


def print_results(directory: Path, results: Results, fresh: Results | None) -> None:
    """Prints the tables, a row a cell, and the sentences that say what they mean."""
    print_table(f"{results.metric}, {directory}", COLUMNS, estimates(results))
    compared = differences_of(results)
    if compared:
        print_table(f"Over {results.baseline}", DIFFERENCES, compared)
    for row in results.rows:
        for seed, why in row.failures.items():
            print(f"{row.name}, seed {seed} failed: {why}")
    for line in sentences(results, fresh):
        print(line)
