"""The town as a data set."""

from __future__ import annotations

import pytest

from rlhf_jax.data.records import KINDS
from rlhf_jax.errors import UserError
from rlhf_jax.tasks import builders
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.town import dataset
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import TownConfig

SMALL = TownConfig(
    texts=60, heldout_texts=20, demonstrations=60, heldout_demonstrations=20, pairs=60,
    heldout_pairs=20, prompts=60, heldout_prompts=20,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_town(monkeypatch):
    monkeypatch.setattr(dataset, "Town", lambda config=None: Town(config or SMALL))
    builders._make.cache_clear()
    yield
    builders._make.cache_clear()


@pytest.mark.parametrize(
    ("config", "stream"),
    [
        ("text", "texts"),
        ("conversation", "demonstrations"),
        ("pair", "pairs"),
        ("prompt", "prompts"),
    ],
)
def test_records_are_those_of_the_town(config, stream):
    town = Town(SMALL)
    for split, made in (("train", "train"), ("validation", "heldout")):
        records = load_records(f"town/{config}", split)
        assert all(isinstance(record, KINDS[config]) for record in records)
        assert records == list(getattr(town, stream)(made))


def test_slices_are_those_of_tfds():
    train = load_records("town/text", "train")
    assert load_records("town/text", "train[:25%]") == train[:15]
    assert load_records("town/text", "train[25%:]") == train[15:]
    assert load_records("town/text", "train[-7:]") == train[-7:]


@pytest.mark.parametrize("split", ["test", "train[:1x]", "train[99:]", "train[:9]+validation"])
def test_a_split_that_cannot_be_read_is_named(split):
    with pytest.raises(UserError, match="town: "):
        load_records("town/text", split)


def test_fact_prompts_can_be_scored():
    prompts = load_records("town/facts", "validation")
    assert len(prompts) == 15 * 10
    assert all(gold_score(p, p.meta["reference"]).components["correct"] == 1 for p in prompts)


def test_an_unknown_config_names_the_known_ones():
    with pytest.raises(UserError, match="facts"):
        load_records("town/fact", "train")
