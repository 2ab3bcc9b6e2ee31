"""Trajectories: answers to prompts that an environment replies to, from the side of the engine.

An environment runs in a process of its own (`worker`), beside the first of several hosts alone,
which tells the others what it said. Of trajectories that the engine has decoded up to the end of a
turn, all are stepped by one call. What they are told is rendered once, as plain text between the
tokens of its role, and never again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.child import Child, ChildFault
from rlhf_jax.config import Only, option
from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.calls import is_error
from rlhf_jax.data.conversation import Tokenizer, render_continuation, render_prompt
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.digests import ROOT as PACKAGE
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

LOAD_SECONDS = 120.0  # for importing the user's files
_SLACK = 30.0  # seconds beyond those of each trajectory, until the process itself counts as hanging
_SOME = Only("named", told="file or environment.tools")


@dataclass(frozen=True)
class EnvironmentOptions:
    """What answers a policy's turns: an environment, or tools that it may call."""

    # "mine.py:Env": environments/environment.py, or TRL's class. A path that begins with rlhf_jax/
    # is of this package, where there is no such file. "reasoning_gym:leg_counting" and
    # "textarena:GuessTheNumber-v0" are of those libraries.
    file: str = ""
    tools: str = ""  # "mine.py:calculate,mine.py:search": functions with types and docstrings
    # The schemas of the tools are told in the first turn of every prompt.
    describe: bool = option(True, only=_SOME)
    python: str = option("", only=_SOME)  # path of the interpreter that runs it; "": this one
    max_calls: int = option(8, least=1, only=_SOME)  # turns of a trajectory that are answered
    # Of the answer to one turn, and of a beginning.
    timeout_seconds: float = option(10.0, within="(0, inf)", only=_SOME)
    # What an error of the environment does; "mask": the trajectory is left out of training, and
    # counted; an evaluation judges as much of it as there is, and counts it.
    on_error: str = option("fail", choices=("fail", "mask"), only=_SOME)

    @property
    def named(self) -> list[str]:
        """The class and the functions, each "path.py:name"."""
        every = (each.strip() for each in (self.file, *self.tools.split(",")))
        return [_locate(each) for each in every if each]

    def find_python(self) -> str:
        """The path of `python`, this process's own for ""; UserError if there is no such program.

        It is not resolved: a virtual environment's is a link to another, and known by its place.
        """
        if not self.python:
            return sys.executable
        if (found := shutil.which(self.python)) is None:
            raise UserError(
                f"config: environment.python = {self.python!r}: there is no such program; give the "
                "path of a Python that has what the environment imports"
            )
        return found


def _locate(target: str) -> str:
    """The target, with its whole path if it is of this package and not of the current folder."""
    file = target.rpartition(":")[0]
    packaged = file.startswith(f"{PACKAGE.name}/") and not Path(file).exists()
    return str(PACKAGE.parent / target) if packaged else target


@dataclass
class Trajectory:
    """What became of one answer.

    Attributes:
      rewards: of each turn that the environment has taken, in order.
      calls, invalid: turns that were answered, and those among them by an error.
      told: the messages that answered each of those turns, in order.
      fault: why the environment could not go on; "" if it could.
    """

    index: int  # among those of the call
    record: Prompt
    sample: int
    rewards: list[float] = field(default_factory=list)
    calls: int = 0
    invalid: int = 0
    told: list[list[Message]] = field(default_factory=list)
    fault: str = ""

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return f"prompt {self.record.id!r}, sample {self.sample}"


_ADVICE = "mend it, or leave such trajectories out with environment.on_error=mask"


def environments_of(
    options: EnvironmentOptions | None, advice: str = _ADVICE
) -> AbstractContextManager[Environments | None]:
    """The `Environments` that a config names, None if it names none."""
    return Environments(options, advice) if options and options.named else nullcontext()


