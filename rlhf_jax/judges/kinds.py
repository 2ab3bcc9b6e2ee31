"""Judges that are had from elsewhere: a language model, a reward model, a user's function."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import jax
import numpy as np
from scipy.special import expit

from rlhf_jax.child import ChildFault
from rlhf_jax.data.conversation import render_replies
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import in_record_order, map_rows, response_logprobs
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.endpoint import EndpointJudge
from rlhf_jax.judges.judge import Answers, Comparison, Judge, People, SimulatedJudge, question
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.rewards.worker import Worker
from rlhf_jax.training.saved_model import Model, load_model

FIRST, SECOND = "First.", "Second."
"""The two replies between which a language model chooses."""
NEITHER = 0.01
"""A model that gives both of these together a smaller probability has not answered."""
_TOKENS = 8192  # of a forward pass
_BATCH = 64  # comparisons of one call of a user's function
_FUNCTION = re.compile(r".+\.py:[^\W\d]\w*")


@dataclass(frozen=True)
class LanguageModelJudge:
    """A language model that is asked in words, by the log-probs of its two possible replies.

    P(first ≻ second) = π(FIRST) / (π(FIRST) + π(SECOND)), each with the end of its turn. It has no
    verdict on what its context does not hold, and where it says neither (see `NEITHER`), as a model
    does that never learnt to be asked.
    """

    model: Model

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`."""
        asked = [(question(each, principle), (FIRST, SECOND)) for each in shown]
        values, missing = _by_rows(self.model, asked, self._logprobs)
        with np.errstate(invalid="ignore"):  # of NaN, where something is missing already
            both = np.logaddexp(*values.T)
        for i in np.flatnonzero(both < np.log(NEITHER)).tolist():
            missing.setdefault(i, f"says neither {FIRST} nor {SECOND}")
        return Answers(np.exp(values[:, 0] - both), missing)

    def _logprobs(self, rows: Arrays) -> np.ndarray:
        model = self.model
        return response_logprobs(model.config, model.params, rows, _TOKENS, "judging")


_score = jax.jit(sequence_scores, static_argnums=0)


@dataclass(frozen=True)
class RewardModelJudge:
    """A reward model: σ of the difference of its scores, whatever the principle and the order."""

    model: Model

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`; it has no verdict on answers that its context does not hold."""
        answered = [(each.prompt.messages, (each.first, each.second)) for each in shown]
        values, missing = _by_rows(self.model, answered, self._scores)
        same = np.array([each.first == each.second for each in shown], bool)
        difference = np.where(same, 0.0, values[:, 0] - values[:, 1])
        return Answers(expit(difference), missing)

    def _scores(self, rows: Arrays) -> np.ndarray:
        model = self.model
        return map_rows(partial(_score, model.config.forward), model.params, rows, _TOKENS)


def _by_rows(
    model: Model,
    asked: Sequence[tuple[Sequence[Message], tuple[str, str]]],
    read: Callable[[Arrays], np.ndarray],
) -> tuple[np.ndarray, dict[int, str]]:
    """[N, 2] f64 of two replies to each prompt, NaN of what is too long, and what is missing."""
    groups, missing = [], dict[int, str]()
    for i, (messages, replies) in enumerate(asked):
        prompt, branches = render_replies(messages, replies, model.tokenizer)
        if len(prompt) + max(map(len, branches)) > model.config.max_length:
            missing[i] = f"longer than the judge's {model.config.max_length} tokens"
        else:
            groups.append(Group(prompt, tuple(branches), i))
    values = np.full((len(asked), 2), np.nan)
    if groups:
        longest = max(group.size for group in groups)
        rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=2)
        values[[group.example for group in groups]] = in_record_order(read(rows), rows)
    return values, missing


@dataclass(frozen=True)
class FunctionJudge:
    """A user's function f(prompts, responses, rivals, principles) in a process of its own.

    It returns for each response P(it ≻ its rival). `prompts` are lists of {"role", "content"},
    `principles` the questions; it may leave the last two out, and name `ids`, the prompts', too.
    A call that fails leaves the verdicts missing that were asked for.
    """

    worker: Worker
    seconds: float = 60.0

    def __call__(self, shown: Sequence[Comparison], principle: Principle) -> Answers:
        """See `Judge`."""
        values, missing = np.full(len(shown), np.nan), dict[int, str]()
        for start in range(0, len(shown), _BATCH):
            part = shown[start : start + _BATCH]
            columns = {
                "rivals": [each.second for each in part],
                "principles": [principle.question] * len(part),
                "ids": [each.prompt.id for each in part],
            }
            prompts = [[m.to_json() for m in each.prompt.messages] for each in part]
            request = {"prompts": prompts, "responses": [each.first for each in part]}
            try:
                said, wrong = self.worker.call(request | {"columns": columns}, self.seconds)
            except ChildFault as fault:
                why = f"{fault.reason}: {fault.detail}"
                missing |= {start + i: why for i in range(len(part))}
                continue
            values[start : start + len(part)] = said
            missing |= {start + i: f"not a number but {got}" for i, got in wrong.items()}
        return Answers(values, missing)


@contextmanager
def open_judge(spec: str, seed: int) -> Iterator[Judge]:
    """The judge that is named: "gold,sensitivity=0.9,…", "people", "file.py:function", a directory.

    In the directory is a language model or a reward model. "https://host/v1,model=name" is a chat
    model behind an OpenAI-compatible address.

    Raises:
        UserError: there is no such judge.
    """
    if spec.partition(",")[0] == "gold":
        yield _simulated(spec, seed)
    elif spec == "people":
        yield People(seed=seed)
    elif _FUNCTION.fullmatch(spec):
        try:
            worker = Worker(spec)
        except ChildFault as fault:
            raise UserError(f"--judge={spec} can't be loaded: {fault.detail}") from fault
        try:
            yield FunctionJudge(worker)
        finally:
            worker.close()
    elif spec.startswith(("https://", "http://")):
        address, _, name = spec.partition(",model=")
        yield EndpointJudge(address.rstrip("/"), name)
    elif spec.endswith(".py"):
        raise UserError(f"--judge={spec} names no function; write file.py:function")
    else:
        model = load_model(spec)
        yield (LanguageModelJudge if model.config.head == "lm" else RewardModelJudge)(model)


def _simulated(spec: str, seed: int) -> SimulatedJudge:
    known = [each.name for each in fields(SimulatedJudge) if each.name != "seed"]
    options: dict[str, float] = {}
    for part in spec.split(",")[1:]:
        name, _, value = part.partition("=")
        if name not in known or name in options:
            raise UserError(f"--judge={spec}: write each of {', '.join(known)} once, as name=0.9")
        try:
            options[name] = float(value)
        except ValueError:
            raise UserError(f"--judge={spec}: {name} is a number, not {value!r}") from None
    return SimulatedJudge(**options, seed=seed)
