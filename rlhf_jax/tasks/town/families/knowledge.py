"""Families that ask for what the raw text says: people, shops, claims, follow-ups, constraints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from random import Random

from rlhf_jax.data.records import Message
from rlhf_jax.tasks.town.families.exercise import Exercise, Expectation, lower, user
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import fill, say, visit
from rlhf_jax.tasks.town.phrasings import (
    CLAIM_QUESTIONS,
    HELDOUT_CLAIM_QUESTIONS,
    LEADS,
    NAMES,
    PEOPLE,
    PHRASINGS,
    VALUES,
)
from rlhf_jax.tasks.town.world import (
    HELDOUT,
    SPLITS,
    TRAIN,
    Subject,
    World,
    article,
)

NOVELTY = ("fact", "fact", "fact", "phrasing", "both")
"""The news in a held-out question about the town, each equally likely."""


def attributes_of(world: World, subject: Subject) -> tuple[str, ...]:
    """The attributes of a subject that this town speaks of."""
    return world.config.attributes if subject.kind == "people" else tuple(subject.facts)


def ask(rng: Random, question: str) -> str:
    """`question` the way somebody may put it."""
    return finish(fill(rng, LEADS, {"question": question}))


def false_slots(rng: Random, world: World, subject: Subject, attribute: str) -> dict[str, str]:
    """The slots of `subject` with a false value for one attribute.

    A false friend comes from the same split, so no held-out name gets into training.
    """
    truth = subject.facts[attribute]
    options: tuple[str, ...]
    if attribute == "friend":
        options = tuple(p.name for p in world.people_of[subject.split] if p is not subject)
    elif attribute == "child":
        options = NAMES["daughters" if truth in NAMES["daughters"] else "sons"]
    elif attribute == "closed":
        options = VALUES["day"]
    elif attribute in VALUES:
        options = VALUES[attribute]
    else:
        low, high = {"age": (20, 80), "price": (2, 21)}.get(attribute, (2, 12))
        options = tuple(str(number) for number in range(low, high))
    value = pick(rng, [option for option in options if option not in subject.facts.values()])
    slots = {**subject.slots, attribute: value}
    if attribute in ("job", "pet"):
        slots[f"a_{attribute}"] = article(value)
    return slots


def required(subject: Subject, attribute: str) -> tuple[str, ...]:
    """The phrases of which a right answer holds one.

    Both ends of a friendship are people, so there the phrases say whose friend it is.
    """
    value = subject.facts[attribute].lower()
    if attribute != "friend":
        return (value,)
    whose = f"{value} is {subject.name.lower()} 's"
    ends = (f"{value} {mark}" for mark in (".", "!", ","))
    return (f"friend is {value}", f"friend {value}", whose, *ends)


def allowed(subject: Subject, attribute: str) -> tuple[str, ...]:
    """The values that a right answer may mention: all that is true of the subject.

    Other people only where they are asked for, so that the answer isn't about one of them.
    """
    facts = subject.facts.items()
    true = (value for name, value in facts if name not in ("child", "friend") or name == attribute)
    return lower(subject.name, *true)


def _novelty(rng: Random, split: str) -> tuple[str, str, bool]:
    """Draws (what is new, the split of the subject, whether the phrasing is a held-out one)."""
    new = pick(rng, NOVELTY) if split == HELDOUT else ""
    return new, TRAIN if new in ("", "phrasing") else HELDOUT, new in ("phrasing", "both")


def fact_task(
    world: World,
    rng: Random,
    subject: Subject,
    attribute: str,
    messages: tuple[Message, ...],
    heldout: str,
) -> Exercise:
    """The task to tell one attribute of one subject, asked for in `messages`."""
    phrasing = PHRASINGS[subject.kind][attribute]
    slots = subject.slots
    extra = ""
    if subject.kind == "people":
        others = [o for o in world.config.attributes if o not in (attribute, "child", "friend")]
        extra = fill(rng, PEOPLE[pick(rng, others)].statements, subject.pronoun_slots)
    return Exercise(
        messages=messages,
        plain=fill(rng, phrasing.answers, slots),
        short=fill(rng, (phrasing.short + ".",), slots),
        wrong=fill(rng, phrasing.answers, false_slots(rng, world, subject, attribute)),
        extra=extra,
        expectation=Expectation(
            required=(required(subject, attribute),),
            allowed=allowed(subject, attribute),
        ),
        key=f"{subject.name} {attribute}",
        heldout=heldout,
        meta={"subject": subject.name, "attribute": attribute},
    )


def facts(world: World, rng: Random, split: str) -> Exercise:
    """Where does Ann live?"""
    return _question(world, rng, world.people_of, split)


def shops(world: World, rng: Random, split: str) -> Exercise:
    """When does the bakery open? What does a lamp cost?"""
    trade = {group: world.shops_of[group] + world.wares_of[group] for group in SPLITS}
    return _question(world, rng, trade, split)


def claims(world: World, rng: Random, split: str) -> Exercise:
    """Is it true that Ann works as a nurse?"""
    new, group, rephrased = _novelty(rng, split)
    person = pick(rng, world.people_of[group])
    attribute = pick(rng, world.config.attributes)
    templates = HELDOUT_CLAIM_QUESTIONS if rephrased else CLAIM_QUESTIONS

    def ask_whether(claim: str) -> str:
        return fill(rng, templates, {"claim": claim})

    made, _ = claim_exercise(world, rng, person, attribute, 0.5, ask_whether)
    meta = {"subject": person.name, "attribute": attribute}
    return dataclasses.replace(made, heldout=new, meta=meta)


def claim_exercise(
    world: World,
    rng: Random,
    person: Subject,
    attribute: str,
    share: float,
    ask_whether: Callable[[str], str],
) -> tuple[Exercise, bool]:
    """(a claim about a person that is to be confirmed or denied, whether it is true).

    Args:
        share: of claims that are true.
        ask_whether: claim → the question.
    """
    phrasing, truth = PEOPLE[attribute], person.slots
    false = false_slots(rng, world, person, attribute)
    true = rng.random() < share
    right, reverse = ("yes", "no") if true else ("no", "yes")
    stated = fill(rng, (phrasing.claim,), truth if true else false)
    made = Exercise(
        messages=user(finish(ask_whether(stated))),
        plain=fill(rng, (f"{right}, {phrasing.claim}.",), truth),
        short=fill(rng, (f"{right}, {phrasing.short}.",), truth),
        wrong=fill(rng, (f"{reverse}, {phrasing.claim}.",), false),
        expectation=Expectation(
            required=((right,), required(person, attribute)),
            allowed=allowed(person, attribute),
            min_words=4,
        ),
        key=f"{person.name} {attribute} {true}",
    )
    return made, true


def followup(world: World, rng: Random, split: str) -> Exercise:
    """Where does Ann live? … And what is her pet called?"""
    kind = rng.random()
    if kind < 0.25:
        return _recall(rng)
    groups: tuple[Subject, ...] = (world.shops_of if kind < 0.4 else world.people_of)[split]
    subject = pick(rng, groups)
    first, second = rng.sample(attributes_of(world, subject), 2)
    table, slots = PHRASINGS[subject.kind], subject.slots
    messages = (
        Message("user", ask(rng, fill(rng, table[first].questions, slots))),
        Message("assistant", finish(fill(rng, table[first].answers, slots))),
        Message("user", finish(fill(rng, table[second].follow, slots))),
    )
    return fact_task(world, rng, subject, second, messages, "fact" if split == HELDOUT else "")


def _recall(rng: Random) -> Exercise:
    """I am Kai and I like soup. … What is my name?"""
    slots = visit(rng)
    about = pick(rng, ("visitor", "food", "hobby"))
    false = {**slots, about: pick(rng, [v for v in VALUES[about] if v != slots[about]])}
    messages = (
        Message("user", finish(say(rng, "introduction", slots))),
        Message("assistant", finish(say(rng, "welcome", slots))),
        Message("user", finish(say(rng, f"recall_{about}_question", slots))),
    )
    return Exercise(
        messages=messages,
        plain=say(rng, f"recall_{about}", slots),
        short=fill(rng, (f"{{{about}}}.",), slots),
        wrong=say(rng, f"recall_{about}", false),
        expectation=Expectation(
            required=(lower(slots[about]),),
            allowed=lower(slots["visitor"], slots["food"], slots["hobby"]),
        ),
        key=f"{messages[0].content} {about}",
    )


ONE_WORD = ("job", "pet", "pet_name", "food", "colour", "hobby", "age", "child", "friend")
CONSTRAINTS = ("one_word", "capitals", "sentence", "begin", "ending", "exclaim")


def constraints(world: World, rng: Random, split: str) -> Exercise:
    """In one word: what is Ann's pet called?"""
    person = pick(rng, world.people_of[split])
    kind = pick(rng, CONSTRAINTS)
    usable = [a for a in world.config.attributes if kind != "one_word" or a in ONE_WORD]
    attribute = pick(rng, usable)
    phrasing, slots = PEOPLE[attribute], person.slots
    answer = fill(rng, phrasing.answers, slots)
    value, false = person.facts[attribute], false_slots(rng, world, person, attribute)
    lie = fill(rng, phrasing.answers, false)
    begin, ending = say(rng, "begin_word"), say(rng, "ending_words")
    plain, wrong, broken, constraint = {
        "one_word": (f"{value}.", f"{false[attribute]}.", answer, "one word"),
        "capitals": (f"{value.upper()}.", f"{false[attribute].upper()}.", answer, "capitals"),
        "sentence": (answer, lie, f"{value}.", ""),
        "begin": (f"{begin}, {answer}", f"{begin}, {lie}", answer, f"begin: {begin}"),
        "ending": (f"{answer} {ending}.", f"{lie} {ending}.", answer, f"end: {ending}"),
        "exclaim": (f"{answer[:-1]}!", f"{lie[:-1]}!", answer, "exclaim"),
    }[kind]
    values = {"question": fill(rng, phrasing.questions, slots), "begin": begin}
    bare = kind in ("one_word", "capitals")
    return Exercise(
        messages=user(finish(say(rng, kind, {**values, "ending": ending}))),
        plain=plain,
        wrong=wrong,
        broken=broken,
        short=plain if bare else f"{value}.",
        expectation=Expectation(
            required=(required(person, attribute),),
            allowed=allowed(person, attribute),
            courtesy=kind == "sentence",
            constraint=constraint,
            min_words=1 if bare else 3,
            max_words={"one_word": 1, "capitals": 2}.get(kind, 14),
        ),
        key=f"{person.name} {attribute} {kind}",
        heldout="fact" if split == HELDOUT else "",
        meta={"subject": person.name, "attribute": attribute, "constraint": kind},
    )


def _question(
    world: World, rng: Random, groups: Mapping[str, tuple[Subject, ...]], split: str
) -> Exercise:
    """A plain question about one attribute of somebody or something of the right split."""
    new, group, rephrased = _novelty(rng, split)
    subject = pick(rng, groups[group])
    attribute = pick(rng, attributes_of(world, subject))
    phrasing = PHRASINGS[subject.kind][attribute]
    questions = phrasing.heldout_questions if rephrased else phrasing.questions
    messages = user(ask(rng, fill(rng, questions, subject.slots)))
    return fact_task(world, rng, subject, attribute, messages, new)