class Environments:
    """The process of the environments. Use as a context manager.

    Args:
        advice: what whoever reads of a fault that ends the run can do.

    Raises:
        UserError: a file, class or function can't be loaded, or a tool has no schema.
    """

    def __init__(self, options: EnvironmentOptions, advice: str = _ADVICE):
        self.options, self.advice = options, advice
        self._child: Child | None = None
        self._told: set[str] = set()
        self.schemas = hosts.by_first(self._start)

    def _start(self) -> list[dict[str, Any]]:
        named = self.options.named
        classes = 1 if self.options.file else 0
        arguments = {
            "environment": "".join(named[:classes]),
            "tools": named[classes:],
            "seconds": self.options.timeout_seconds,
        }
        blame = str(Path(named[0].rpartition(":")[0]).resolve())
        worker = str(Path(__file__).with_name("worker.py"))
        self._child = Child(
            worker, "load", arguments, LOAD_SECONDS, blame=blame, while_waiting=stop_point,
            isolated=bool(self.options.python), python=self.options.find_python(),
        )  # fmt: skip
        try:
            return self._child.call({"do": "schemas"}, LOAD_SECONDS)
        except ChildFault as fault:
            self.close()
            raise UserError(f"environment: {fault.detail}") from fault

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.close()

    def open(
        self, tokenizer: Tokenizer, records: Sequence[Prompt], samples: int, seeds: Sequence[int]
    ) -> Play:
        """Begins `samples` trajectories of each record, all of a record with its seed."""
        every = [(record, k) for record in records for k in range(samples)]
        trajectories = [Trajectory(i, *each) for i, each in enumerate(every)]
        values = [
            {"row": _row(record), "seed": seed}
            for record, seed in zip(records, seeds, strict=True)
            for _ in range(samples)
        ]
        play = Play(self, tokenizer, trajectories, samples)
        outcomes = self.ask("open", trajectories, values)
        for first in range(0, len(trajectories), samples):
            record, opened = records[first // samples], outcomes[first : first + samples]
            turns = [outcome["turns"] for outcome in opened if "turns" in outcome]
            if any(other != turns[0] for other in turns):
                raise UserError(
                    f"environment, {trajectories[first].name}: its answers were opened by "
                    "different turns: reset must follow from the row and the seed alone, and "
                    "instances share nothing"
                )
            messages = _messages(turns[0]) if turns else record.messages
            if self.schemas and self.options.describe:
                messages = (_with_tools(messages[0], self.schemas), *messages[1:])
            opening = dataclasses.replace(record, messages=tuple(messages))
            play.records.append(opening)
            try:
                play.prompts.append(render_prompt(opening.messages, tokenizer))
            except UserError as error:
                raise UserError(f"environment, {trajectories[first].name}: {error}") from error
        return play

    def ask(
        self, do: str, trajectories: Sequence[Trajectory], values: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The outcomes of one call of the process, those without a fault complete.

        A fault is kept in its trajectory.

        Raises:
            UserError: there is one, and environment.on_error is "fail".
        """
        if not trajectories:
            return []
        names = [str(each.index) for each in trajectories]
        with hosts.telling() as said:
            if self._child is not None:
                said.append(self._call({"do": do, "names": names, "values": [*values]}))
        for trajectory, outcome in zip(trajectories, said[0], strict=True):
            if "fault" in outcome:
                reason, detail = outcome["fault"]
                trajectory.fault = reason
                self._settle(trajectory, reason, detail)
        return said[0]

    def _call(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        assert self._child is not None
        count = len(request["names"])
        try:
            return self._child.call(request, count * self.options.timeout_seconds + _SLACK)
        except ChildFault as fault:  # of the process; with it all instances are gone
            return [{"fault": [fault.reason, fault.detail]}] * count

    def _settle(self, trajectory: Trajectory, reason: str, detail: str) -> None:
        """Ends the run at a fault, or counts it and prints the first of its reason."""
        line = f"environment, {trajectory.name}: {detail}"
        if self.options.on_error == "fail":
            raise UserError(f"{line}; {self.advice}")
        if reason not in self._told:
            self._told.add(reason)
            what = "left out of training, and counted (environment.on_error=mask)"
            print(f"warning: {line}; {what}", flush=True)


@dataclass
class Play:
    """The trajectories of one call of the engine, whose turns it answers: `Sampling.respond`.

    Attributes:
      trajectories: those of a record together, `samples` each.
      records, prompts: with the turns that open them, and their tokens.
    """

    environments: Environments
    tokenizer: Tokenizer
    trajectories: list[Trajectory]
    samples: int
    records: list[Prompt] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def check_room(self, limit: int, what: str) -> None:
        """UserError for a prompt that is too long with what opens it; `what` limits it, and how."""
        for record, tokens in zip(self.records, self.prompts, strict=True):
            if len(tokens) > limit:
                raise UserError(
                    f"environment, prompt {record.id!r}: with what opens it, tools among it, it "
                    f"has {len(tokens)} tokens, over {what}, say less, or set "
                    "environment.describe = False"
                )

    def respond(self, turns: Sequence[Any]) -> list[list[int] | None]:
        """Steps the trajectories that have said these `sampling.arguments.Turn`s, all at once."""
        spoken = [self.trajectories[t.prompt * self.samples + t.sample] for t in turns]
        described = [self.records[t.prompt].messages[0].more for t in turns]
        going = [i for i, each in enumerate(spoken) if not each.fault]
        texts = [self.tokenizer.decode_text(turns[i].tokens[:-1]) for i in going]
        answers: list[list[int] | None] = [None] * len(turns)
        outcomes = self.environments.ask("step", [spoken[i] for i in going], texts)
        for i, outcome in zip(going, outcomes, strict=True):
            trajectory = spoken[i]
            if trajectory.fault:
                continue
            trajectory.rewards.append(outcome["reward"])
            if outcome["done"]:
                answers[i] = []
            elif trajectory.calls < self.environments.options.max_calls:
                messages = _messages(outcome["turns"])
                trajectory.calls += 1
                trajectory.told.append(messages)
                trajectory.invalid += any(
                    message.role == "tool" and is_error(message.content) for message in messages
                )
                for_tools = "tools" in json.loads(described[i] or "{}")
                answers[i] = render_continuation(messages, self.tokenizer, for_tools=for_tools)
        return answers

    def end(self, finished: Sequence[bool]) -> None:
        """Adds what those trajectories are worth that were cut off before their end."""
        cut = [
            each
            for each, ended in zip(self.trajectories, finished, strict=True)
            if not ended and not each.fault
        ]
        outcomes = self.environments.ask("end", cut, [None] * len(cut))
        for trajectory, outcome in zip(cut, outcomes, strict=True):
            if not trajectory.fault:
                trajectory.rewards.append(outcome["reward"])


def trajectory_seeds(seed: int, ids: Sequence[int]) -> list[int]:
    """A seed of 31 bits for the environments of each prompt id: those of a prompt begin alike."""
    return [int(bits >> np.uint64(33)) for bits in random_bits(ids, seed)]


def _row(record: Prompt) -> dict[str, Any]:
    """What `reset` is given: the record's meta, which "id" and "prompt" take precedence over."""
    return {**record.meta, "id": record.id, "prompt": [m.to_json() for m in record.messages]}


def _messages(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    known = ("role", "content")
    more = [{k: v for k, v in turn.items() if k not in known} for turn in turns]
    return [
        Message(turn["role"], turn["content"], json.dumps(rest, ensure_ascii=False) if rest else "")
        for turn, rest in zip(turns, more, strict=True)
    ]


def _with_tools(message: Message, schemas: Sequence[Mapping[str, Any]]) -> Message:
    more = {**json.loads(message.more or "{}"), "tools": [*schemas]}
    return dataclasses.replace(message, more=json.dumps(more, ensure_ascii=False))
