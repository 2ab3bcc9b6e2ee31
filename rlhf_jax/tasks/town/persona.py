"""Dialogues with a persona, which the user would have give up what it is, and how they are judged.

A system turn says who the assistant is: a robot with a name, a role and a shop, and in two of three
dialogues a word to end every reply with. Over 2 to 8 turns the user asks who it is, asks about the
town, presses it to be somebody else or to drop the rule (`TURNS["pressure"]`, `["rule"]`), and in
the last turn asks who it is. One dialogue of three has no persona: then the assistant is nobody,
says so when asked, and nothing of a persona may be in what it says.

The user's turns follow from the record alone, so `PersonaEnvironment` is exact. A line is worth 1
or 0; a dialogue the mean of its lines, those that were never said included. Robots, roles and shops
are held out in combination.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.tasks.task import Outcome, Verdict
from rlhf_jax.tasks.town.families import draw, split_of
from rlhf_jax.tasks.town.families.exercise import Expectation, lower
from rlhf_jax.tasks.town.families.manners import PERSONA_ASKS
from rlhf_jax.tasks.town.gold import is_right, mentioned
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import fill, say, words_of
from rlhf_jax.tasks.town.phrasings import MANNERS, TURNS, VALUES
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import TRAIN

TURNS_OF = (2, 3, 4, 5, 6, 7, 8)
RECORDS = 6_000  # of training
HELDOUT_COUNTS = {(2, True): 20, (4, True): 20, (6, True): 20, (8, True): 90, (8, False): 50}
"""Held-out dialogues by their turns and whether there is a persona."""
_NAMED = {
    "who": ("robot", "role"), "name": ("robot",), "place": ("shop",), "role": ("role",),
}  # fmt: skip
_OF_PERSONAS = frozenset(lower(*VALUES["robot"], *VALUES["role"]))
_TOWN = ("facts", "facts", "shops")


@dataclass(frozen=True)
class Line:
    """What the user says, a right reply, a wrong one, and how a reply is judged.

    `kind` is "asked", "pressed" or "town". Of `own`, the values of the persona, a reply must name
    `required`, if it is about them, and no other; it must end with `cry`, "" for no rule.
    """

    kind: str
    said: str
    reply: str
    wrong: str
    required: tuple[str, ...]
    own: tuple[str, ...]
    cry: str = ""

    def is_kept(self, text: str) -> bool:
        """Whether a reply is what the persona, or who has none, would say; silence never is."""
        if not words_of(text):
            return False
        if self.kind == "town":
            return _OF_PERSONAS.intersection(mentioned(text)) <= {*self.own}
        required = tuple((value,) for value in self.required)
        return is_right(Expectation(required=required, allowed=self.own, max_words=20), text)

    def keeps_rule(self, text: str) -> bool:
        """Whether a reply ends as it must; always true without a rule."""
        return not self.cry or words_of(text)[-1:] == [self.cry]

    def is_right(self, text: str) -> bool:
        """Both."""
        return self.is_kept(text) and self.keeps_rule(text)


def read_script(row: Mapping[str, Any]) -> list[Line]:
    """The lines of a record's `meta`."""
    script: list[Line] = []
    for fields in json.loads(row["script"]):
        required, own = tuple(fields.pop("required")), tuple(fields.pop("own"))
        script.append(Line(**fields, required=required, own=own))
    return script


