"""Claims from their file to their table: what is missing is run, then the rules are applied."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rlhf_jax.claims.claim import Claim, read_claims
from rlhf_jax.claims.findings import NOT_RUN, Finding, find
from rlhf_jax.claims.measures import watched
from rlhf_jax.claims.page import write_page
from rlhf_jax.claims.tables import TABLE, print_finding, write_tables
from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object, write_json
from rlhf_jax.stages.experiments import find_experiment
from rlhf_jax.sweep.engines import on_cores
from rlhf_jax.sweep.forks import forks
from rlhf_jax.sweep.grid import Cell
from rlhf_jax.sweep.plan import Jobs, Sweep, check_grid, make_jobs
from rlhf_jax.sweep.sweep import Runner
from rlhf_jax.training.run_lock import acquire

REGISTERED = "registered.json"


def run_claims(source: str, directory: Path, workers: int, further: Sequence[str] = ()) -> None:
    """Runs what is missing of some claims, prints what they came to, and writes the table.

    All claims of the file are in the table: one whose runs are there from before too, any other is
    "not run".

    Args:
        source: "experiments/claims.py[:name,name]".
        further: flags of every run that is started.

    Raises:
        UserError: a mistake in the file, before anything runs; a claim that is not what it was
            before the first run; another process works in the directory; a shared parent failed.
    """
    path, chosen = read_claims(source)
    _, every = read_claims(path)
    plans = {claim.name: plan(path, claim, directory) for claim in every}
    directory.mkdir(parents=True, exist_ok=True)
    lock = acquire(directory / "lock")
    try:
        register(directory, every)
        findings = {claim.name: Finding(claim, NOT_RUN) for claim in every}
        for claim in every:
            if claim not in chosen and all(job.is_done() for job in plans[claim.name].seeded):
                findings[claim.name] = _find(claim, plans[claim.name], {})
        with forks() if sys.platform == "linux" else nullcontext(on_cores) as engine:
            runner = Runner(directory, workers, watched(engine), tuple(further))
            for claim in chosen:
                failed = runner.run(plans[claim.name], "")
                findings[claim.name] = _find(claim, plans[claim.name], failed)
                print_finding(findings[claim.name])
                write_tables(directory, [*findings.values()])
                page = write_page(directory, path, [*findings.values()])
        print(f"{directory / TABLE} has the table, {page} all of it", flush=True)
    finally:
        os.ftruncate(lock, 0)
        os.close(lock)


def plan(path: str, claim: Claim, directory: Path) -> Jobs:
    """The jobs of a claim's arms, whose configs are checked as their runs will check them.

    Raises:
        UserError: a mistake in one of them, or a parent that cannot be had.
    """
    jobs = Jobs()
    for arm in claim.arms:
        cells = (Cell(arm.name, arm.settings),)
        experiment = find_experiment(arm.experiment, path)
        sweep = Sweep(experiment, (), cells, directory, arm.seeds_from)
        try:
            check_grid(sweep, 1)
            make_jobs(sweep, cells, range(claim.seeds), jobs)
        except UserError as error:
            raise UserError(f"{path}: claim {claim.name!r}: {error}") from error
    return jobs


def register(directory: Path, claims: Sequence[Claim]) -> None:
    """Keeps what decides each claim of a file, before anything of it is run.

    Raises:
        UserError: it was another then.
    """
    path = directory / REGISTERED
    known = read_object(path) if path.exists() else {}
    for claim in claims:
        stated = claim.registered()
        before = known.setdefault(claim.name, stated)
        changed = [name for name in stated if before.get(name) != stated[name]]
        if changed:
            raise UserError(
                f"the {' and '.join(changed)} of claim {claim.name!r} are not what {path} has kept "
                "since before the first run; test the changed claim with another --workdir"
            )
    write_json(path, known)


def _find(claim: Claim, jobs: Jobs, failed: dict) -> Finding:
    runs = {key: job.directory for key, job in jobs.runs.items()}
    return find(claim, runs, {job.name: why for job, why in failed.items()})
