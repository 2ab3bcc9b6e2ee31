"""Dialogues in which somebody is told something, some turns later asked for it, and what is right.

    own        what the user said of themselves is asked for
    third      … of another person, while others are spoken of too
    update     … after a later turn has changed it: the new value is right, the old one must not
               come back
    unknown    what was never told: the right answer is that one doesn't know

"Load" is how many facts are told, all in one turn; "distance" how many of the user's turns ago that
was, or the one that changed it: 1 is the turn before the question. What lies between are questions
about the town that mention no value that was told, and no reply repeats one, so that the answer
stands nowhere else. In training some of what lies between are such questions too.

Every fourth value of a kind (names, foods, streets, …) is told in no dialogue of training. Half of
the held-out questions are about these ("new"), half about the others ("known") in dialogues that
are in no training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from string import Formatter

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.tasks.task import Outcome, Verdict
from rlhf_jax.tasks.town.families import draw
from rlhf_jax.tasks.town.families.exercise import Expectation, loads, lower
from rlhf_jax.tasks.town.families.knowledge import ask
from rlhf_jax.tasks.town.gold import is_right, mentioned
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import fill, say
from rlhf_jax.tasks.town.phrasings import NAMES, PEOPLE, TURNS, VALUES
from rlhf_jax.tasks.town.tools import new_names
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import TRAIN, article

KINDS = ("own", "third", "update", "unknown")
DISTANCES, LOADS = (1, 2, 4, 8), (1, 2, 3, 4)
RECORDS = 12_000  # of training
HELDOUT_COUNTS = {"recall": 10, "other": 100}
"""Held-out questions: of each kind of recall at each distance and load, and of the other kinds."""
_OWN: Mapping[str, Mapping[str, tuple[str, ...]]] = TURNS["own"]
_OF_OTHERS = tuple(name for name in _OWN if name != "visitor")
_BETWEEN = ("facts", "facts", "facts", "shops", "claims")


def values_of(attribute: str, split: str) -> list[str]:
    """The values that are told in training, and those that are told held out only."""
    return [v for i, v in enumerate(VALUES[attribute]) if (i % 4 == 3) == (split != TRAIN)]


@dataclass(frozen=True)
class Fact:
    """A value of an attribute of somebody; `who` is "" for the user."""

    who: str
    attribute: str
    value: str

    def state(self, rng: Random) -> str:
        """The fact in a sentence."""
        told = PEOPLE[self.attribute].statements if self.who else _OWN[self.attribute]["statements"]
        return self._fill(rng, told)

    def question(self, rng: Random) -> str:
        """A question for it."""
        table = PEOPLE[self.attribute].questions if self.who else _OWN[self.attribute]["questions"]
        return finish(ask(rng, self._fill(rng, table)))

    def answer(self, rng: Random) -> str:
        """A right answer."""
        told = PEOPLE[self.attribute].answers if self.who else _OWN[self.attribute]["answers"]
        return finish(self._fill(rng, told))

    def expectation(self) -> Expectation:
        """How an answer is judged."""
        return Expectation(required=(lower(self.value),), allowed=lower(self.who or self.value))

    def _fill(self, rng: Random, templates: Sequence[str]) -> str:
        """One of the templates that speak of nothing but this fact."""
        slots = {self.attribute: self.value, f"a_{self.attribute}": article(self.value)}
        if self.who:
            she = self.who in NAMES["visitors_f"]
            slots |= {"who": self.who, "whose": f"{self.who}'s", "name": self.who}
            slots |= {"she": "she", "her": "her"} if she else {"she": "he", "her": "his"}
        return fill(rng, [each for each in templates if _slots(each) <= {*slots}], slots)


def _slots(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


@dataclass
class _Dialogue:
    """The turns so far, what was told first, and every value and name that is told."""

    messages: list[Message] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def tell(self, user: str, reply: str) -> None:
        self.messages += [Message("user", finish(user)), Message("assistant", finish(reply))]

    def hear(self, rng: Random, told: str) -> None:
        self.tell(told, fill(rng, TURNS["memory"]["noted"], {}))


@dataclass(frozen=True)
class MemoryTown:
    """The dialogues of a town; `Town` has the questions that lie between."""

    town: Town

    def conversations(self, split: str, count: int = RECORDS) -> Iterator[Conversation]:
        """Dialogues with their right answers, of every kind, at distances 1 to 8."""
        for index in range(count):
            rng = Random(f"town {self.town.config.seed} memory {split} {index}")
            kind, load = pick(rng, KINDS), pick(rng, LOADS)
            made, answer, meta = self._draw(rng, split, kind, load, 1 + int(rng.random() * 8), 0.3)
            turns = (*made.messages, Message("assistant", answer))
            yield Conversation(f"{split}-{index}", turns, meta)

    def drills(
        self, split: str, count: int = RECORDS, *, name: str = "drill", changes: float = 0.2
    ) -> Iterator[Conversation]:
        """Dialogues in which every question is about what was told, changed, or not told.

        In half of those about others their names are made up, so that no list of names is learnt.

        Args:
            name: of the random numbers they are drawn by.
            changes: the share of the eight later turns that change something, at most 0.5. Half of
                them ask for what holds, the others for what was not told.
        """
        for index in range(count):
            rng = Random(f"town {self.town.config.seed} memory {name} {split} {index}")
            facts = _facts(rng, split, pick(rng, LOADS), rng.random() < 0.7)
            made_up = facts[0].who != "" and rng.random() < 0.5
            if made_up:
                names = rng.sample(new_names(), len(facts))
                facts = [replace(fact, who=name) for fact, name in zip(facts, names, strict=True)]
            made = _Dialogue(facts=facts)
            made.hear(rng, _opening(rng, made.facts))
            for _ in range(8):
                rng.shuffle(made.facts)
                fact, fate = made.facts[0], rng.random()
                if fate < changes:
                    taken = {each.value for each in made.facts}
                    (value,) = _values(rng, fact.attribute, split, 1, taken)
                    made.facts[0] = replace(fact, value=value)
                    made.hear(rng, _change(rng, made.facts[0], fact.value))
                elif fate < 0.5:
                    unknown = _unknown(rng, split, made.facts)
                    if made_up and unknown.who != fact.who:  # or the kind of name would tell
                        people = {each.who for each in made.facts}
                        while (name := pick(rng, new_names())) in people:
                            continue
                        unknown = replace(unknown, who=name)
                    made.tell(unknown.question(rng), say(rng, "abstain"))
                else:
                    made.tell(fact.question(rng), fact.answer(rng))
            yield Conversation(f"{split}-{index}", tuple(made.messages))

    def prompts(self, split: str, count: int = RECORDS) -> Iterator[Prompt]:
        """The same without the last answer; held out, those that memory is measured on."""
        if split == TRAIN:
            for each in self.conversations(split, count):
                yield Prompt(each.id, each.messages[:-1], each.meta)
            return
        wanted = [
            (kind, load, distance)
            for kind in ("own", "third")
            for load in LOADS
            for distance in DISTANCES
            for _ in range(HELDOUT_COUNTS["recall"])
        ]
        for kind in ("update", "unknown"):
            every = [(kind, load, distance) for distance in DISTANCES for load in LOADS]
            wanted += [every[i % len(every)] for i in range(HELDOUT_COUNTS["other"])]
        order = Random(f"town {self.town.config.seed} memory order")
        order.shuffle(wanted)  # so that the first of them are some of every kind
        for index, (kind, load, distance) in enumerate(wanted):
            rng = Random(f"town {self.town.config.seed} memory held out {index}")
            values = ("known", "new")[index % 2]
            of_split = TRAIN if values == "known" else split
            made, _, meta = self._draw(rng, of_split, kind, load, distance, 0.0)
            yield Prompt(f"memory-{index}", tuple(made.messages), {**meta, "values": values})

    def _draw(
        self, rng: Random, split: str, kind: str, load: int, distance: int, asked: float
    ) -> tuple[_Dialogue, str, dict[str, str]]:
        """A dialogue that ends with its question, the right answer, and the record's meta.

        Args:
            asked: the share of the turns between that ask for something told too.
        """
        third = kind == "third" or (kind in ("update", "unknown") and rng.random() < 0.5)
        made = _Dialogue(facts=_facts(rng, split, load, third))
        made.told = {word for f in made.facts for word in lower(f.value, f.who)}
        target, old = made.facts[0], ""
        if kind == "update":
            old = target.value
            (value,) = _values(rng, target.attribute, split, 1, {f.value for f in made.facts})
            target = replace(target, value=value)
            made.told.add(value.lower())
        unknown = _unknown(rng, split, made.facts) if kind == "unknown" else None
        made.hear(rng, _opening(rng, made.facts))
        if kind == "update":
            self._pass(rng, made, int(rng.random() * 3), asked, unknown)
            made.hear(rng, _change(rng, target, old))
        self._pass(rng, made, distance - 1, asked, unknown)
        meta = {"memory": kind, "load": str(load), "distance": str(distance), "old": old.lower()}
        meta["who"] = "third" if third else "own"
        if unknown:
            meta["attribute"] = unknown.attribute
            allowed = lower(unknown.who) if unknown.who else ()
            expected = Expectation(required=(), allowed=allowed, abstain=True)
            answer = finish(say(rng, "abstain"))
        else:
            expected, answer = target.expectation(), target.answer(rng)
        made.messages.append(Message("user", (unknown or target).question(rng)))
        return made, answer, meta | {"expectation": expected.dumps()}

    def _pass(
        self, rng: Random, made: _Dialogue, turns: int, asked: float, unknown: Fact | None
    ) -> None:
        """Adds so many turns that say nothing of what the last question is about."""
        for _ in range(turns):
            others = made.facts[1:] if unknown is None else made.facts
            if others and rng.random() < asked:
                fact = pick(rng, others)
                made.tell(fact.question(rng), fact.answer(rng))
                continue
            while True:
                task = draw(self.town.world, rng, pick(rng, _BETWEEN), TRAIN)
                said = f"{task.messages[0].content} {task.plain}"
                if made.told.isdisjoint(mentioned(said)):
                    break
            made.tell(task.messages[0].content, task.plain)


def _opening(rng: Random, facts: Sequence[Fact]) -> str:
    """What tells all the facts, in some order."""
    told = [fact.state(rng) for fact in facts]
    rng.shuffle(told)
    return fill(rng, TURNS["memory"]["openings"], {"told": " ".join(told)})


def _facts(rng: Random, split: str, load: int, third: bool) -> list[Fact]:
    """So many facts, all values and names different; the first one is of the split's values."""
    if not third:
        attributes = rng.sample([*_OWN], load)
        owners = [""] * load
    else:
        attributes = [pick(rng, _OF_OTHERS) for _ in range(load)]
        if rng.random() < 0.5:  # persons alike in what is told of them
            attributes = attributes[:1] * load
        owners = _values(rng, "visitor", split, load)
    facts: list[Fact] = []
    for place, (who, attribute) in enumerate(zip(owners, attributes, strict=True)):
        taken = {fact.value for fact in facts}
        (value,) = _values(rng, attribute, split, 1, taken, new=int(place == 0))
        facts.append(Fact(who, attribute, value))
    return facts