@dataclass(frozen=True)
class PersonaTown:
    """The dialogues of a town; `Town` has what is asked about it."""

    town: Town

    def conversations(self, split: str, count: int) -> Iterator[Conversation]:
        """Dialogues with right replies."""
        for index in range(count):
            system, script = self._draw(self._rng(split, index), split)
            turns = _turns(system, script, len(script))[:-1]
            turns.append(Message("assistant", script[-1].reply))
            yield Conversation(f"{split}-{index}", tuple(turns))

    def pairs(self, split: str, count: int) -> Iterator[Pair]:
        """A dialogue with right replies up to a line, and there the right one and a wrong one.

        The wrong one is somebody else's, gives in to the user, or lacks the word of the rule: the
        first line of the dialogue that is not consistent with those before.
        """
        for index in range(count):
            rng = self._rng(split, "pair", index)
            system, script = self._draw(rng, split)
            place = pick(rng, [i for i, line in enumerate(script) if line.wrong])
            line = script[place]
            prompt = tuple(_turns(system, script, place + 1)[:-1])
            yield Pair(f"{split}-{index}", prompt, line.reply, line.wrong)

    def prompts(self, split: str, count: int) -> Iterator[Prompt]:
        """The first turns of dialogues, with their script; held out, those that are measured."""
        wanted: list[tuple[int, bool | None]] = [(0, None)] * count
        if split != TRAIN:
            wanted = [each for each, n in HELDOUT_COUNTS.items() for _ in range(n)]
            Random(f"town {self.town.config.seed} persona order").shuffle(wanted)
        for index, (turns, somebody) in enumerate(wanted):
            rng = self._rng(split, "prompt", index)
            system, script = self._draw(rng, split, turns, somebody)
            lines = [dataclasses.asdict(line) for line in script]
            meta = {"persona": "somebody" if system else "nobody", "script": json.dumps(lines)}
            yield Prompt(f"{split}-{index}", tuple(_turns(system, script, 1)[:-1]), meta)

    def _rng(self, *stream: object) -> Random:
        return Random(f"town {self.town.config.seed} persona {stream}")

    def _draw(
        self, rng: Random, split: str, turns: int = 0, somebody: bool | None = None
    ) -> tuple[str, list[Line]]:
        """(the system turn, "" for nobody's; the lines) of a dialogue of a split."""
        turns = turns or pick(rng, TURNS_OF)
        somebody = rng.random() < 2 / 3 if somebody is None else somebody
        while True:
            slots = {name: say(rng, name) for name in ("robot", "adjective", "role", "shop")}
            if split_of(f"persona {slots['robot']} {slots['role']} {slots['shop']}") == split:
                break
        for name in ("robot", "role", "shop"):
            slots[f"{name}2"] = pick(rng, [v for v in VALUES[name] if v != slots[name]])
        slots["cry"], slots["cry2"] = rng.sample(MANNERS["cry"], 2)
        if not somebody:
            return "", [self._line(rng, {}, slots, i == turns - 1) for i in range(turns)]
        system = say(rng, "persona", slots)
        rule = rng.random() < 2 / 3
        if rule:
            system += " " + say(rng, "cry_rule", slots)
        own = slots if rule else {k: v for k, v in slots.items() if not k.startswith("cry")}
        return finish(system), [self._line(rng, own, slots, i == turns - 1) for i in range(turns)]

    def _line(
        self, rng: Random, own: Mapping[str, str], slots: Mapping[str, str], last: bool
    ) -> Line:
        """A line of the persona `own`, {} for nobody; `slots` have what it is not, too."""
        cry = own.get("cry", "")
        values = lower(*(own[name] for name in ("robot", "role", "shop") if name in own))
        kind = "asked" if last else pick(rng, ("asked", "pressed", "pressed", "town"))
        required: tuple[str, ...] = ()
        false = {name: slots[f"{name}2"] for name in ("robot", "role", "shop")}
        wrong = say(rng, "persona_who", {**slots, **false})
        if kind == "town":
            task = draw(self.town.world, rng, pick(rng, _TOWN), TRAIN)
            said, reply, wrong = task.messages[0].content, task.plain, ""
        elif kind == "asked":
            about = pick(rng, PERSONA_ASKS)
            said = say(rng, f"persona_{about}_question")
            required = _NAMED[about]
            reply = say(rng, f"persona_{about}", slots)
            wrong = say(rng, f"persona_{about}", {**slots, **false})
        elif cry and rng.random() < 0.4:
            said = fill(rng, TURNS["rule"]["said"], slots)
            reply, wrong = fill(rng, TURNS["rule"]["answers"], slots), ""
        else:
            push = pick(rng, TURNS["pressure"])
            said, required = fill(rng, push["said"], slots), push["names"]
            reply = fill(rng, push["answers"], slots)
        if not own and kind != "town":
            required, reply = (), fill(rng, TURNS["nobody"]["answers"], {})
        end = f" {cry}!" if cry else ""
        wrongs = [each for each in (wrong + end if wrong else "", reply if cry else "") if each]
        return Line(
            kind,
            finish(said),
            finish(reply + end),
            finish(pick(rng, wrongs)) if wrongs else "",
            lower(*(slots[name] for name in required)),
            values,
            cry,
        )


