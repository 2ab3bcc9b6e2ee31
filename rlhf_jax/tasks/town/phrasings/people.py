"""How the town speaks of its people and shops: statements, questions and answers for every fact.

`{who}` and `{whose}` are the name or, in a sentence after one that names the person, the pronoun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """The ways to state, ask and answer one attribute.

    `questions` are asked in training, `heldout_questions` never; `follow` asks about somebody
    already spoken of. `claim` is a clause that states the fact and may be made false by another
    value; `short` is the bare answer.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    heldout_questions: tuple[str, ...]
    answers: tuple[str, ...]
    follow: tuple[str, ...]
    claim: str
    short: str


PEOPLE: Mapping[str, Phrasing] = {
    "job": Phrasing(
        statements=(
            "{who} works as {a_job}.",
            "{who} is {a_job}.",
            "{who} has worked as {a_job} for many years.",
            "everybody knows that {who} is {a_job}.",
            "{who} earns money as {a_job}.",
            "{who} makes a living as {a_job}.",
            "if you need {a_job}, ask {name}.",
            "as {a_job}, {who} gets up early.",
        ),
        questions=(
            "what is {whose} job?",
            "what does {who} do for a living?",
            "what does {who} work as?",
            "what work does {who} do?",
            "do you know what {whose} job is?",
        ),
        heldout_questions=("what job does {who} have?", "how does {who} make a living?"),
        answers=("{who} works as {a_job}.", "{who} is {a_job}."),
        follow=("and what is {her} job?", "and what does {she} work as?"),
        claim="{name} works as {a_job}",
        short="{a_job}",
    ),
    "street": Phrasing(
        statements=(
            "{who} lives on {street}.",
            "{whose} house is on {street}.",
            "{who} has a small house on {street}.",
            "{who} moved to {street} long ago.",
            "you can visit {name} on {street}.",
            "{whose} home is on {street}.",
            "{who} has always lived on {street}.",
            "the postman brings {whose} letters to {street}.",
        ),
        questions=(
            "where does {who} live?",
            "on which street does {who} live?",
            "which street does {who} live on?",
            "where is {whose} house?",
            "do you know where {who} lives?",
        ),
        heldout_questions=("where is {whose} home?", "where can you visit {who}?"),
        answers=("{who} lives on {street}.", "{whose} house is on {street}."),
        follow=("and where does {she} live?", "and where is {her} house?"),
        claim="{name} lives on {street}",
        short="on {street}",
    ),
    "pet": Phrasing(
        statements=(
            "{who} has {a_pet}.",
            "{whose} pet is {a_pet}.",
            "{who} keeps {a_pet} at home.",
            "{who} owns {a_pet}.",
            "{who} would never sell {her} {pet}.",
            "{who} feeds {her} {pet} every morning.",
            "{who} takes good care of {her} {pet}.",
        ),
        questions=(
            "what pet does {who} have?",
            "which pet does {who} have?",
            "what kind of pet does {who} have?",
            "which animal does {who} keep?",
            "do you know what pet {who} has?",
        ),
        heldout_questions=("what animal does {who} own?", "what is {whose} pet?"),
        answers=("{who} has {a_pet}.", "{whose} pet is {a_pet}."),
        follow=("and what pet does {she} have?", "and which animal does {she} keep?"),
        claim="{name} has {a_pet}",
        short="{a_pet}",
    ),
    "pet_name": Phrasing(
        statements=(
            "{whose} {pet} is called {pet_name}.",
            "{whose} pet is called {pet_name}.",
            "the name of {whose} {pet} is {pet_name}.",
            "{who} calls {her} {pet} {pet_name}.",
            "{who} has {a_pet} called {pet_name}.",
            "{pet_name} is the name of {whose} pet.",
            "{who} gave {her} {pet} the name {pet_name}.",
            "{who} loves {her} {pet} {pet_name}.",
        ),
        questions=(
            "what is {whose} pet called?",
            "what is the name of {whose} pet?",
            "what does {who} call {her} pet?",
            "what is {whose} {pet} called?",
            "do you know what {whose} pet is called?",
        ),
        heldout_questions=("which name has {whose} pet?", "what name did {who} give {her} pet?"),
        answers=("{whose} pet is called {pet_name}.", "{whose} {pet} is called {pet_name}."),
        follow=("and what is {her} pet called?", "and what is the name of {her} pet?"),
        claim="{whose} pet is called {pet_name}",
        short="{pet_name}",
    ),
    "food": Phrasing(
        statements=(
            "{whose} favourite food is {food}.",
            "{who} likes {food} more than any other food.",
            "{who} loves to eat {food}.",
            "{who} could eat {food} every day.",
            "{who} eats {food} as often as possible.",
            "for lunch, {who} wants {food}.",
            "give {name} some {food} and all is well.",
        ),
        questions=(
            "what is {whose} favourite food?",
            "what does {who} like to eat?",
            "which food does {who} like most?",
            "what food does {who} love?",
            "do you know what {who} likes to eat?",
        ),
        heldout_questions=("what does {who} love to eat?", "what does {who} want for lunch?"),
        answers=("{whose} favourite food is {food}.", "{who} likes to eat {food}."),
        follow=("and what is {her} favourite food?", "and what does {she} like to eat?"),
        claim="{name} likes to eat {food}",
        short="{food}",
    ),
    "colour": Phrasing(
        statements=(
            "{whose} favourite colour is {colour}.",
            "{who} likes the colour {colour}.",
            "{who} wears {colour} every day.",
            "{who} painted {her} door {colour}.",
            "all that {who} wears is {colour}.",
            "{who} thinks that {colour} is the best colour.",
        ),
        questions=(
            "what is {whose} favourite colour?",
            "which colour does {who} like?",
            "what colour does {who} like most?",
            "what colour does {who} wear?",
            "do you know which colour {who} likes?",
        ),
        heldout_questions=("which colour is {whose} door?", "what is the best colour for {who}?"),
        answers=("{whose} favourite colour is {colour}.", "{who} likes the colour {colour}."),
        follow=("and what is {her} favourite colour?", "and which colour does {she} like?"),
        claim="{name} likes the colour {colour}",
        short="{colour}",
    ),
    "hobby": Phrasing(
        statements=(
            "{whose} hobby is {hobby}.",
            "{who} enjoys {hobby}.",
            "{who} loves {hobby}.",
            "in {her} free time, {who} enjoys {hobby}.",
            "{who} spends every weekend on {hobby}.",
            "{who} is very good at {hobby}.",
            "for {name}, nothing is better than {hobby}.",
        ),
        questions=(
            "what is {whose} hobby?",
            "what does {who} enjoy?",
            "what does {who} do in {her} free time?",
            "which hobby does {who} have?",
            "do you know what {whose} hobby is?",
        ),
        heldout_questions=("what does {who} spend every weekend on?", "what is {who} good at?"),
        answers=("{whose} hobby is {hobby}.", "{who} enjoys {hobby}."),
        follow=("and what is {her} hobby?", "and what does {she} do in {her} free time?"),
        claim="{name} enjoys {hobby}",
        short="{hobby}",
    ),
    "age": Phrasing(
        statements=(
            "{who} is {age} years old.",
            "{who} is {age}.",
            "at the age of {age}, {who} still feels young.",
            "{who} has just turned {age}.",
            "{whose} age is {age}.",
            "{who} had a birthday and is now {age}.",
        ),
        questions=(
            "how old is {who}?",
            "what is {whose} age?",
            "do you know how old {who} is?",
            "can you tell me {whose} age?",
        ),
        heldout_questions=("which age has {who}?", "how many years old is {who}?"),
        answers=("{who} is {age} years old.", "{who} is {age}."),
        follow=("and how old is {she}?", "and what is {her} age?"),
        claim="{name} is {age} years old",
        short="{age}",
    ),
    "child": Phrasing(
        statements=(
            "{who} has a {child_kind} called {child}.",
            "{whose} {child_kind} is called {child}.",
            "{child} is the {child_kind} of {name}.",
            "the name of {whose} {child_kind} is {child}.",
            "{who} often plays with {her} {child_kind} {child}.",
            "{who} is proud of {her} {child_kind} {child}.",
        ),
        questions=(
            "what is {whose} {child_kind} called?",
            "what is the name of {whose} {child_kind}?",
            "who is {whose} {child_kind}?",
            "do you know what {whose} {child_kind} is called?",
        ),
        heldout_questions=("which name has {whose} {child_kind}?", "what is {whose} child called?"),
        answers=(
            "{whose} {child_kind} is called {child}.",
            "{who} has a {child_kind} called {child}.",
        ),
        follow=("and what is {her} {child_kind} called?", "and who is {her} {child_kind}?"),
        claim="{whose} {child_kind} is called {child}",
        short="{child}",
    ),
    "friend": Phrasing(
        statements=(
            "{whose} best friend is {friend}.",
            "{friend} is {whose} best friend.",
            "the best friend of {name} is {friend}.",
            "{who} has known {friend} for many years.",
            "{who} tells {friend} everything.",
            "{who} drinks tea with {friend} every week.",
        ),
        questions=(
            "who is {whose} best friend?",
            "what is the name of {whose} best friend?",
            "do you know who {whose} best friend is?",
            "can you tell me who {whose} best friend is?",
        ),
        heldout_questions=("whom does {who} tell everything?", "with whom does {who} drink tea?"),
        answers=("{whose} best friend is {friend}.", "the best friend of {name} is {friend}."),
        follow=("and who is {her} best friend?",),
        claim="{whose} best friend is {friend}",
        short="{friend}",
    ),
}

