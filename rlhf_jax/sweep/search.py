"""A search in place of a grid: optuna proposes cells, and short runs decide which go on.

A trial is a run of a quarter of train.steps; those that are in the best quarter of such runs are
run whole (successive halving, https://arxiv.org/abs/1810.05934), and what is proposed next is drawn
by the tree-structured Parzen estimator (https://arxiv.org/abs/2304.11127). The study is a journal,
a file that several machines may share, each with a directory of its own.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.sweep.engines import NEEDED
from rlhf_jax.sweep.grid import Cell, cell_name, parse_grid, short_names
from rlhf_jax.training.meanings import is_less_better

FACTOR = 4  # of steps between the two runs of a trial, and of trials between those that have them
_RANGE = re.compile(r"(?P<low>[^.].*?|\..*?)\.\.(?P<high>.+?)(?P<log>:log)?")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole ones if both are; with `log` evenly spread in log."""

    low: float | int
    high: float | int
    log: bool

    def values(self) -> list[str]:
        """Both ends, as texts."""
        return [repr(self.low), repr(self.high)]


Space = Mapping[str, Range | list[str]]


def parse_space(text: str) -> Space:
    """{field: what it may be} of "loss.beta=0.01..1:log; loss.name=sigmoid,ipo".

    Raises:
        UserError: as `parse_grid`, a range that is none, or train.steps, which trials have two of.
    """
    space: dict[str, Range | list[str]] = {}
    for field, values in parse_grid(text, "--search").items():
        if field == "train.steps":
            raise UserError("--search: train.steps are the config's, or a quarter of them")
        found = _RANGE.fullmatch(values[0]) if len(values) == 1 else None
        if found is None:
            space[field] = values
            continue
        try:
            whole = all(re.fullmatch(r"-?\d+", found[end]) for end in ("low", "high"))
            low, high = (int(found[e]) if whole else float(found[e]) for e in ("low", "high"))
        except ValueError:
            raise UserError(f"--search: {field}={values[0]} is no range of numbers") from None
        if not low < high or (found["log"] and low <= 0):
            raise UserError(
                f"--search: {field}={values[0]}: a range rises, and one in log is above 0"
            )
        space[field] = Range(low, high, bool(found["log"]))
    if not space:
        raise UserError('--search is empty; try --search="loss.beta=0.01..1:log"')
    return space


def corners(space: Space) -> list[Cell]:
    """Cells that between them have every value that is named, and the ends of every range."""
    values = {f: each.values() if isinstance(each, Range) else each for f, each in space.items()}
    longest = max(map(len, values.values()))
    rows = [{f: each[i % len(each)] for f, each in values.items()} for i in range(longest)]
    return [_cell(row) for row in rows]


def _cell(values: Mapping[str, str]) -> Cell:
    return Cell(cell_name(short_names(list(values)), values), values)


