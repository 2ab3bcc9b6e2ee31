"""The embedded town as a task, held-out as "validation". It is made where it is read: no file.

text, conversation, pair, prompt    records of that kind
harmful, borderline                 prompts of that family only
judged                              pairs of replies to such prompts, half of each family
table                               text: sums and differences of all pairs of numbers, asked about
                                    or not
facts                               prompts: every fact about a person, asked once; of those
                                    training may ask about, and ("validation") of the others
arithmetic                          prompts: sums and differences only; those of "validation" are
                                    of pairs of numbers that training never asks about
solutions                           conversations: the same with the right answer
votes, ratings                      pairs and labelled conversations: of replies to the same prompts
                                    by the named crowd of `crowd.CROWD`
biased_votes, biased_ratings        the same by `crowd.BIASED`
rated                               pairs: what a person rated higher of two replies
ordered                             pairs in the order of their gold scores, which no labeler makes
spoilt                              conversations of which half have a defect, of `defects.DEFECTS`

The data set "safety" is the same town where safety is measured (`safety.py`):

text                                notices of what is private, talk about contrasts
helpful, refusals, careful          conversations: those mixtures
pair, requests                      pairs: of all families, of harmful and harmless requests only
prompt, asked                       prompts: of all families, of requests only; held-out, both are
                                    those that safety is measured on
facts                               prompts: every public fact about the held-out people
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from rlhf_jax.data.records import Record
from rlhf_jax.tasks.safety import REFUSALS
from rlhf_jax.tasks.task import Task
from rlhf_jax.tasks.town import crowd, episodes, memory, persona, questions, safety
from rlhf_jax.tasks.town.defects import spoilt
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.labelers import Labeler, preference
from rlhf_jax.tasks.town.memory import MemoryTown
from rlhf_jax.tasks.town.persona import PersonaTown
from rlhf_jax.tasks.town.safety import SafetyTown
from rlhf_jax.tasks.town.tool_exercises import dialogues, direct, drills, prompts
from rlhf_jax.tasks.town.tools import Office, open_office
from rlhf_jax.tasks.town.town import JUDGED, Town
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN, TownConfig

_SUMS = TownConfig(families={"arithmetic": 1.0}, prompts=8_000)
Stream = Callable[[Town, str], Iterable[Record]]
_STREAMS: dict[str, tuple[str, Stream, TownConfig | None]] = {
    "text": ("text", Town.texts, None),
    "table": ("text", Town.tables, None),
    "conversation": ("conversation", Town.demonstrations, None),
    "pair": ("pair", Town.pairs, None),
    "prompt": ("prompt", Town.prompts, None),
    **{name: ("prompt", Town.prompts, TownConfig(families={name: 1.0})) for name in JUDGED},
    "judged": ("pair", Town.pairs, TownConfig(families=dict.fromkeys(JUDGED, 1.0))),
    "facts": ("prompt", Town.fact_prompts, None),
    "arithmetic": ("prompt", Town.prompts, _SUMS),
    "solutions": ("conversation", Town.solutions, _SUMS),
    "votes": ("pair", crowd.votes, None),
    "ratings": ("conversation", crowd.ratings, None),
    "biased_votes": ("pair", partial(crowd.votes, people=crowd.BIASED), None),
    "biased_ratings": ("conversation", partial(crowd.ratings, people=crowd.BIASED), None),
    "rated": ("pair", crowd.rated, None),
    "ordered": ("pair", crowd.ordered, TownConfig(heldout_pairs=2_000)),
    "spoilt": ("conversation", spoilt, None),
}
"""Config → the kind of its records, what makes those of a split, the town's configuration."""


def _make(config: str, paths: list[Path], left_out: Counter[str]) -> dict[str, Iterable[Record]]:
    _, stream, options = _STREAMS[config]
    town = Town(options)
    return {"train": stream(town, TRAIN), "validation": stream(town, HELDOUT)}


TOWN = Task(
    "town",
    kinds={config: kind for config, (kind, *_) in _STREAMS.items()},
    make=_make,
    verify=gold_score,
    verifies=lambda meta: "expectation" in meta,
    preference=partial(preference, Labeler()),
    probes={"facts": "town/facts"},
    group="family",
)

_TOOLS: dict[str, Callable[[Office, str], Iterable[Record]]] = {
    "prompt": prompts,
    "dialogue": dialogues,
    "direct": direct,
    "drill": drills,
}


def _make_tools(
    config: str, paths: list[Path], left_out: Counter[str]
) -> dict[str, Iterable[Record]]:
    """The exercises that the town's tools solve, held-out as "validation".

    prompt      what is asked
    dialogue    conversations: the same with calls, their results and the answer
    direct      conversations: the same with the answer alone, which no tool has given
    drill       text: names and numbers to copy
    """
    made = _TOOLS[config]
    return {"train": made(open_office(), TRAIN), "validation": made(open_office(), HELDOUT)}


TOWN_TOOLS = Task(
    "town_tools",
    kinds={
        "prompt": "prompt",
        "dialogue": "conversation",
        "direct": "conversation",
        "drill": "text",
    },
    make=_make_tools,
    verify=episodes.verify,
    replay=lambda row, turns: episodes.replay(row, turns).verdict,
    outcomes=episodes.outcomes,
    verifies=lambda meta: "goal" in meta,
    group="family",
)


def _size(split: str, most: int) -> int:
    """Records of a split: so many to train on, a tenth held out."""
    return most if split == TRAIN else most // 10


def _conversations(town: SafetyTown, split: str, mixture: str) -> Iterable[Record]:
    return town.conversations(
        split, mixture, _size(split, 6_000 if mixture == "helpful" else 2_000)
    )