SHOPS: Mapping[str, Phrasing] = {
    "opens": Phrasing(
        statements=(
            "the {shop} opens at {opens}.",
            "the {shop} opens its doors at {opens} in the morning.",
            "you can go to the {shop} from {opens} in the morning.",
            "at {opens} in the morning the {shop} opens.",
            "people wait for the {shop} to open at {opens}.",
        ),
        questions=(
            "when does the {shop} open?",
            "at what time does the {shop} open?",
            "when can I go to the {shop} in the morning?",
            "from what time is the {shop} open?",
            "how early does the {shop} open?",
        ),
        heldout_questions=("what time does the {shop} open its doors?",),
        answers=("the {shop} opens at {opens}.", "the {shop} opens at {opens} in the morning."),
        follow=("and when does it open?",),
        claim="the {shop} opens at {opens}",
        short="at {opens}",
    ),
    "closes": Phrasing(
        statements=(
            "the {shop} closes at {closes}.",
            "the {shop} closes its doors at {closes} in the afternoon.",
            "you can stay at the {shop} until {closes} in the afternoon.",
            "at {closes} in the afternoon the {shop} closes.",
        ),
        questions=(
            "when does the {shop} close?",
            "at what time does the {shop} close?",
            "how long can I stay at the {shop}?",
            "until what time is the {shop} open?",
            "how late does the {shop} close?",
        ),
        heldout_questions=("what time does the {shop} close its doors?",),
        answers=(
            "the {shop} closes at {closes}.",
            "the {shop} closes at {closes} in the afternoon.",
        ),
        follow=("and when does it close?",),
        claim="the {shop} closes at {closes}",
        short="at {closes}",
    ),
    "closed": Phrasing(
        statements=(
            "the {shop} is closed on {closed}.",
            "on {closed} the {shop} is closed.",
            "the {shop} stays closed every {closed}.",
            "nobody works at the {shop} on {closed}.",
        ),
        questions=(
            "on which day is the {shop} closed?",
            "which day is the {shop} closed?",
            "when is the {shop} closed all day?",
            "what day is the {shop} closed?",
            "is there a day when the {shop} is closed?",
        ),
        heldout_questions=("on what day does nobody work at the {shop}?",),
        answers=("the {shop} is closed on {closed}.", "on {closed} the {shop} is closed."),
        follow=("and on which day is it closed?",),
        claim="the {shop} is closed on {closed}",
        short="on {closed}",
    ),
}