class Search:
    """A study of optuna's, of which this process asks for cells and which it tells what they had.

    Args:
        storage: the journal. owner: the sweep's directory.
        steps: of a whole run.
        made_from: what trials are made from beside the steps, as JSON has it, by the flags' names.

    Raises:
        UserError: optuna is not installed, or the storage holds trials that are made from others.
    """

    def __init__(
        self, storage: Path, owner: Path, metric: str, steps: int, made_from: Mapping[str, Any]
    ) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError(f"--search needs optuna: {NEEDED}") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            backend = JournalFileBackend(str(storage))
        except OSError as error:
            raise UserError(f"--storage={storage}: {error.strerror}") from error
        directions = optuna.study.StudyDirection
        direction = directions.MINIMIZE if is_less_better(metric) else directions.MAXIMIZE
        self._optuna, self._owner = optuna, f"{socket.gethostname()}:{owner.resolve()}"
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=metric,
            direction=direction,
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(1, steps // FACTOR), reduction_factor=FACTOR
            ),
            load_if_exists=True,
        )
        self.short, self.whole = max(1, steps // FACTOR), steps
        stated = {**made_from, "train.steps": steps}
        before = self._study.user_attrs.get("made_from", stated)
        for name, value in stated.items():
            if before.get(name) != value:
                raise UserError(
                    f"{storage} holds trials with {name} = {before.get(name)}, and this is "
                    f"{value}; name another --storage or --workdir"
                )
        self._study.set_user_attr("made_from", stated)
        for trial in self._study.get_trials(states=(self._state.RUNNING,)):
            if trial.user_attrs.get("owner") == self._owner:  # which was killed
                self._study.enqueue_trial(trial.params)
                self._study.tell(trial.number, state=self._state.FAIL)

    @property
    def _state(self) -> Any:
        return self._optuna.trial.TrialState

    def count(self) -> int:
        """How many trials have come to an end, on all machines."""
        return len(self._ended())

    def _ended(self) -> list[Any]:
        every = self._study.get_trials(states=(self._state.COMPLETE, self._state.PRUNED))
        return [trial for trial in every if "cell" in trial.user_attrs]

    def ask(self, space: Space) -> tuple[Any, Cell]:
        """A trial and its cell.

        The sampler's seed is the number of trials, so that one that is continued does not propose
        again what it has proposed.
        """
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._optuna.samplers.TPESampler(seed=number)
        trial = self._study.ask()
        values = {}
        for field, each in space.items():
            if not isinstance(each, Range):
                values[field] = str(trial.suggest_categorical(field, each))
            elif isinstance(each.low, int) and isinstance(each.high, int):
                values[field] = str(trial.suggest_int(field, each.low, each.high, log=each.log))
            else:
                values[field] = repr(trial.suggest_float(field, each.low, each.high, log=each.log))
        cell = _cell(values)
        trial.set_user_attr("owner", self._owner)
        trial.set_user_attr("cell", cell.name)
        trial.set_user_attr("values", values)
        return trial, cell

    def goes_on(self, trial: Any, value: float) -> bool:
        """Notes what a trial's short run had, and whether it is to be run whole."""
        trial.report(value, self.short)
        if not trial.should_prune():
            return True
        self._study.tell(trial, state=self._state.PRUNED)
        return False

    def tell(self, trial: Any, value: float | None, why: str = "") -> None:
        """Ends a trial with what its whole run had; None: it failed, and `why`."""
        if value is None:
            trial.set_user_attr("why", why)
            self._study.tell(trial, state=self._state.PRUNED)
        else:
            self._study.tell(trial, value)

    def trials(self) -> list[tuple[str, int, float | None, str]]:
        """(cell, steps, value, why it failed) of those that have ended, good whole ones first."""
        rows = []
        for trial in self._ended():
            attributes, value, steps = trial.user_attrs, None, self.short
            if trial.state == self._state.COMPLETE:
                value, steps = trial.value, self.whole
            elif trial.intermediate_values:
                value = trial.intermediate_values[self.short]
            rows.append((attributes["cell"], steps, value, attributes.get("why", "")))
        sign = 1 if self._study.direction.name == "MINIMIZE" else -1
        return sorted(rows, key=lambda row: (-row[1], row[2] is None, sign * (row[2] or 0)))

    def best(self) -> Cell | None:
        """The cell whose whole run had the best value; None before the first one."""
        if not self._study.get_trials(states=(self._state.COMPLETE,)):
            return None
        return _cell(self._study.best_trial.user_attrs["values"])


def search(
    study: Search,
    space: Space,
    trials: int,
    batch: int,
    measure: Callable[[list[tuple[Cell, int]]], list[float | str]],
) -> None:
    """Runs trials, `batch` at a time, until so many have ended.

    Args:
        measure: what cells have that are run for so many steps; a text where a run failed, and why.
    """
    while (left := trials - study.count()) > 0:
        asked = [study.ask(space) for _ in range(min(batch, left))]
        going = []
        values = measure([(cell, study.short) for _, cell in asked])
        for (trial, cell), value in zip(asked, values, strict=True):
            if isinstance(value, str):
                study.tell(trial, None, value)
            elif study.goes_on(trial, value):
                going.append((trial, cell))
        values = measure([(cell, study.whole) for _, cell in going])
        for (trial, _), value in zip(going, values, strict=True):
            if isinstance(value, str):
                study.tell(trial, None, value)
            else:
                study.tell(trial, value)
