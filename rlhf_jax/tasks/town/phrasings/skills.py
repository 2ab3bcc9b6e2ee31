"""Templates of the tasks that need no knowledge of the town: reading, numbers, lists, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """Questions and answers about one slot of a happening."""

    slot: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    short: str


@dataclass(frozen=True)
class Happening:
    """Something a visitor did, the slots it fills, and what may be asked about it."""

    slots: tuple[str, ...]
    statements: tuple[str, ...]
    asks: tuple[Ask, ...]


HAPPENINGS: tuple[Happening, ...] = (
    Happening(
        ("number", "fruit", "place"),
        (
            "{who} bought {number} {fruit} at the {place}.",
            "at the {place}, {who} bought {number} {fruit}.",
        ),
        (
            Ask(
                "fruit",
                ("what did {visitor} buy?", "what did {visitor} buy at the {place}?"),
                ("{visitor} bought {fruit}.", "{visitor} bought {number} {fruit}."),
                "{fruit}",
            ),
            Ask(
                "number",
                ("how many {fruit} did {visitor} buy?",),
                ("{visitor} bought {number} {fruit}.",),
                "{number}",
            ),
            Ask(
                "place",
                ("where did {visitor} buy the {fruit}?", "where did {visitor} go shopping?"),
                ("{visitor} bought the {fruit} at the {place}.", "{visitor} went to the {place}."),
                "at the {place}",
            ),
        ),
    ),
    Happening(
        ("vehicle", "day"),
        (
            "{who} came to town by {vehicle} on {day}.",
            "on {day}, {who} came to town by {vehicle}.",
        ),
        (
            Ask(
                "vehicle",
                ("how did {visitor} come to town?", "how did {visitor} travel?"),
                ("{visitor} came by {vehicle}.", "{visitor} came to town by {vehicle}."),
                "by {vehicle}",
            ),
            Ask(
                "day",
                ("on which day did {visitor} come to town?", "when did {visitor} come to town?"),
                ("{visitor} came on {day}.", "{visitor} came to town on {day}."),
                "on {day}",
            ),
        ),
    ),
    Happening(
        ("weather",),
        ("it was a {weather} day.", "the day was {weather}."),
        (
            Ask(
                "weather",
                ("what was the weather like?", "what kind of day was it?"),
                ("it was a {weather} day.", "it was {weather}."),
                "{weather}",
            ),
        ),
    ),
    Happening(
        ("item", "shop"),
        ("{who} left {an_item} at the {shop}.", "at the {shop}, {who} forgot {an_item}."),
        (
            Ask(
                "item",
                ("what did {visitor} leave at the {shop}?", "what did {visitor} forget?"),
                ("{visitor} left {an_item} at the {shop}.", "{visitor} forgot {an_item}."),
                "{an_item}",
            ),
            Ask(
                "shop",
                ("where did {visitor} leave the {item}?", "where is the {item} of {visitor} now?"),
                ("{visitor} left the {item} at the {shop}.", "the {item} is at the {shop}."),
                "at the {shop}",
            ),
        ),
    ),
    Happening(
        ("visitor2",),
        ("{who} met {visitor2} on the way.", "{who} had tea with {visitor2}."),
        (
            Ask(
                "visitor2",
                ("who was with {visitor}?", "whom did {visitor} see?"),
                ("{visitor} was with {visitor2}.", "{visitor} met {visitor2}."),
                "{visitor2}",
            ),
        ),
    ),
    Happening(
        ("colour",),
        ("{who} wore a {colour} jacket.", "{who} was in a {colour} jacket."),
        (
            Ask(
                "colour",
                ("what colour was the jacket?", "which colour did {visitor} wear?"),
                ("the jacket was {colour}.", "{visitor} wore a {colour} jacket."),
                "{colour}",
            ),
        ),
    ),
    Happening(
        ("food",),
        ("{who} ate {food} for lunch.", "for lunch, {who} had {food}."),
        (
            Ask(
                "food",
                ("what did {visitor} eat?", "what did {visitor} have for lunch?"),
                ("{visitor} ate {food}.", "{visitor} had {food} for lunch."),
                "{food}",
            ),
        ),
    ),
    Happening(
        ("pet",),
        ("{who} brought {a_pet} along.", "{who} came with {a_pet}."),
        (
            Ask(
                "pet",
                ("which animal was with {visitor}?", "what animal did {visitor} bring?"),
                ("{visitor} brought {a_pet}.", "{a_pet} was with {visitor}."),
                "{a_pet}",
            ),
        ),
    ),
    Happening(
        ("hobby",),
        ("{who} talked about {hobby} all day.", "{who} wanted to learn more about {hobby}."),
        (
            Ask(
                "hobby",
                ("what was {visitor} interested in?",),
                ("{visitor} was interested in {hobby}.",),
                "{hobby}",
            ),
        ),
    ),
)

SKILLS: Mapping[str, tuple[str, ...]] = {
    "read_prompt": (
        "{passage} {question}",
        "read this: {passage} {question}",
        "{passage} now tell me: {question}",
        "here is a short story. {passage} {question}",
        "{question} here is the story: {passage}",
    ),
    # Arithmetic.
    "sum_question": (
        "what is {a} plus {b}?", "how much is {a} plus {b}?", "add {a} and {b}.",
        "what do you get if you add {a} and {b}?", "what do {a} and {b} make?",
    ),
    "sum_answer": ("{a} plus {b} is {c}.", "{a} and {b} make {c}."),
    "difference_question": (
        "what is {a} minus {b}?", "how much is {a} minus {b}?", "take {b} away from {a}.",
        "what is left if you take {b} away from {a}?",
    ),
    "difference_answer": ("{a} minus {b} is {c}.",),
    "more_question": (
        "{visitor} has {a} {fruit} and gets {b} more. how many {fruit} does {visitor} have now?",
        "there are {a} {fruit} in the bag. {visitor} adds {b}. how many are in the bag now?",
        "{visitor} picked {a} {fruit} and then {b} more. how many {fruit} is that?",
    ),
    "more_answer": ("{a} plus {b} is {c}, so there are {c} {fruit}.",),
    "less_question": (
        "{visitor} had {a} {fruit} and ate {b}. how many {fruit} are left?",
        "there are {a} {fruit} in the bag. {visitor} takes {b}. how many {fruit} are left?",
    ),
    "less_answer": ("{a} minus {b} is {c}, so there are {c} {fruit} left.",),
    "number_short": ("{c}",),
    # Prices at the fair, which are always given.
    "together_question": (
        "at the fair {an_item} costs {a} coins and {an_item2} costs {b} coins. "
        "how much do they cost together?",
        "the fair sells {an_item} for {a} coins and {an_item2} for {b} coins. "
        "what do I pay for both?",
    ),
    "together_answer": ("together they cost {c} coins.", "you pay {c} coins for both."),
    "cheaper_question": (
        "at the fair {an_item} costs {a} coins and {an_item2} costs {b} coins. which is cheaper?",
        "the fair sells {an_item} for {a} coins and {an_item2} for {b} coins. what costs less?",
    ),
    "cheaper_answer": ("the {cheap} is cheaper.", "the {cheap} costs less."),
    "change_question": (
        "I have {a} coins and buy {an_item} for {b} coins. how much do I have left?",
        "{an_item} costs {b} coins at the fair. I pay with {a} coins. how much do I get back?",
    ),
    "change_answer": ("you have {c} coins left.", "you get {c} coins back."),
    "twice_question": (
        "at the fair {an_item} costs {a} coins. how much do 2 {items} cost?",
        "the fair sells {items} for {a} coins each. what do I pay for 2?",
    ),
    "twice_answer": ("2 {items} cost {c} coins.",),
    "coins_short": ("{c} coins",),
    # Lists.
    "sort_question": (
        "put these numbers in order: {list}.", "sort these numbers: {list}.",
        "what is the right order of {list}?", "sort from small to large: {list}.",
    ),
    "alphabet_question": (
        "put these words in the order of the alphabet: {list}.", "sort these words: {list}.",
        "sort {list} by the alphabet.",
    ),
    "order_answer": ("the right order is {list}.", "in order: {list}."),
    "list_short": ("{list}",),
    "count_question": (
        "how many {kind} are in this list: {list}?", "count the {kind}: {list}.",
        "how many {kind} do you see here: {list}?",
    ),
    "count_answer": ("there are {c} {kind} in the list.", "the list has {c} {kind}."),
    "extreme_question": (
        "which of these numbers is the {extreme}: {list}?",
        "what is the {extreme} number in this list: {list}?",
        "find the {extreme} number: {list}.",
    ),
    "extreme_answer": ("the {extreme} number is {c}.",),
    "end_question": (
        "which word comes {end} in this list: {list}?", "what is the {end} word here: {list}?",
        "say the {end} word of this list: {list}.",
    ),
    "end_answer": ("the {end} word is {c}.",),
    "odd_question": (
        "which of these is one of the {kind}: {list}?",
        "find the one that belongs to the {kind}: {list}.",
    ),
    "odd_answer": ("the answer is {c}.",),
    "extreme": ("largest", "smallest"),
    "end": ("first", "last"),
    "kind": ("animals", "colours", "jobs", "fruits", "things"),
    # Summaries.
    "goal": (
        "wanted to buy {an_item}", "wanted to visit the {shop}", "wanted to learn {hobby}",
        "wanted to cook {food}", "wanted to find {a_pet}", "wanted to see the {place}",
    ),
    "goal_detail": (
        "it was a {weather} day.", "{who} got up early on {day}.",
        "{who} took the {vehicle} to town.",
        "{who} had waited for this all week.", "{who} asked everybody for the way.",
    ),
    "trouble": (
        "but the road was closed.", "but there were too many people.", "but the rain did not stop.",
        "but {who} had no money left.", "but nobody knew where to look.", "but it got dark.",
    ),
    "outcome": (
        "{visitor2} helped", "it all went well", "{who} went home tired", "{who} gave up",
        "{who} found a better plan", "{who} was happy", "a stranger showed {her2} the way",
    ),
    "summary_prompt": (
        "{passage} Sum this up in one sentence.", "sum up this story in one sentence: {passage}",
        "what is this story about? {passage}", "make this short: {passage}",
        "{passage} What happened, in short?",
    ),
    "summary_answer": ("{visitor} {goal}, and in the end {outcome}.",),
    "goal_tail": ("{visitor} {goal}.",),
    "outcome_tail": ("in the end {outcome}.",),
}  # fmt: skip