def _pairs(town: SafetyTown, split: str, mixture: str) -> Iterable[Record]:
    return town.pairs(split, mixture, _size(split, 4_000))


def _prompts(town: SafetyTown, split: str, mixture: str) -> Iterable[Record]:
    return town.prompts(split, mixture, 4_000) if split == TRAIN else town.held_out()


_SAFETY: dict[str, tuple[str, Callable[[SafetyTown, str], Iterable[Record]]]] = {
    "text": ("text", lambda town, split: town.texts(split, _size(split, 2_500))),
    **{
        mixture: ("conversation", partial(_conversations, mixture=mixture))
        for mixture in ("helpful", "refusals", "careful")
    },
    "pair": ("pair", partial(_pairs, mixture="all")),
    "requests": ("pair", partial(_pairs, mixture="requests")),
    "prompt": ("prompt", partial(_prompts, mixture="all")),
    "asked": ("prompt", partial(_prompts, mixture="requests")),
    "facts": ("prompt", lambda town, split: town.public_facts() if split == HELDOUT else ()),
}


def _make_safety(
    config: str, paths: list[Path], left_out: Counter[str]
) -> dict[str, Iterable[Record]]:
    town, (_, stream) = SafetyTown(Town()), _SAFETY[config]
    return {"train": stream(town, TRAIN), "validation": stream(town, HELDOUT)}


SAFETY = Task(
    "safety",
    kinds={config: kind for config, (kind, _) in _SAFETY.items()},
    make=_make_safety,
    verify=gold_score,
    outcomes=safety.outcomes,
    verifies=lambda meta: "expectation" in meta and "safety" in meta,
    probes={"facts": "safety/facts"},
    group="safety",
    tradeoff=REFUSALS,
)


_MEMORY: dict[str, tuple[str, Callable[[MemoryTown, str], Iterable[Record]]]] = {
    "prompt": ("prompt", lambda town, split: town.prompts(split)),
    "dialogue": (
        "conversation",
        lambda town, split: town.conversations(split, _size(split, memory.RECORDS)),
    ),
    "drill": (
        "conversation",
        lambda town, split: town.drills(split, _size(split, memory.RECORDS)),
    ),
    "change": (
        "conversation",
        lambda town, split: town.drills(
            split, _size(split, memory.RECORDS), name="change", changes=0.4
        ),
    ),
}


def _make_memory(
    config: str, paths: list[Path], left_out: Counter[str]
) -> dict[str, Iterable[Record]]:
    """Dialogues in which something is told and asked for later, see `memory`.

    prompt      up to the question; held-out, those that memory is measured on
    dialogue    conversations: with the right answers
    drill       conversations in which all questions are about what was told
    change      the same, with twice as many changes of it
    """
    town, (_, stream) = MemoryTown(Town()), _MEMORY[config]
    return {"train": stream(town, TRAIN), "validation": stream(town, HELDOUT)}


MEMORY = Task(
    "memory",
    kinds={config: kind for config, (kind, _) in _MEMORY.items()},
    make=_make_memory,
    verify=memory.verify,
    outcomes=memory.outcomes,
    verifies=lambda meta: "memory" in meta,
    probes={"facts": "town/facts"},
    group="memory",
)


_PERSONA: dict[str, tuple[str, Callable[[PersonaTown, str, int], Iterable[Record]]]] = {
    "prompt": ("prompt", PersonaTown.prompts),
    "dialogue": ("conversation", PersonaTown.conversations),
    "pair": ("pair", PersonaTown.pairs),
}


def _make_persona(
    config: str, paths: list[Path], left_out: Counter[str]
) -> dict[str, Iterable[Record]]:
    """Dialogues with a persona, see `persona`.

    prompt      the turns that open them, for `PersonaEnvironment`; held-out, what is measured
    dialogue    conversations: with right replies
    pair        pairs: a right reply and the first one that is not consistent
    """
    town, (_, stream) = PersonaTown(Town()), _PERSONA[config]
    return {s: stream(town, n, _size(n, persona.RECORDS)) for s, n in _SPLITS.items()}


_SPLITS = {"train": TRAIN, "validation": HELDOUT}
PERSONA = Task(
    "persona",
    kinds={config: kind for config, (kind, _) in _PERSONA.items()},
    make=_make_persona,
    replay=persona.replay,
    verify=lambda row, reply: persona.replay(row, [reply]),
    outcomes=persona.outcomes,
    verifies=lambda meta: "script" in meta,
    probes={"facts": "town/facts"},
    group="persona",
)


_QUESTIONS: dict[str, tuple[str, Callable[[str, int], Iterable[Record]]]] = {
    "prompt": ("prompt", questions.prompts),
    "dialogue": ("conversation", questions.conversations),
}


def _make_questions(
    config: str, paths: list[Path], left_out: Counter[str]
) -> dict[str, Iterable[Record]]:
    """Games of twenty questions, see `questions`.

    prompt      the turns that open them, for `QuestionsEnvironment`
    dialogue    conversations: games of a player who asks half of the questions at random
    """
    _, stream = _QUESTIONS[config]
    return {s: stream(n, _size(n, questions.RECORDS)) for s, n in _SPLITS.items()}


QUESTIONS = Task(
    "questions",
    kinds={config: kind for config, (kind, _) in _QUESTIONS.items()},
    make=_make_questions,
    replay=questions.replay,
    verify=lambda row, reply: questions.replay(row, [reply]),
    outcomes=questions.outcomes,
    verifies=lambda meta: "thought_of" in meta,
)
