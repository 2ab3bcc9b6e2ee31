"""Scorers of (prompt, response) texts, and their weighted sum.

    model      a reward model's score, computed elsewhere and given
    environment  the rewards of the answer's environment, added; given too
    gold       what the exact verifier of the record's task gives, in [0, 1]: the town's scorer, or
               as "number" for GSM8K and every record with a number as meta["answer"]
    correct    1 if that verifier says that the reply is right, else 0
    safe       that verifier's component of this name, where it has one: the town's
    number     1 if the response's number is exactly meta["answer"]'s, else 0: the one it states, or
               its last (see `stated_answers`)
    math       1 if the response's answer, stated or last, is mathematically meta["answer"], else 0:
               fractions, roots, sets, intervals, formulas; decimals to a millionth. By math-verify,
               in a separate process; an answer that takes MATH_SECONDS or too much memory is wrong
    exact      1 if the response is meta["answer"], or without one meta["reference"], else 0
    regex      1 if the pattern is found in the response, else 0; in a separate process too
    length     the response's tokens; where an environment answers, those drawn in all turns
    path/to/file.py:function    a user's own, run in a separate process (see `worker`)

A user's function is called as f(prompts, responses, **columns) and returns a list of numbers, one
per response. `prompts` are lists of {"role", "content"}; a column holds every prompt's meta value
of a key that all have, and `ids` the prompts' ids; columns that the function has no parameter for
are left out, and meta keys named ids, prompts or responses are never passed.

A missing reward never counts as 0: it ends the run, or masks its example and is printed.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.child import ChildFault
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.rewards.worker import Worker
from rlhf_jax.tasks.builders import verify
from rlhf_jax.tasks.public_sets import number_verdict
from rlhf_jax.tasks.task import Verdict

_GIVEN = ("model", "environment")  # computed elsewhere
NAMES = (*_GIVEN, "gold", "correct", "safe", "number", "math", "exact", "regex", "length")
"""The scorers that are no user's function."""

_FUNCTION = re.compile(r".+\.py:[^\W\d]\w*")
MATH_SECONDS = 5.0
"""How long "math" may take for one response."""

_HERE = Path(__file__).parent
_OWN = {"regex": f"{_HERE / 'regex.py'}:search", "math": f"{_HERE / 'mathematics.py'}:equal"}
_LARGEST = float(np.finfo(np.float32).max)
# A loss sums squares of scores; float32 holds those of 2^24 scores as large as this, 4.5e15.
_LARGEST_TOTAL = math.sqrt(_LARGEST) / 2**12
_RESERVED = ("ids", "prompts", "responses")


