"""What a claim is: which runs, what of them is compared, and the rule that decides. Data only.

A file of claims, such as experiments/claims.py, has a tuple `CLAIMS` of these.
"""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.claims.rules import RULES, WORDS
from rlhf_jax.errors import UserError, mistake_in, nearest
from rlhf_jax.stages.experiments import find_experiment

OF_START = ("gold", "right", "words", "continues")


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: of their directories, <name>,seed=0 and so on.
        experiment: "experiments/file.py[:variant]".
        settings: {dotted field: value as on the command line} that it differs by.
        seeds_from: the stage from which on parents have the run's seed too; "": all are shared.
    """

    name: str
    experiment: str
    settings: Mapping[str, str] = field(default_factory=dict)
    seeds_from: str = ""


@dataclass(frozen=True)
class Measure:
    """A number of each run of an arm, or one for each held-out prompt: see `measures`.

    With `of_start` it is of the model that the run started from, on the same prompts.

    Raises:
        UserError: that is not known of the metric, which `OF_START` lacks.
    """

    arm: Arm
    metric: str
    of_start: bool = False

    def __post_init__(self) -> None:
        if self.of_start and self.metric not in OF_START:
            raise UserError(f"{self}: only {', '.join(OF_START)} are known of a run's start")

    def __str__(self) -> str:
        return f"{self.metric.removeprefix('eval/')} of {self.whose}"

    @property
    def whose(self) -> str:
        """The arm, or what its runs started from, in words."""
        return f"{self.arm.name}'s start" if self.of_start else self.arm.name


@dataclass(frozen=True)
class Comparison:
    """Ours less theirs, which may be a constant, and the rule that says what it has to be."""

    ours: Measure
    theirs: Measure | float
    rule: str  # one of `rules.RULES`
    margin: float = 0.0  # in the metric's unit, at least 0

    @property
    def arms(self) -> list[Arm]:
        """The arms that it compares."""
        return [each.arm for each in (self.ours, self.theirs) if isinstance(each, Measure)]

    def __str__(self) -> str:
        if isinstance(self.theirs, Measure) and self.theirs.metric == self.ours.metric:
            return f"{self.ours} less {self.theirs.whose}"
        return f"{self.ours} less {self.theirs}"

    @property
    def must_be(self) -> str:
        """What the rule asks of the difference, in words."""
        return WORDS[self.rule].format(f"{self.margin:g}")


@dataclass(frozen=True)
class Claim:
    """A sentence, and what would show it.

    Attributes:
        tests: all must be supported. conditions: as well, or the claim stays undecided.
        beside: what is told beside, and decides nothing.
        seeds: how many runs an arm has.
    """

    name: str
    sentence: str
    tests: tuple[Comparison, ...]
    conditions: tuple[Comparison, ...] = ()
    beside: tuple[Measure, ...] = ()
    seeds: int = 3

    @property
    def arms(self) -> list[Arm]:
        """Its arms, each once."""
        of_tests = [arm for test in (*self.tests, *self.conditions) for arm in test.arms]
        found: list[Arm] = []
        for arm in [*of_tests, *(each.arm for each in self.beside)]:
            if arm not in found:
                found.append(arm)
        return found

    def registered(self) -> dict[str, Any]:
        """All that decides it, as a JSON document: not its sentence, nor what is told beside."""
        whole = json.loads(json.dumps(asdict(self)))  # with lists, as a file has them
        return {name: whole[name] for name in ("tests", "conditions", "seeds")}


def read_claims(source: str) -> tuple[str, list[Claim]]:
    """(the file, the claims) of "experiments/claims.py[:name,name]"; without names or "all": all.

    Raises:
        UserError: there is no such file or claim, or one of the claims cannot be tested.
    """
    path, _, names = find_experiment(source).partition(":")
    try:
        claims = runpy.run_path(path).get("CLAIMS", ())
    except Exception as error:
        raise mistake_in(path, error) or UserError(f"{path}: {error}") from error
    if (
        not isinstance(claims, list | tuple)
        or not claims
        or not all(isinstance(each, Claim) for each in claims)
    ):
        raise UserError(f"{path} has no tuple CLAIMS of rlhf_jax.claims.claim.Claim")
    check_claims(path, claims)
    known = {claim.name: claim for claim in claims}
    if names in ("", "all"):
        return path, [*claims]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(
                f"{path} has no claim {name!r}; did you mean {nearest(name, known)}? There are: "
                f"{', '.join(known)}"
            )
    return path, [known[name] for name in chosen]


def check_claims(path: str | Path, claims: Sequence[Claim]) -> None:
    """UserError for claims or arms of one name, and for rules and numbers that cannot be."""
    arms: dict[str, Arm] = {}
    if len({claim.name for claim in claims}) < len(claims):
        raise UserError(f"{path}: two claims have the same name")
    for claim in claims:
        where = f"{path}: claim {claim.name!r}"
        if not claim.tests or claim.seeds < 1:
            raise UserError(f"{where} needs a test and at least one seed")
        for test in (*claim.tests, *claim.conditions):
            if test.rule not in RULES:
                raise UserError(
                    f"{where}: there is no rule {test.rule!r}; choose {', '.join(RULES)}"
                )
            if not 0 <= test.margin < math.inf or (test.rule == "equivalent" and not test.margin):
                raise UserError(f"{where}: {test.margin} cannot be the margin of {test.rule!r}")
        for arm in claim.arms:
            if not re.fullmatch(r"[\w.+-]+", arm.name):
                raise UserError(f"{where}: {arm.name!r} names a directory: letters, digits, _.+-")
            if arms.setdefault(arm.name, arm) != arm:
                raise UserError(f"{where}: another arm is called {arm.name!r} too")