def _values(
    rng: Random,
    attribute: str,
    split: str,
    count: int,
    taken: Collection[str] = (),
    new: int = 1,
) -> list[str]:
    """Different values that are not taken, the first `new` the split's, the others of training.

    Where all of the split are taken, as in a long drill, one of training stands for another.
    """
    chosen: list[str] = []
    for place in range(count):
        taken = {*taken, *chosen}
        ours, others = (values_of(attribute, each) for each in (split, TRAIN))
        free = [v for v in ours if v not in taken] if place < new else []
        chosen.append(pick(rng, free or [v for v in others if v not in taken]))
    return chosen


def _unknown(rng: Random, split: str, facts: Sequence[Fact]) -> Fact:
    """What the dialogue does not tell: another attribute, or the same one of somebody else."""
    fact = facts[0]
    if not fact.who or rng.random() < 0.5:
        names = [*_OWN] if not fact.who else _OF_OTHERS
        told = {each.attribute for each in facts if each.who == fact.who}
        attribute = pick(rng, [name for name in names if name not in told])
        return Fact(fact.who, attribute, values_of(attribute, split)[0])
    (who,) = _values(rng, "visitor", split, 1, {each.who for each in facts})
    return Fact(who, fact.attribute, fact.value)


def _change(rng: Random, new: Fact, old: str) -> str:
    """What the user says of a fact that has another value than before."""
    if not new.who and rng.random() < 0.5:
        return fill(rng, TURNS["memory"]["own_updates"], {"old": old, "new": new.value})
    return fill(rng, TURNS["memory"]["updates"], {"told": new.state(rng)})