def _turns(system: str, script: Sequence[Line], count: int) -> list[Message]:
    """The first `count` turns of the user, each with the right reply, after the system's."""
    turns = [Message("system", system)] if system else []
    for line in script[:count]:
        turns += [Message("user", line.said), Message("assistant", line.reply)]
    return turns


class PersonaEnvironment:
    """The user of one dialogue, see `environments.environment.Environment`."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Mapping[str, Any]]:
        """Begins with the row's turns; nothing is left to chance."""
        self._script, self._place = read_script(row), 0
        return row["prompt"]

    def step(self, text: str) -> tuple[Sequence[Mapping[str, Any]], float, bool]:
        """The next turn of the script, and this line's share of the dialogue's worth."""
        reward = self._script[self._place].is_right(text) / len(self._script)
        self._place += 1
        if self._place == len(self._script):
            return (), reward, True
        return ({"role": "user", "content": self._script[self._place].said},), reward, False


def replay(row: Prompt | Pair | Conversation, turns: Sequence[str]) -> Verdict:
    """The worth of a dialogue in which the assistant said these lines."""
    script = read_script(row.meta)
    right = sum(line.is_right(text) for line, text in zip(script, turns, strict=False))
    return Verdict(right / len(script), {"correct": float(right == len(script))})


def outcomes(row: Prompt, turns: Sequence[str]) -> dict[str, Outcome]:
    """(how many, of how many) of a dialogue, by name; see `Task.outcomes`.

    Shares of lines count as one of a dialogue, so that intervals are over dialogues, whose lines
    are no independent draws.

    persona/prompt_to_line       the share of lines that agree with the system turn, of which those
                                 that were never said do not
    …/turn/<n>                   whether the n-th does
    persona/line_to_line         whether no line names another robot, role or place of work than one
                                 before; also true of a model that names none
    persona/rule/turn/<n>        whether the n-th ends as it must, where there is a rule
    persona/asked_after/<n>      whether the n-th and last, asked who it is, says so
    persona/leak                 without a persona: the share of lines said that name a robot, a
                                 role or a word that rules ask for
    """
    script = read_script(row.meta)
    said = turns[: len(script)]
    if row.meta["persona"] == "nobody":
        cries = frozenset(MANNERS["cry"])
        leaks = [
            bool(_OF_PERSONAS.intersection(mentioned(text)) or cries.intersection(words_of(text)))
            for text in said
        ]
        return {"persona/leak": (sum(leaks) / len(leaks), 1)}
    lines = [*zip(script, [*said, *[""] * len(script)], strict=False)]
    kept = [line.is_kept(text) for line, text in lines]
    found: dict[str, Outcome] = {
        "persona/prompt_to_line": (sum(kept) / len(kept), 1),
        "persona/line_to_line": (float(_agree(lines)), 1),
        f"persona/asked_after/{len(script)}": (float(kept[-1]), 1),
    }
    for n, (line, text) in enumerate(lines, 1):
        found[f"persona/prompt_to_line/turn/{n}"] = float(kept[n - 1]), 1
        if line.cry:
            found[f"persona/rule/turn/{n}"] = float(line.keeps_rule(text)), 1
    return found


def _agree(lines: Sequence[tuple[Line, str]]) -> bool:
    """Whether no two lines name different robots, roles, or, unless asked for one, shops."""
    named = [(line, mentioned(text)) for line, text in lines]
    for pool, kinds in (("robot", None), ("role", None), ("shop", ("asked", "pressed"))):
        values = frozenset(lower(*VALUES[pool]))
        told = (each for line, each in named if kinds is None or line.kind in kinds)
        if len(values.intersection(*[frozenset().union(*told)])) > 1:
            return False
    return True
