"""Scorers of (prompt, response) texts, and their weighted sum.

    model      a reward model's score, computed elsewhere and given
    gold       the town's exact scorer, the total in [0, 1]
    correct    1 if the town's scorer says the reply is right, else 0
    number     1 if the response's number is exactly meta["answer"]'s, else 0: the one it states, or
               its last (see `answers.number`)
    math       1 if the response's answer, stated or last, is mathematically meta["answer"], else 0:
               fractions, roots, sets, intervals, formulas; decimals to a millionth. By math-verify,
               in a separate process; an answer that takes MATH_SECONDS or too much memory is wrong
    exact      1 if the response is meta["answer"], or without one meta["reference"], else 0
    regex      1 if the pattern is found in the response, else 0; in a separate process too
    length     the response's tokens
    path/to/file.py:function    a user's own, run in a separate process (see `worker`)

A user's function is called as f(prompts, responses, **columns) and returns a list of numbers, one a
response. `prompts` are lists of {"role", "content"}; a column holds every prompt's meta value of a
key that all have, and `ids` the prompts' ids; columns the function has no parameter for are left
out, and meta keys named ids, prompts or responses are never passed.

A reward that can't be had is never taken for 0: it ends the run, or masks the example and is said.
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
from types import TracebackType
from typing import Any

import numpy as np

from rlhf_jax.child import ChildFault
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.rewards.answers import number
from rlhf_jax.rewards.worker import Worker
from rlhf_jax.tasks.town.gold import gold_score, is_correct

NAMES = ("model", "gold", "correct", "number", "math", "exact", "regex", "length")
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
    """What N responses are worth.

    total: [N] f64, the weighted sum, NaN where it is not valid. valid: [N] bool. components: each
    scorer's own [N] f64 by name, NaN where it failed. failures: how many examples each reason
    ("name: reason") made invalid; one with two reasons is in both.
    """

    total: np.ndarray
    valid: np.ndarray
    components: Mapping[str, np.ndarray]
    failures: Mapping[str, int]


@dataclass(frozen=True)
class _Fault:
    """Why an example has no score: `reason` for counting, `detail` for people."""

    reason: str
    detail: str


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
        self._weights = dict(weights)
        self._seconds = timeout_seconds
        self._mask = on_error == "mask"
        self.failed: dict[str, dict[str, Any]] = {}
        self._said: Counter[str] = Counter()
        _check_pattern(pattern)
        self._pattern = pattern
        self._workers: dict[str, Worker] = {}
        try:
            for name in weights:
                if name in _OWN or _FUNCTION.fullmatch(name):
                    self._workers[name] = _start(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TextScorers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        if "model" in self._weights and "model" not in given:
            raise ValueError("the component 'model' has a weight and must be given")

        valid, failures = np.ones(count, bool), Counter[str]()

        def settle(
            name: str, values: np.ndarray, faults: dict[int, _Fault], largest: float = _LARGEST
        ) -> np.ndarray:
            faults = _out_of_range(values, largest) | faults
            if faults and not self._mask:
                raise UserError(
                    f"{_describe(name, faults, prompts)}; mend it, or leave such responses out "
                    "with on_error=mask"
                )
            for reason in sorted({fault.reason for fault in faults.values()}):
                alike = {i: fault for i, fault in faults.items() if fault.reason == reason}
                failures[f"{name}: {reason}"] = len(alike)
                self._say(f"{name}: {reason}", len(alike), _describe(name, alike, prompts))
            failed = [*faults]
            valid[failed] = False
            values[failed] = np.nan
            return values

        components: dict[str, np.ndarray] = {}
        for name in self._weights if count else ():
            if name in given:
                found = _given(given[name], count)
            elif name == "length":
                found = np.array(lengths, np.float64), {}
            elif name == "math":
                found = self._mathematics(prompts, responses)
            elif name in self._workers:
                found = self._call(name, prompts, responses)
            else:
                found = _each(_VERIFIERS[name], prompts, responses)
            components[name] = settle(name, *found)
        if not count:
            components = {name: np.zeros(0) for name in self._weights}

        total = np.zeros(count)
        for name, weight in self._weights.items():
            total += weight * components[name]
        total = settle("total", np.where(valid, total, 0.0), {}, _LARGEST_TOTAL)
        total[~valid] = np.nan
        return Scores(total, valid, components, dict(failures))

    def _say(self, reason: str, count: int, line: str) -> None:
        kept = self.failed.setdefault(reason, {"first": line, "count": 0})
        kept["count"] += count
        if not self._said[reason]:
            print(f"warning: {line}; left out and counted (reward.on_error=mask)", flush=True)
        elif kept["count"] >= 2 * self._said[reason]:
            print(f"warning: reward {reason}: {kept['count']:,} responses left out", flush=True)
        else:
            return
        self._said[reason] = kept["count"]

    def _call(
        self, name: str, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[np.ndarray, dict[int, _Fault]]:
        """The values of a scorer in a process of its own and what is wrong with them."""
        if name == "regex":
            request = {"prompts": [], "columns": {"pattern": self._pattern}}
        else:
            request = _described(prompts)
        request["responses"] = list(responses)
        try:
            values, wrong = self._workers[name].call(request, self._seconds)
        except ChildFault as fault:
            return _all_wrong(len(responses), fault.reason, fault.detail)
        faults = {i: _Fault("not a number", f"got {what}") for i, what in wrong.items()}
        return np.array(values, np.float64), faults

    def _mathematics(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[np.ndarray, dict[int, _Fault]]:
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

        found = _each(right, prompts, responses)
        if slow:
            logging.warning("reward 'math': %d answers were too long to compare: wrong", slow)
        return found


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"rewards: pattern {pattern!r} is no regular expression: {error}") from None


def _described(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a user's function is told of the prompts."""
    shared = set.intersection(*(set(prompt.meta) for prompt in prompts)).difference(_RESERVED)
    columns = {key: [prompt.meta[key] for prompt in prompts] for key in sorted(shared)}
    return {
        "prompts": [[m.to_json() for m in prompt.messages] for prompt in prompts],
        "columns": columns | {"ids": [prompt.id for prompt in prompts]},
    }


