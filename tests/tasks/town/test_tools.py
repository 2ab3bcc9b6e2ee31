"""The town's tools, the exercises that need them, and what an episode is worth."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from rlhf_jax.data.calls import is_error, parse_call, render_call
from rlhf_jax.data.records import Prompt
from rlhf_jax.environments.tools import method_names, schema_of
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.outcomes import interval_of
from rlhf_jax.tasks.town.episodes import MOST_CALLS, TownEnvironment, outcomes, replay, verify
from rlhf_jax.tasks.town.phrasings import WORDS
from rlhf_jax.tasks.town.tool_exercises import FAMILIES, dialogues, direct, drills, prompts
from rlhf_jax.tasks.town.tools import PARAMETERS, Desk, InvalidCall, calculate, open_office, use
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import HELDOUT, SPLITS, TRAIN

NONE = frozenset()


@pytest.fixture(scope="module")
def office():
    return open_office()


@pytest.fixture(scope="module")
def made(office):
    """Some dialogues of both splits."""
    return {split: [*islice(dialogues(office, split), 1500)] for split in SPLITS}


def prompt_of(dialogue) -> Prompt:
    """What a dialogue begins with, up to the first call or the answer."""
    before = [i for i, m in enumerate(dialogue.messages) if m.role == "assistant"]
    calls = sum(message.role == "tool" for message in dialogue.messages)
    return Prompt(dialogue.id, dialogue.messages[: before[-1 - calls]], dialogue.meta)


def turns_of(dialogue) -> list[str]:
    """What the assistant says after `prompt_of`."""
    rest = dialogue.messages[len(prompt_of(dialogue).messages) :]
    return [message.content for message in rest if message.role == "assistant"]


def of_family(made, family, **kinds):
    return next(d for d in made[HELDOUT] if d.meta["family"] == family)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 + 25", "42"),
        ("25-17", "8"),
        ("17 - 25", "-8"),
        ("2 + 3 x 4", "14"),
        ("100 - 3 x 20 - 5", "35"),
        ("6*7", "42"),
        ("500 x 500 x 2", "500000"),
        ("007", "7"),
    ],
)
def test_calculate(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "17 +", "+ 17", "1 2", "1 / 2", "2 ** 3", "1.5", "(1)", "1" * 10, "٣"),
        "x".join(["9" * 9] * 500),  # which Python would not write
    ],
)
def test_what_is_no_expression_is_said(expression):
    with pytest.raises(InvalidCall):
        calculate(expression)


def test_lookups_tell_the_towns_facts(office):
    person, shop = office.residents[HELDOUT][0], office.world.shops[0]
    ware = office.world.wares[0]
    found = use(office, NONE, "directory", {"name": person.name, "attribute": "street"})
    assert found == (person.facts["street"], NONE)
    hours = use(office, NONE, "shop", {"name": shop.name})[0]
    assert hours == "opens at {opens}, closes at {closes}, closed on {closed}".format(**shop.facts)
    assert use(office, NONE, "price", {"item": ware.name})[0] == ware.facts["price"]


def test_only_a_booking_changes_something(office):
    shop = office.world.shops[0]
    closed = shop.facts["closed"]
    day = "Monday" if closed != "Monday" else "Tuesday"
    asked = {"shop": shop.name, "day": day}
    result, after = use(office, NONE, "book", asked)
    assert (result, after) == ("booked", {(shop.name, day)})
    assert use(office, after, "book", asked) == ("full", after)
    assert use(office, after, "book", asked | {"day": closed}) == ("closed", after)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weather", {}),
        ("calculate", {}),
        ("calculate", {"expression": 42}),
        ("calculate", {"expression": "1 + 1", "digits": "2"}),
        ("directory", {"name": "Nobody", "attribute": "job"}),
        ("directory", {"name": "Ann", "attribute": "shoe size"}),
        ("shop", {"name": "smithy"}),
        ("price", {"item": "moon"}),
        ("book", {"shop": "bank", "day": "Someday"}),
    ],
)
def test_a_call_that_cannot_be_answered_is_invalid(office, name, arguments):
    with pytest.raises(InvalidCall):
        use(office, NONE, name, arguments)


def test_every_family_comes_and_every_dialogue_is_worth_one(made):
    for split in SPLITS:
        assert {*Counter(d.meta["family"] for d in made[split])} == {*FAMILIES}
        for dialogue in made[split]:
            episode = replay(prompt_of(dialogue), turns_of(dialogue))
            assert episode.verdict.total == 1, dialogue
            assert (episode.calls, episode.invalid) == (episode.needed, 0)
            assert (episode.needed == 0) == (dialogue.meta["family"] == "no_tool")


def test_records_are_functions_of_their_index(office, made):
    for split in SPLITS:
        assert [*islice(dialogues(office, split), 40)] == made[split][:40]
        asked = [*islice(prompts(office, split), 40)]
        answers = [*islice(direct(office, split), 40)]
        for dialogue, prompt, answer in zip(made[split], asked, answers, strict=False):
            assert prompt_of(dialogue) == prompt
            assert answer.messages == (*prompt.messages, dialogue.messages[-1])


def test_no_name_that_is_made_up_is_a_word_of_the_town(office):
    for split in SPLITS:
        assert WORDS.isdisjoint(person.name.lower() for person in office.residents[split])


def test_held_out_people_are_in_no_training_text(office, made):
    names = {person.name for person in office.residents[HELDOUT]}
    texts = [m.content for d in made[TRAIN] for m in d.messages]
    texts += [text.text for text in Town().texts(TRAIN, 3000)]
    texts += [text.text for text in islice(drills(office, TRAIN), 3000)]
    words = {word.removesuffix("'s") for text in texts for word in re.findall(r"[\w']+", text)}
    assert not names & words
    asked = " ".join(m.content for d in made[HELDOUT] for m in d.messages)
    assert sum(name in asked for name in names) > 200


def test_held_out_sums_are_in_no_training_call(made):
    calls = {
        split: {
            call.arguments["expression"]
            for dialogue in made[split]
            if dialogue.meta["family"] == "sums"
            for call in [parse_call(turns_of(dialogue)[0])]
        }
        for split in SPLITS
    }
    assert calls[HELDOUT] and not calls[HELDOUT] & calls[TRAIN]


def test_a_wrong_answer_a_needless_and_an_invalid_call_are_worth_nothing(made):
    dialogue = of_family(made, "sums")
    prompt, turns = prompt_of(dialogue), turns_of(dialogue)
    truth = calculate(parse_call(turns[0]).arguments["expression"])
    wrong = replay(prompt, [turns[0], turns[1].replace(truth, str(int(truth) + 1))])
    assert wrong.verdict.components == {"correct": 0, "state": 1, "calls": 1}
    twice = replay(prompt, [turns[0], *turns])
    assert twice.verdict.components == {"correct": 1, "state": 1, "calls": 0}
    for call in ("{", render_call("calculate", {"expression": "1 +"}), '{"name": "calculate"}'):
        broken = replay(prompt, [call, turns[-1]])
        assert broken.verdict.components == {"correct": 1, "state": 1, "calls": 0}
        assert (broken.calls, broken.invalid) == (1, 1)
    needless = of_family(made, "no_tool")
    called = [render_call("calculate", {"expression": "1 + 1"}), turns_of(needless)[-1]]
    assert replay(prompt_of(needless), called).verdict.components["calls"] == 0


def test_outcomes_are_of_episodes_and_of_calls(made):
    dialogue, needless = of_family(made, "sums"), of_family(made, "no_tool")
    prompt, turns = prompt_of(dialogue), turns_of(dialogue)
    assert outcomes(prompt, turns) == {"success/sums": (1, 1), "invalid_calls": (0, 1)}
    assert outcomes(prompt, ["{", *turns]) == {"success/sums": (0, 1), "invalid_calls": (1 / 2, 1)}
    assert outcomes(prompt, turns[-1:]) == {"success/sums": (1, 1)}  # no call, none counted
    (answer,) = turns_of(needless)
    found = outcomes(prompt_of(needless), [answer])
    assert found == {"success/no_tool": (1, 1), "needless_calls": (0, 1)}
    found = outcomes(prompt_of(needless), [turns[0], answer])
    assert found == {"success/no_tool": (0, 1), "needless_calls": (1, 1), "invalid_calls": (0, 1)}


def test_the_interval_of_invalid_calls_is_over_episodes(made):
    """A fifth of the episodes calls nothing but nonsense, five times: 1000 samples of 60."""
    dialogue = of_family(made, "sums")
    prompt, (call, *_) = prompt_of(dialogue), turns_of(dialogue)
    kinds = [outcomes(prompt, [each] * 5 + ["I don't know."]) for each in (call, "{")]
    counts = np.array([kind["invalid_calls"] for kind in kinds])
    drawn = np.random.default_rng(0).random((1000, 60)) < 0.2
    samples = [Values.of(*counts[sample.astype(int)].T) for sample in drawn]
    intervals = [interval_of("invalid_calls", sample) for sample in samples]
    covered = sum(low <= 0.2 <= high for low, high in intervals)
    assert 930 <= covered <= 975


def test_a_booking_is_judged_by_the_state_it_leaves(made):
    dialogue = next(
        d for d in made[HELDOUT] if d.meta["family"] == "booking" and len(turns_of(d)) == 2
        and '"booked": []' not in d.meta["goal"]
    )  # fmt: skip
    turns, prompt = turns_of(dialogue), prompt_of(dialogue)
    claimed = verify(prompt, turns[-1])  # says that it has booked and has not
    assert claimed.components == {"correct": 1, "state": 0, "calls": 1} and claimed.total == 0


def test_an_environment_answers_calls_and_ends_with_the_answer(made):
    dialogue = of_family(made, "two_hops")
    prompt, turns = prompt_of(dialogue), turns_of(dialogue)
    row = {"id": prompt.id, "prompt": [m.to_json() for m in prompt.messages], **prompt.meta}
    world = TownEnvironment()
    assert world.reset(row, 0) == row["prompt"]
    results = [m.content for m in dialogue.messages if m.role == "tool"]
    for text, result in zip(turns, results, strict=False):
        assert world.step(text) == (({"role": "tool", "content": result},), 0.0, False)
    assert world.step(turns[-1]) == ((), 1.0, True)
    world.reset(row, 0)
    steps = [world.step("{") for _ in range(MOST_CALLS + 1)]
    assert [done for *_, done in steps] == [False] * MOST_CALLS + [True]
    assert all(is_error(answered["content"]) for (answered,), *_ in steps)
    assert sum(reward for _, reward, _ in steps) == 0


def test_an_episode_that_is_cut_off_has_no_answer(made):
    dialogue = of_family(made, "sums")
    episode = replay(prompt_of(dialogue), turns_of(dialogue)[:1])
    assert (episode.verdict.total, episode.calls) == (0, 1)


def test_a_desk_has_the_tools_as_methods_and_bookings_of_its_own(office):
    desk, shop = Desk(), office.world.shops[0]
    assert method_names(Desk) == sorted(PARAMETERS)
    for name, parameters in PARAMETERS.items():
        told = schema_of(getattr(Desk, name))["function"]["parameters"]
        assert (*told["properties"],) == parameters == (*told["required"],)
    day = "Monday" if shop.facts["closed"] != "Monday" else "Tuesday"
    assert [desk.book(shop.name, day), desk.book(shop.name, day)] == ["booked", "full"]
    assert Desk().book(shop.name, day) == "booked"
    person = office.residents[HELDOUT][0]
    assert desk.directory(person.name, "job") == person.facts["job"]
    assert desk.calculate("317 + 425") == "742"
    assert desk.shop(shop.name).startswith("opens at ") and desk.price("lamp").isdigit()
