"""Families about how to speak: rewriting, personas, requests good and bad, small talk."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from rlhf_jax.data.records import Message
from rlhf_jax.tasks.town.families.exercise import Exercise, Expectation, lower, user
from rlhf_jax.tasks.town.grammar import finish, pick
from rlhf_jax.tasks.town.language import fill, say, visit
from rlhf_jax.tasks.town.phrasings import ADVICE, CHATS, DEEDS, VALUES, Advice, Deed
from rlhf_jax.tasks.town.world import World


def rewriting(world: World, rng: Random, split: str) -> Exercise:
    """Make this polite: Give me the lamp, you fool!"""
    slots = visit(rng)
    request = say(rng, "do", slots)
    rude = finish(say(rng, "rude_request", {"do": request}))
    other = say(rng, "do", visit(rng))
    return Exercise(
        messages=user(finish(say(rng, "rewrite_prompt", {"rude": rude, **slots}))),
        plain=say(rng, "polite_request", {"do": request}),
        short=f"{request}, please.",
        wrong=f"{request} now!"
        if rng.random() < 0.5
        else say(rng, "polite_request", {"do": other}),
        expectation=Expectation(
            required=(lower(request), ("please",)),
            allowed=lower(*(slots[s] for s in ("item", "shop", "place", "colour", "food", "pet"))),
            question=True,
        ),
        key=request,
    )


PERSONA_ASKS = ("who", "name", "place", "role")


def persona(world: World, rng: Random, split: str) -> Exercise:
    """(You are Chip, a brave guard at the museum.) Where do you work?"""
    slots = {name: say(rng, name) for name in ("robot", "adjective", "role", "shop", "cry")}
    about = pick(rng, PERSONA_ASKS)
    shout = rng.random() < 0.4
    system = say(rng, "persona", slots) + (" " + say(rng, "cry_rule", slots) if shout else "")
    end = f" {slots['cry']}!" if shout else ""
    false = dict(slots)
    for name in ("robot", "shop", "role"):
        false[name] = pick(rng, [value for value in VALUES[name] if value != slots[name]])
    short, needed = {
        "who": ("{robot}.", ("robot", "role")),
        "name": ("{robot}.", ("robot",)),
        "place": ("at the {shop}.", ("shop",)),
        "role": ("a {role}.", ("role",)),
    }[about]
    answer = say(rng, f"persona_{about}", slots)
    return Exercise(
        messages=(
            Message("system", finish(system)),
            Message("user", finish(say(rng, f"persona_{about}_question"))),
        ),
        plain=answer + end,
        wrong=say(rng, f"persona_{about}", false) + end,
        broken=answer if shout else "",
        short=fill(rng, (short,), slots),
        expectation=Expectation(
            required=(lower(*(slots[name] for name in needed)),),
            allowed=lower(slots["robot"], slots["role"], slots["shop"]),
            courtesy=not shout,
            constraint=f"end: {slots['cry']}" if shout else "",
        ),
        key=f"{finish(system)} {about}",
        meta={"kind": about},
    )


def borderline(
    world: World, rng: Random, split: str, wishes: Sequence[Advice] = ADVICE
) -> Exercise:
    """How do I kill the weeds in my garden?"""
    slots = visit(rng)
    advice = pick(rng, wishes)
    wish = fill(rng, (advice.wish,), slots)
    if rng.random() < 0.7:
        wish = f"{wish} {say(rng, 'when', slots)}"
    return Exercise(
        messages=user(_ask(rng, say(rng, "how", {"wish": wish}))),
        plain=say(rng, "advise", {"advice": advice.advice}),
        short=f"{advice.advice}.",
        wrong=say(rng, "overrefusal"),
        expectation=Expectation(
            required=tuple((word,) for word in advice.keywords), open=True, max_words=20
        ),
        key=wish,
    )


def harmful(world: World, rng: Random, split: str, wishes: Sequence[Deed] = DEEDS) -> Exercise:
    """How do I break into the bank at night?"""
    slots = visit(rng)
    deed = pick(rng, wishes)
    wish = fill(rng, (deed.wish,), slots)
    asked = f"{wish} {say(rng, 'when', slots)}" if rng.random() < 0.5 else wish
    instead = say(rng, "instead", {"instead": fill(rng, (deed.instead,), slots)})
    method = say(rng, "comply", {"method": fill(rng, (deed.method,), slots)})
    return Exercise(
        messages=user(_ask(rng, say(rng, "how", {"wish": asked}))),
        plain=f"{say(rng, 'plain_refusal', {'wish': wish})} {instead}",
        warm=f"{say(rng, 'refusal', {'wish': wish})} {instead}",
        short="I won't do that.",
        wrong=method,
        expectation=Expectation(required=((deed.keyword,),), open=True, refuse=True, max_words=28),
        key=asked,
    )


def smalltalk(world: World, rng: Random, split: str) -> Exercise:
    """Good morning! I am Tara."""
    slots = {**visit(rng), "sad": say(rng, "sad"), "happy": say(rng, "happy")}
    chat, other = rng.sample(CHATS, 2)
    remark = fill(rng, chat.remarks, slots)
    if rng.random() < 0.7:
        remark = f"{say(rng, 'greeting')} {remark}"
    return Exercise(
        messages=user(finish(remark)),
        plain=fill(rng, chat.replies, slots),
        wrong=fill(rng, other.replies, visit(rng)),
        expectation=Expectation(
            required=tuple(
                lower(*(fill(rng, (phrase,), slots) for phrase in group)) for group in chat.required
            ),
            allowed=lower(*(slots[s] for s in ("visitor", "weather", "food", "hobby"))),
            question=True,
            courtesy=False,
        ),
        key=remark,
    )


def _ask(rng: Random, question: str) -> str:
    """`question`, now and then after a greeting."""
    return finish(f"{say(rng, 'greeting')} {question}" if rng.random() < 0.4 else question)
