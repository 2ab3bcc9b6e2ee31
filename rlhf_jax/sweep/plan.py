"""From a command line to jobs: every cell is checked, and parents are told apart from runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf_jax.config import Config, section_document
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.main import parse
from rlhf_jax.stages.chain import load_config, parent_directory, prepare
from rlhf_jax.stages.experiments import find_experiment, names_experiment
from rlhf_jax.sweep.grid import Cell
from rlhf_jax.sweep.jobs import Job
from rlhf_jax.sweep.together import check as check_together


@dataclass(frozen=True)
class Sweep:
    """What is run.

    Attributes:
        source: "experiments/file.py[:variant]". flags: of `rlhf_jax.main`, of every run.
        cells: those that are run, or of a search some that have all values that it may propose.
        seeds_from: the stage from which on runs have seeds of their own; "": the sweep's own.
        directory: the sweep's; parents that its runs share lie where a run's would.
        together: whether the seeds of a cell are trained as one program.
    """

    source: str
    flags: tuple[str, ...]
    cells: tuple[Cell, ...]
    directory: Path
    seeds_from: str = ""
    together: bool = False


@dataclass
class Jobs:
    """The jobs of a sweep.

    Attributes:
        shared: parents by their source, each after those it starts from.
        runs: by cell's name and seed.
    """

    shared: dict[str, Job] = field(default_factory=dict)
    runs: dict[tuple[str, int], Job] = field(default_factory=dict)

    @property
    def seeded(self) -> list[Job]:
        """The runs, each after the parents of the same seed that it needs."""
        ordered: dict[Job, None] = {}

        def visit(job: Job) -> None:
            for need in job.needs:
                visit(need)
            ordered[job] = None

        for job in self.runs.values():
            visit(job)
        return list(ordered)


def check_grid(sweep: Sweep, most: int) -> None:
    """Prepares every cell's config, as its run will.

    Raises:
        UserError: more than `most` cells, two of one name, or a mistake in one of their configs.
    """
    count = len(sweep.cells)
    if count > most:
        raise UserError(f"--grid has {count} cells, more than --max-cells={most}")
    for cell in sweep.cells:
        try:
            config = _config(sweep, cell)
            if sweep.together:
                check_together(config)
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from error


def find_cell(cells: Sequence[Cell], name: str) -> Cell:
    """The cell of that name; a UserError tells the nearest."""
    names = {cell.name: cell for cell in cells}
    if name not in names:
        raise UserError(
            f"--baseline: there is no cell {name}; did you mean {nearest(name, names)}?"
        )
    return names[name]


def make_jobs(sweep: Sweep, cells: Sequence[Cell], seeds: Sequence[int], jobs: Jobs) -> None:
    """Adds to `jobs` a run of every cell with every seed, and the parents they need.

    Raises:
        UserError: a parent that cannot be had, or a stage `seeds_from` that none of them has.
    """
    for cell in cells:
        parents, alone = _parents(sweep, cell), {}
        for seed in seeds:
            flags = [f"--config={sweep.source}", *sweep.flags, *cell.flags, f"--config.seed={seed}"]
            flags, needs = _with_parents(sweep, parents, seed, flags, jobs, (sweep.source,))
            if sweep.seeds_from and not needs:
                raise UserError(
                    f"--seeds-from={sweep.seeds_from}: no parent of {sweep.source} is of that stage"
                )
            name = f"{cell.name},seed={seed}"
            alone[cell.name, seed] = Job(name, tuple(flags), sweep.directory / name, needs)
        if sweep.together and len(alone) > 1:
            name = f"{cell.name},seeds={seeds[0]}-{seeds[-1]}"
            place = sweep.directory / "together" / name
            first = Job(name, (), place, runs=tuple(alone.values()))
            alone = {key: replace(job, needs=(first,)) for key, job in alone.items()}
        jobs.runs |= alone


def _config(sweep: Sweep, cell: Cell) -> Config:
    given, _, stated, _ = parse([f"--config={sweep.source}", *sweep.flags, *cell.flags])
    return prepare(given, stated)


def _parents(sweep: Sweep, cell: Cell) -> dict[str, str]:
    """What a cell's config starts from, by role: experiments and directories."""
    config = _config(sweep, cell)
    named = section_document(config, "init") if config.init else {}
    return {role: parent for role, parent in named.items() if parent}


def _with_parents(
    sweep: Sweep,
    parents: dict[str, str],
    seed: int,
    flags: list[str],
    jobs: Jobs,
    lineage: tuple[str, ...],
) -> tuple[list[str], tuple[Job, ...]]:
    """A run's flags with the directories of its parents, and those of them that have a seed."""
    needs = []
    for role, parent in parents.items():
        if names_experiment(parent):
            job = _parent(sweep, find_experiment(parent, lineage[-1]), seed, jobs, lineage)
            flags = [*flags, f"--config.init.{role}={job.directory}"]
            needs += [job] if job not in jobs.shared.values() else []
    return flags, tuple(needs)


def _parent(sweep: Sweep, source: str, seed: int, jobs: Jobs, lineage: tuple[str, ...]) -> Job:
    """The job of a parent: one that all runs share, or from `seeds_from` on one of this seed."""
    if source in lineage:
        raise UserError(f"config.init runs in a circle: {' <- '.join((*lineage, source))}")
    given = load_config(source)
    named = {role: parent for role, parent in given.get("init", {}).items() if parent}
    flags, needs = _with_parents(
        sweep, named, seed, [f"--config={source}"], jobs, (*lineage, source)
    )
    shared = parent_directory(source, sweep.directory)
    if needs or given.stage == sweep.seeds_from:
        name = f"{shared.name},seed={seed}"
        flags.append(f"--config.seed={seed}")
        return Job(name, tuple(flags), sweep.directory / "parents" / name, needs)
    before = tuple(jobs.shared[each] for each in named.values() if each in jobs.shared)
    return jobs.shared.setdefault(source, Job(shared.name, (f"--config={source}",), shared, before))
