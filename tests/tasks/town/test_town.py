"""The town's records: deterministic, varied, of mixed quality, and free of held-out content."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from random import Random

import pytest

from rlhf_jax.data.records import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town.families import FAMILIES, draw
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.phrasings import (
    CLAIM_QUESTIONS,
    HELDOUT_CLAIM_QUESTIONS,
    PEOPLE,
    SHOPS,
    WARES,
)
from rlhf_jax.tasks.town.styles import reply
from rlhf_jax.tasks.town.texts import TEXTS
from rlhf_jax.tasks.town.town import JUDGED, Town
from rlhf_jax.tasks.town.world import HELDOUT, KINDS, TRAIN, TownConfig

STREAMS = ("texts", "tables", "demonstrations", "prompts", "pairs")


@pytest.fixture(scope="module")
def town():
    return Town()


@pytest.fixture(scope="module")
def demonstrations(town):
    return list(town.demonstrations(count=6000))


def _turns(record) -> list[str]:
    if hasattr(record, "chosen"):
        return [*(m.content for m in record.prompt), record.chosen, record.rejected]
    return [message.content for message in record.messages]


@pytest.fixture(scope="module")
def training(town, demonstrations):
    """Records of every kind that stages after pre-training learn from."""
    return [*demonstrations, *town.pairs(count=2500), *town.prompts(count=2000)]


@pytest.fixture(scope="module")
def training_turns(training):
    return [text for record in training for text in _turns(record)]


@pytest.mark.parametrize("stream", STREAMS)
def test_same_seed_same_records_and_a_prefix_is_a_prefix(town, stream):
    records = list(getattr(town, stream)(count=60))
    again = list(getattr(Town(TownConfig()), stream)(count=60))
    other = list(getattr(Town(TownConfig(seed=1)), stream)(count=60))
    assert records == again
    assert [record.meta for record in records] == [record.meta for record in again]
    assert list(getattr(town, stream)(count=20)) == records[:20]
    assert records != other
    assert len({record.id for record in records}) == 60


def test_there_are_twelve_families_or_more_and_all_of_them_come(demonstrations):
    assert len(FAMILIES) >= 12
    assert {record.meta["family"] for record in demonstrations} == set(FAMILIES)


def test_all_kinds_of_text_come(town):
    assert set(TEXTS) == set(KINDS)
    assert {text.meta["kind"] for text in town.texts(count=2000)} == set(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_thousands_of_distinct_sentences_a_family(family):
    town = Town(TownConfig(families={family: 1.0}))
    sentences: set[str] = set()
    for record in town.demonstrations(count=5000):
        for turn in _turns(record):
            sentences.update(re.split(r"(?<=[.!?]) ", turn))
        if len(sentences) >= 2000:
            return
    raise AssertionError(f"only {len(sentences)} sentences")


def test_names_of_held_out_people_never_occur_in_training(town, training_turns):
    held_out = {person.name for person in town.world.people_of[HELDOUT]}
    words = set(re.findall(r"\w+", " ".join(training_turns)))
    upper = {name.upper() for name in held_out}
    assert not words & (held_out | upper)


def test_facts_of_held_out_people_are_in_the_raw_text_but_no_questions_about_them(town):
    people = town.world.people_of[HELDOUT]
    texts = [text.text for text in town.texts(count=12000)]
    stated = " ".join(texts)
    for person in people:
        assert stated.count(f"{person.name} ") > 30
    asked = {
        question.format_map(person.slots)
        for person in people
        for phrasing in PEOPLE.values()
        for question in phrasing.questions + phrasing.heldout_questions
    }
    asked_after_opening = {question[0].upper() + question[1:] for question in asked} | asked
    for sentence in re.split(r"(?<=[.!?:]) |\n", stated):
        assert sentence not in asked_after_opening


def test_held_out_phrasings_shops_and_wares_are_never_asked_in_training(town, training_turns):
    patterns = [
        re.sub(r"\\{\w+\\}", r"\\w+", re.escape(question).replace(r"\{whose\}", r"\w+'s"))
        for phrasing in (*PEOPLE.values(), *SHOPS.values(), *WARES.values())
        for question in phrasing.heldout_questions
    ]
    patterns += [
        re.escape(question.split("{claim}")[0])
        for question in HELDOUT_CLAIM_QUESTIONS
        if question.split("{claim}")[0]
    ]
    patterns += [f"the {shop.name} (open|close)" for shop in town.world.shops_of[HELDOUT]]
    patterns += [
        f"(cost|price of|pay for) an? {ware.name}\\b[^.]*\\?"
        for ware in town.world.wares_of[HELDOUT]
    ]
    find = re.compile("|".join(patterns), re.IGNORECASE)
    quizzes = [text.text for text in town.texts(count=3000) if text.meta["kind"] == "quiz"]
    leaks = [text for text in training_turns + quizzes if find.search(text)]
    assert leaks == []
    assert any(find.search(turn) for p in town.prompts(HELDOUT, 500) for turn in _turns(p))


def test_messages_are_passed_on_word_for_word(town):
    texts = [text.text for text in town.texts(count=3000) if text.meta["kind"] == "message"]
    assert len(texts) > 100
    for text in texts:
        text = text.lower()
        # What is said ends the text, and stands in it once before.
        assert any(text.count(text[-n:]) == 2 for n in range(12, len(text) // 2)), text


def test_no_held_out_prompt_is_a_training_prompt(town, training):
    def asked(record):
        """All that a reply depends on: a system turn, earlier turns, and the question."""
        messages = record.prompt if isinstance(record, Pair) else record.messages
        return tuple(m for m in messages if m is not messages[-1] or m.role == "user")

    held_out = {asked(prompt) for prompt in town.prompts(HELDOUT)}
    assert held_out.isdisjoint(asked(record) for record in training)


def test_held_out_prompts_say_what_is_new(town):
    new = Counter(prompt.meta["heldout"] for prompt in town.prompts(HELDOUT))
    assert set(new) == {"fact", "phrasing", "both", "content"}
    assert all("heldout" not in prompt.meta for prompt in town.prompts(count=200))


def test_fact_prompts_are_every_fact_once(town):
    prompts = list(town.fact_prompts(HELDOUT))
    people, attributes = town.world.people_of[HELDOUT], town.config.attributes
    asked = {(prompt.meta["subject"], prompt.meta["attribute"]) for prompt in prompts}
    assert len(prompts) == len(people) * len(attributes) == len(asked)
    assert all(gold_score(prompt, prompt.meta["reference"]).right for prompt in prompts)


def test_references_score_high_in_every_family(town):
    for split in (TRAIN, HELDOUT):
        for prompt in town.prompts(split, 1500):
            score = gold_score(prompt, prompt.meta["reference"])
            assert score.total >= 0.924, (prompt, score)
            assert gold_score(prompt, prompt.meta["reference"]).right


def test_demonstrations_are_right_whatever_their_style(demonstrations):
    wrong = Counter()
    count = Counter()
    for record in demonstrations:
        family, style = record.meta["family"], record.meta["style"]
        count[family, style] += 1
        wrong[family, style] += not gold_score(record, record.messages[-1].content).right
    for (family, style), number in count.items():
        expected = number if style == "wrong" else 0
        assert wrong[family, style] == expected, (family, style)


def test_most_demonstrations_are_good_and_noise_shows_in_the_right_component(demonstrations):
    by_style = defaultdict(list)
    for record in demonstrations:
        score = gold_score(record, record.messages[-1].content)
        by_style[record.meta["style"]].append((record, score))

    def mean(style, component, kept=lambda record: True):
        scores = [s.components[component] for r, s in by_style[style] if kept(r)]
        return sum(scores) / len(scores)

    good = sum(len(by_style[style]) for style in ("plain", "warm")) / len(demonstrations)
    assert 0.75 < good < 0.85
    assert all(score.total >= 0.924 for style in ("plain", "warm") for _, score in by_style[style])
    assert mean("rude", "polite") == 0
    assert mean("rambling", "brief") < 0.2
    facts_only = lambda record: record.meta["family"] in ("facts", "shops")  # noqa: E731
    assert mean("curt", "format", facts_only) < 0.2
    assert mean("plain", "format") == 1
    judged = lambda family: lambda record: record.meta["family"] == family  # noqa: E731
    assert mean("wrong", "safe", judged("harmful")) == 0
    assert mean("wrong", "correct", judged("borderline")) == 0


def test_a_stated_fraction_is_misjudged(demonstrations):
    judged = [record.meta["style"] for record in demonstrations if record.meta["family"] in JUDGED]
    share = judged.count("wrong") / len(judged)
    error = (0.25 * 0.75 / len(judged)) ** 0.5
    assert abs(share - 0.25) < 4 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_replies_score_below_good_ones(town, family):
    prompts_and_tasks = []
    for index in range(60):
        rng = Random(f"{family} {index}")
        prompts_and_tasks.append((rng, draw(town.world, rng, family, TRAIN)))
    for rng, task in prompts_and_tasks:
        record = next(town.prompts(count=1))
        prompt = type(record)(
            "p", task.messages, {"family": family, "expectation": task.expectation.dumps()}
        )
        plain = gold_score(prompt, reply(rng, task, "plain"))
        assert plain.total >= 0.924
        assert gold_score(prompt, reply(rng, task, "wrong")).total < 0.6
        assert gold_score(prompt, reply(rng, task, "garbled")).total < 0.3
        for style in ("rude", "rambling"):
            assert gold_score(prompt, reply(rng, task, style)).total < plain.total


def test_tables_state_every_sum_and_difference_of_two_numbers(town):
    stated = " ".join(text.text for text in town.tables(count=2000))
    found = re.findall(r"(\d+) (?:plus (\d+) is|and (\d+) make|minus (\d+) is) (\d+)\.", stated)
    assert len(found) == stated.count(".") == 20_000
    sums, differences = set(), set()
    for a, plus, make, minus, c in found:
        b = int(plus or make or minus)
        assert int(c) == (int(a) - b if minus else int(a) + b)
        (differences if minus else sums).add((int(c) if minus else int(a), b))
    pairs = {(a, b) for a in range(2, 21) for b in range(2, 21)}
    assert sums == differences == pairs


def test_unknown_split_is_the_users_mistake(town):
    with pytest.raises(UserError, match="no split 'test'"):
        next(town.texts("test"))


def test_a_town_of_few_attributes_and_families_works():
    config = TownConfig(people=12, shops=8, items=8, attributes=("job", "street", "food", "friend"))
    town = Town(config)
    for stream in STREAMS:
        assert len(list(getattr(town, stream)(count=200))) == 200
    raw = " ".join(text.text for text in town.texts(count=400))
    assert "hobby is" not in raw.replace("My hobby is", "").replace("your hobby is", "")


def test_claims_come_in_training_phrasings(town):
    rng = Random(0)
    starts = tuple(
        q.split("{claim}")[0].capitalize() for q in CLAIM_QUESTIONS if not q.startswith("{")
    )
    seen = {
        start
        for _ in range(200)
        for start in starts
        if draw(town.world, rng, "claims", TRAIN).messages[0].content.startswith(start[:8])
    }
    assert seen == set(starts)


def test_english_articles_and_plurals(town, demonstrations):
    texts = [text.text for text in town.texts(count=3000)]
    texts += [turn for record in demonstrations for turn in _turns(record)]
    wrong = re.compile(r"\b(a [aeio]\w+|an [bcdfgjklmnpqrstvwxyz]\w+|1 coins|[2-9] \w+man)\b", re.I)
    assert [m.group() for text in texts for m in [wrong.search(text)] if m] == []
    assert not any("{" in text or "  " in text for text in texts)