def parse_rewards(spec: str) -> dict[str, float]:
    """ "model=1,length=-0.01" → {"model": 1.0, "length": -0.01}; a name alone has weight 1.

    Raises:
        UserError: a name is unknown or stands twice, a weight is no finite number, there is none.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, weight = part.rpartition("=")  # a path may hold "=" too
        name, weight = (name.strip(), weight.strip()) if equals else (part, "1")
        _check_name(name)
        if name in weights:
            raise UserError(f"rewards: {name!r} is named twice in {spec!r}")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"rewards: the weight of {name!r} is no finite number: {weight!r}")
    if not weights:
        raise UserError(f"rewards: none is named; write name=weight, e.g. {NAMES[1]}=1")
    return weights


def _check_name(name: str) -> None:
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise UserError("rewards: 'math' needs the package math-verify: pip install math-verify")
    if name in NAMES or _FUNCTION.fullmatch(name):
        return
    if name.partition(":")[0].endswith(".py"):
        raise UserError(f"rewards: {name!r} names no function; write file.py:function")
    raise UserError(
        f"rewards: unknown {name!r}; did you mean {nearest(name, NAMES)!r}? There are "
        f"{', '.join(NAMES)} and file.py:function"
    )


@dataclass(frozen=True)
class Scores:
    """The worth of N responses.

    total: [N] f64, the weighted sum, NaN where it is not valid. valid: [N] bool. components: each
    scorer's own [N] f64 by name, NaN where it failed. failures: how many examples each reason
    ("name: reason") made invalid; one with two reasons is in both.
    """

    total: np.ndarray
    valid: np.ndarray
    components: Mapping[str, np.ndarray]
    failures: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, which keep every bit."""
        components = {name: values.tolist() for name, values in self.components.items()}
        arrays = {"total": self.total.tolist(), "valid": self.valid.tolist()}
        return arrays | {"components": components, "failures": dict(self.failures)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Scores:
        """The inverse of `to_json`."""
        components = {name: np.array(x, np.float64) for name, x in said["components"].items()}
        total, valid = np.array(said["total"], np.float64), np.array(said["valid"], bool)
        return cls(total, valid, components, said["failures"])


@dataclass(frozen=True)
class _Fault:
    """Why an example has no score: `reason` for counting, `detail` for people."""

    reason: str
    detail: str


_Values = tuple[np.ndarray, dict[int, _Fault]]
"""[N] scores, and by index the faults of those without one."""


class TextScorers:
    """The scorers named by `weights`; a context manager that owns the processes of some.

    Args:
        weights: see `parse_rewards`.
        pattern: what "regex" searches for.
        timeout_seconds: how long a user's function, or "regex", may take for one batch.
        on_error: "fail" ends the run at the first response without a score, naming it; "mask"
            makes such responses invalid and counts them: all of a batch whose function raises,
            returns another number of scores, times out or ends its process, and all of one that
            "regex" times out on. It prints the first of each reason, and their number each time it
            has doubled.

    Attributes:
        failed: reason → {"first": the line printed, "count": of responses left out so far}.

    Raises:
        UserError: an option is wrong, or a user's file or function can't be loaded.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        pattern: str = "",
        timeout_seconds: float = 60.0,
        on_error: str = "fail",
    ) -> None:
        for name in weights:
            _check_name(name)
        if on_error not in ("fail", "mask"):
            raise UserError(f"rewards: on_error is fail or mask, not {on_error!r}")
        if not 0 < timeout_seconds < math.inf:
            raise UserError(f"rewards: timeout_seconds must be positive, not {timeout_seconds}")
        if bool(pattern) != ("regex" in weights):
            raise UserError("rewards: the scorer 'regex' and the option pattern need each other")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            message = f"rewards: pattern {pattern!r} is no regular expression: {error}"
            raise UserError(message) from None
        self._weights, self._pattern = dict(weights), pattern
        self._seconds, self._mask = timeout_seconds, on_error == "mask"
        self.failed: dict[str, dict[str, Any]] = {}
        self._printed: Counter[str] = Counter()
        self._workers: dict[str, Worker] = {}
        try:
            for name in weights:
                if name in _OWN or _FUNCTION.fullmatch(name):
                    self._workers[name] = Worker(_OWN.get(name, name))
        except BaseException as error:
            self.close()
            if isinstance(error, ChildFault):
                line = f"reward {name!r} can't be loaded: {error.detail}"
                raise UserError(line) from error
            raise

    def __enter__(self) -> TextScorers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers.values():
            worker.close()

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        lengths: Sequence[int] | np.ndarray,
        given: Mapping[str, np.ndarray] = {},
    ) -> Scores:
        """Scores N responses, each to its own prompt.

        Args:
            lengths: [N], tokens of each response.
            given: [N] components computed elsewhere: "model", and any other instead of computing it
                here.

        Raises:
            UserError: with on_error "fail", a response has no score: names the scorer and prompt.
        """
        count = len(responses)
        if not len(prompts) == len(lengths) == count:
            raise ValueError(f"{len(prompts)} prompts, {count} responses, {len(lengths)} lengths")
        if unknown := given.keys() - self._weights.keys():
            raise ValueError(f"given components without a weight: {sorted(unknown)}")
        for name in _GIVEN:
            if name in self._weights and name not in given:
                raise ValueError(f"the component {name!r} has a weight and must be given")

        ids, components = [p.id for p in prompts], dict.fromkeys(self._weights, np.zeros(0))
        valid, failures, total = np.ones(count, bool), Counter[str](), np.zeros(count)
        for name in self._weights if count else ():
            if name in given:
                values, faults = _check_values(given[name], count)
            elif name == "length":
                values, faults = np.array(lengths, np.float64), {}
            elif name == "math":
                values, faults = self._mathematics(prompts, responses)
            elif name in self._workers:
                values, faults = self._call(name, prompts, responses)
            else:
                values, faults = _each(_VERIFIERS[name], prompts, responses)
            faults = _out_of_range(values, _LARGEST) | faults
            failures += self._settle(name, faults, ids)
            valid[[*faults]], values[[*faults]] = False, np.nan
            components[name] = values
        for name, weight in self._weights.items():
            total += weight * components[name]
        faults = _out_of_range(np.where(valid, total, 0.0), _LARGEST_TOTAL)
        failures += self._settle("total", faults, ids)
        valid[[*faults]] = False
        total[~valid] = np.nan
        return Scores(total, valid, components, dict(failures))

    def _settle(self, name: str, faults: Mapping[int, _Fault], ids: Sequence[str]) -> Counter[str]:
        """Ends the run at a fault, or counts the faults by reason, also in `failed`.

        Prints the first line of each reason, and the number left out each time it has doubled.
        """
        if faults and not self._mask:
            raise UserError(
                f"{_describe(name, faults, ids)}; mend it, or leave such responses out "
                "with on_error=mask"
            )
        counts: Counter[str] = Counter()
        for kind in sorted({fault.reason for fault in faults.values()}):
            alike = {i: fault for i, fault in faults.items() if fault.reason == kind}
            line, reason = _describe(name, alike, ids), f"{name}: {kind}"
            counts[reason] = len(alike)
            so_far = self.failed.setdefault(reason, {"first": line, "count": 0})
            so_far["count"] += len(alike)
            if so_far["count"] < 2 * self._printed[reason]:
                continue
            if not self._printed[reason]:
                print(f"warning: {line}; left out and counted (reward.on_error=mask)", flush=True)
            else:
                print(
                    f"warning: reward {reason}: {so_far['count']:,} responses left out", flush=True
                )
            self._printed[reason] = so_far["count"]
        return counts

    def _call(self, name: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> _Values:
        """The values of a scorer in a process of its own."""
        if name == "regex":
            request = {"prompts": [], "columns": {"pattern": self._pattern}}
        else:
            request = _make_request(prompts)
        try:
            values, wrong = self._workers[name].call(
                request | {"responses": [*responses]}, self._seconds
            )
        except ChildFault as fault:
            return _all_wrong(len(responses), fault.reason, fault.detail)
        faults = {i: _Fault("not a number", f"got {instead}") for i, instead in wrong.items()}
        return np.array(values, np.float64), faults

    def _mathematics(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> _Values:
        """The values of "math", one response at a time: a model may write 9^9^9^9."""
        seconds, slow = min(MATH_SECONDS, self._seconds), 0

        def right(prompt: Prompt, response: str) -> float:
            nonlocal slow
            columns = {"answers": [_reference(prompt, "answer")]}
            request = {"prompts": [], "responses": [response], "columns": columns}
            try:
                (value,), _ = self._workers["math"].call(request, seconds)
            except ChildFault as fault:
                if fault.reason not in ("timed out", "died"):
                    raise UserError(fault.detail) from fault
                slow += 1
                return 0.0
            return value

        values = _each(right, prompts, responses)
        if slow:
            logging.warning("reward 'math': %d answers were too long to compare: wrong", slow)
        return values


def check_records(name: str, prompts: Sequence[Prompt]) -> None:
    """UserError for prompts whose record lacks what that scorer, one of COMPARING, needs."""
    _, faults = _each(COMPARING[name], prompts, [""] * len(prompts))
    if faults:
        line = _describe(name, faults, [prompt.id for prompt in prompts])
        raise UserError(f"{line}; leave such answers out with reward.on_error=mask")


def _make_request(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The arguments of a user's function that describe the prompts."""
    shared = set.intersection(*(set(prompt.meta) for prompt in prompts)).difference(_RESERVED)
    columns = {key: [prompt.meta[key] for prompt in prompts] for key in sorted(shared)}
    return {
        "prompts": [[m.to_json() for m in prompt.messages] for prompt in prompts],
        "columns": columns | {"ids": [prompt.id for prompt in prompts]},
    }


def _describe(name: str, faults: Mapping[int, _Fault], ids: Sequence[str]) -> str:
    """One line about the first fault, and which prompts fail for the same reason."""
    first, *others = sorted(faults)
    fault = faults[first]
    alike = [index for index in others if faults[index].reason == fault.reason]
    where = f"prompt {ids[first]!r}"
    if len(alike) == 1:
        where += f" and {ids[alike[0]]!r}"
    elif alike:
        where += f" and {len(alike)} others up to {ids[alike[-1]]!r}"
    return f"reward {name!r}, {where}: {fault.detail}"


def _all_wrong(count: int, reason: str, detail: str) -> _Values:
    return np.full(count, np.nan), dict.fromkeys(range(count), _Fault(reason, detail))


def _out_of_range(values: np.ndarray, largest: float) -> dict[int, _Fault]:
    """The values a loss in float32 can't hold."""
    faults = {}
    for index in np.flatnonzero(~(np.abs(values) <= largest)).tolist():
        if math.isfinite(values[index]):
            detail = f"the score {values[index]:g} is too large, over {largest:.2g}"
            faults[index] = _Fault("too large", f"{detail}: a loss in float32 overflows")
        else:
            faults[index] = _Fault("not finite", f"the score {values[index]:g} is not finite")
    return faults


def _check_values(values: np.ndarray, count: int) -> _Values:
    array = np.asarray(values)
    if array.shape != (count,):
        return _all_wrong(count, "wrong length", f"has shape {array.shape} for {count} responses")
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        return _all_wrong(count, "not a number", f"got {array.dtype} scores")
    return array.astype(np.float64), {}


def _each(
    scorer: Callable[[Prompt, str], float], prompts: Sequence[Prompt], responses: Sequence[str]
) -> _Values:
    """A scorer's values, one response at a time; its UserErrors are faults of single examples."""
    values, faults = np.full(len(responses), np.nan), {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            values[index] = scorer(prompt, response)
        except UserError as error:
            faults[index] = _Fault("no reference", str(error))
    return values, faults


def _reference(prompt: Prompt, *keys: str) -> str:
    for key in keys:
        if key in prompt.meta:
            return prompt.meta[key]
    named = " or ".join(f"meta[{key!r}]" for key in keys)
    raise UserError(f"the record has no {named} to compare with")


def _component(verdict: Verdict, name: str) -> float:
    if name not in verdict.components:
        known = ", ".join(verdict.components)
        raise UserError(f"its verifier has no component {name!r}; there are: {known}")
    return verdict.components[name]


_VERIFIERS: Mapping[str, Callable[[Prompt, str], float]] = {
    "gold": lambda prompt, response: verify(prompt, response).total,
    "correct": lambda prompt, response: float(verify(prompt, response).right),
    "safe": lambda prompt, response: _component(verify(prompt, response), "safe"),
    "number": lambda prompt, response: number_verdict(prompt, response).total,
    "exact": lambda prompt, response: float(
        response.strip() == _reference(prompt, "answer", "reference").strip()
    ),
}
"""The scorers that need the prompt's record and the response only."""

COMPARING = {**_VERIFIERS, "math": lambda prompt, _: float(bool(_reference(prompt, "answer")))}
"""The scorers that compare with a prompt's record; of "math" only whether it has an answer."""