def verify(row: Prompt | Pair | Conversation, reply: str) -> Verdict:
    """Whether the reply is right: the value that holds, and no other; or that nobody told."""
    right = float(is_right(loads(row.meta["expectation"]), reply))
    return Verdict(right, {"correct": right})


def outcomes(row: Prompt, turns: Sequence[str]) -> dict[str, Outcome]:
    """(how many, of how many) of a reply, by name; see `Task.outcomes`.

    Each for values that training tells and for those it does not, memory/<known, new>/…:
    recall/distance/<n>, recall/load/<n>, recall/<own, third>, right answers to what was told and
    not changed; updated, … to what was changed; resurrected, replies with the old value; abstained,
    right answers to what was not told; false_memory, replies with a value of what was asked for.
    """
    meta, values = row.meta, mentioned(turns[-1])
    right = verify(row, turns[-1]).components["correct"]
    if meta["memory"] == "unknown":
        invented = not values.isdisjoint(lower(*VALUES[meta["attribute"]]))
        found = {"abstained": right, "false_memory": float(invented)}
    elif meta["memory"] == "update":
        found = {"updated": right, "resurrected": float(meta["old"] in values)}
    else:
        names = (f"distance/{meta['distance']}", f"load/{meta['load']}", meta["memory"])
        found = {f"recall/{name}": right for name in names}
    return {f"memory/{meta['values']}/{name}": (share, 1) for name, share in found.items()}