WARES: Mapping[str, Phrasing] = {
    "price": Phrasing(
        statements=(
            "{an_item} costs {price} coins.",
            "the price of {an_item} is {price} coins.",
            "you pay {price} coins for {an_item}.",
            "for {price} coins you get {an_item}.",
            "they sell {an_item} for {price} coins.",
        ),
        questions=(
            "how much does {an_item} cost?",
            "what does {an_item} cost?",
            "what is the price of {an_item}?",
            "how many coins does {an_item} cost?",
            "how many coins is {an_item}?",
            "for how many coins do they sell {an_item}?",
        ),
        heldout_questions=("how much do I pay for {an_item}?",),
        answers=("{an_item} costs {price} coins.", "the price of {an_item} is {price} coins."),
        follow=("and what does it cost?",),
        claim="{an_item} costs {price} coins",
        short="{price} coins",
    ),
}

LEADS = (
    "{question}", "{question}", "{question}", "{question}", "I wonder, {question}",
    "could you tell me, {question}", "please, {question}", "sorry to ask, {question}",
    "before I forget, {question}", "my friend asks, {question}", "excuse me, {question}",
    "please tell me, {question}",
    "quick question: {question}", "hello! {question}", "good morning! {question}",
    "can you help me? {question}", "I have a question. {question}", "tell me, {question}",
    "I want to know: {question}", "I am new in town. {question}", "one more thing: {question}",
)  # fmt: skip
"""How people begin to ask."""

CLAIM_QUESTIONS = (
    "is it true that {claim}?",
    "I heard that {claim}. Is that true?",
    "somebody told me that {claim}. Is that right?",
    "I am sure that {claim}. Am I right?",
    "{claim}, right?",
)
HELDOUT_CLAIM_QUESTIONS = ("can it be true that {claim}?", "they say that {claim}. Is it so?")
