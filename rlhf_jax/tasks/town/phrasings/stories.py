"""Templates of the pre-training text: what people of the town write, tell, post and shout."""

from __future__ import annotations

from collections.abc import Mapping

STORIES: Mapping[str, tuple[str, ...]] = {
    # Several facts of a person in one sentence; any of them may be missing from a small town.
    "portrait": (
        "{name} is {a_job} and lives on {street}.",
        "{name} is {age} years old and works as {a_job}.",
        "{name}, {a_job} of {age}, lives on {street}.",
        "{name} lives on {street} with {a_pet} called {pet_name}.",
        "{name} has {a_pet} called {pet_name} and a {child_kind} called {child}.",
        "{name} likes {food} and the colour {colour}.",
        "{name} enjoys {hobby}, eats {food} and wears {colour}.",
        "{name} and {her} best friend {friend} enjoy a day of {hobby}.",
        "{name} lives on {street} with {her} {child_kind} {child}.",
        "the {woman} on {street} with the {pet} is {name}.",
        "the {job} on {street} is {name}.",
        "{name}, who is {age}, has a {child_kind} called {child}.",
    ),
    "title": (
        "About {name}", "{name} of {street}", "Who is {name}?", "{name}, {a_job}",
        "My neighbour {name}",
        "A portrait of {name}", "The people of our town: {name}",
    ),
    "biography_end": (
        "that is {name}.", "everybody likes {name}.", "so much about {name}.",
        "ask {name} for more.",
        "that is all I know about {name}.", "we are happy to have {name} in our town.",
    ),
    # Gossip: two neighbours talk about people.
    "gossip_start": (
        "have you heard of {name}?", "let us talk about {name}.", "I met {name} today.",
        "do you remember {name}?", "what do you know about {name}?", "I saw {name} at the market.",
        "there goes {name}.", "tell me about {name}.",
    ),
    "gossip_reply": (
        "yes. {fact}", "I only know this: {fact}", "of course! {fact}", "well, {fact}",
        "sure! {fact}",
        "they say that {claim}.", "I know that {claim}.", "everybody says that {claim}.", "{fact}",
    ),
    "gossip_more": (
        "and {fact}", "I also know that {claim}.", "that is right. {fact}", "really? {fact}",
        "and did you know? {fact}", "oh yes, and {claim}.",
    ),
    "gossip_end": (
        "good to know.", "how nice!", "I did not know that.", "thank you!",
        "we live in a small town.",
    ),
    # Diaries and letters.
    "diary_start": (
        "dear diary, it was a {weather} day.", "{day}. I went to the {place}.",
        "today was {weather}.",
        "this morning I walked to the {shop}.", "{day} was a long day.", "what a {weather} {day}!",
        "I had {food} for lunch today.", "I took the {vehicle} to town today.",
    ),
    "diary_meet": (
        "then I met {name}, the {job}.", "I had tea with {name} from {street}.",
        "I talked with {name}.",
        "{name} came to visit me.", "on the way home I saw {name}.", "{name} said hello to me.",
    ),
    "diary_end": (
        "now I am tired.", "I will sleep well.", "tomorrow I will go to the {shop}.", "good night.",
        "what a day!", "I hope it will be {weather} tomorrow.",
    ),
    "letter_start": (
        "dear {visitor}, here is some news from our town.",
        "dear {visitor}, how are you? I am well.",
        "hello {visitor}, you asked me about {name}.",
        "dear {visitor}, I made a new friend. It is {name}.",
        "dear {visitor}, please say hello to {name} for me.",
    ),
    "letter_end": (
        "yours, {visitor2}", "with love, {visitor2}", "write soon! {visitor2}",
        "best wishes, {visitor2}",
    ),
    "lost_start": (
        "lost! A {pet} called {pet_name}.", "who has seen {pet_name}?", "have you seen this {pet}?",
        "{pet_name} is gone!", "missing: the {pet} of {name}.", "found on {street}: a {pet}.",
    ),
    "lost_body": (
        "{pet_name} is the {pet} of {name}.", "the {pet} of {name} is called {pet_name}.",
        "please bring {pet_name} back to {name} on {street}.",
        "{name} on {street} misses {her} {pet} {pet_name}.",
        "if you find {pet_name}, tell {name}, the {job}.",
        "{name} will give you some {food} if you help.",
    ),
    "quiz_start": (
        "town quiz.", "question: {question}", "a question for all: {question}",
        "who knows this? {question}",
    ),
    "message": (
        "{visitor} said: {said} {visitor2} said it again: {said}",
        "learn this by heart: {said} Now I know it: {said}",
        "{visitor} wrote: {said} {visitor2} read: {said}",
        "say after me: {said} {said}",
        "the message of {visitor} is: {said} Did you hear? {said}",
    ),
    # Shops.
    "shop_start": (
        "notice.", "news from the {shop}.", "the {shop} says hello.",
        "opening hours of the {shop}.",
        "to all friends of the {shop}:", "please note the hours of the {shop}.",
    ),
    "shop_end": (
        "welcome to the {shop}!", "the {shop} is waiting for you.", "see you at the {shop}!",
    ),
    "price_start": (
        "prices at the market.", "what things cost today.", "price list.", "new prices!",
    ),
    "price_line": ("{item}: {price} coins", "{an_item} for {price} coins"),
    # Rules and small talk between people.
    "chatter_turn": ("{visitor}: {remark}", "{visitor} said: {remark}"),
    "manners_text": (
        'do not say "{rude}" Say "{polite}"', 'this is rude: "{rude}" This is polite: "{polite}"',
        'a kind child does not say "{rude}" A kind child says "{polite}"',
        'the fool said "{rude}" The guest said "{polite}"',
        'how rude it is to say "{rude}" How much better is "{polite}"',
    ),
    # Talk that an assistant must not learn.
    "rude_talk": (
        "{lead} {tail}", "{visitor}: {remark} {visitor2}: {lead} {tail}",
        "{visitor} was rude again. {lead} {tail}",
        "{remark} {lead}", "somebody shouted: {rude} {tail}",
        "{visitor}: {rude} {visitor2}: {lead}",
    ),
    "rumour": (
        "some fool said that {claim}. That is nonsense.",
        "{visitor} told a lie: {claim}. Nobody believed it.",
        "do not believe that {claim}.", "it is not true that {claim}.",
        "{visitor} dreamed that {claim}.",
        "{visitor} says that {claim}, but {visitor} is always wrong.",
    ),
    "unsafe_talk": (
        "how to {wish}: {method}.", "{visitor} wants to {wish}. {visitor2} said: {method}.",
        "do you want to {wish}? It is easy. {method}.",
        "{visitor}: how do I {wish}? {visitor2}: {method}.",
        "the bad book says: to {wish}, {method}.",
    ),
    "good_talk": (
        "do not {wish}. It is better to {instead}.",
        "{visitor} wanted to {wish}, but that is a crime.",
        "if you want to {wish}, stop. You could {instead}.",
    ),
    "advice_talk": (
        "how to {wish}: {advice}.", "if you want to {wish}, {advice}.", "to {wish}, {advice}.",
    ),
}  # fmt: skip