def _start(name: str) -> Worker:
    try:
        return Worker(_OWN.get(name, name))
    except ChildFault as fault:
        raise UserError(f"reward {name!r} can't be loaded: {fault.detail}") from fault


def _describe(name: str, faults: Mapping[int, _Fault], prompts: Sequence[Prompt]) -> str:
    """One line about the first fault, and which prompts fail for the same reason."""
    first, *others = sorted(faults)
    fault = faults[first]
    alike = [index for index in others if faults[index].reason == fault.reason]
    where = f"prompt {prompts[first].id!r}"
    if len(alike) == 1:
        where += f" and {prompts[alike[0]].id!r}"
    elif alike:
        where += f" and {len(alike)} others up to {prompts[alike[-1]].id!r}"
    return f"reward {name!r}, {where}: {fault.detail}"


def _all_wrong(count: int, reason: str, detail: str) -> tuple[np.ndarray, dict[int, _Fault]]:
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


def _given(values: np.ndarray, count: int) -> tuple[np.ndarray, dict[int, _Fault]]:
    array = np.asarray(values)
    if array.shape != (count,):
        return _all_wrong(count, "wrong length", f"has shape {array.shape} for {count} responses")
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        return _all_wrong(count, "not a number", f"got {array.dtype} scores")
    return array.astype(np.float64), {}


def _each(
    scorer: Callable[[Prompt, str], float], prompts: Sequence[Prompt], responses: Sequence[str]
) -> tuple[np.ndarray, dict[int, _Fault]]:
    """A scorer's values, one response at a time; its UserErrors are faults of single examples."""
    values, faults = np.full(len(responses), np.nan), {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            values[index] = scorer(prompt, response)
        except UserError as error:
            faults[index] = _Fault("no reference", str(error))
    return values, faults


def _number_matches(prompt: Prompt, response: str) -> float:
    wanted = number(_reference(prompt, "answer"))
    if wanted is None:
        raise UserError(f"meta['answer'] holds no number: {prompt.meta['answer']!r}")
    return float(number(response) == wanted)


def _is_reference(prompt: Prompt, response: str) -> float:
    return float(response.strip() == _reference(prompt, "answer", "reference").strip())


def _reference(prompt: Prompt, *keys: str) -> str:
    for key in keys:
        if key in prompt.meta:
            return prompt.meta[key]
    wanted = " or ".join(f"meta[{key!r}]" for key in keys)
    raise UserError(f"the record has no {wanted} to compare with")


_VERIFIERS: Mapping[str, Callable[[Prompt, str], float]] = {
    "gold": lambda prompt, response: gold_score(prompt, response).total,
    "correct": lambda prompt, response: float(is_correct(prompt, response)),
    "number": _number_matches,
    "exact": _is_reference,
}
"""The scorers that need the prompt's record and the response only."""
