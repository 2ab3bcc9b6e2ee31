"""The town as a TFDS data set."""

from __future__ import annotations

import pytest

from rlhf_jax.data.builders import load_records
from rlhf_jax.data.records import KINDS
from rlhf_jax.data.town import builder
from rlhf_jax.data.town.gold import gold_score
from rlhf_jax.data.town.town import Town
from rlhf_jax.data.town.world import TownConfig
from rlhf_jax.errors import UserError

SMALL = TownConfig(
    texts=60, heldout_texts=20, demonstrations=60, heldout_demonstrations=20, pairs=60,
    heldout_pairs=20, prompts=60, heldout_prompts=20,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_town(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(builder.town, "Town", lambda: Town(SMALL))


def _by_id(records):
    return {record.id: record for record in records}


@pytest.mark.parametrize(
    ("config", "stream"),
    [
        ("text", "texts"),
        ("conversation", "demonstrations"),
        ("pair", "pairs"),
        ("prompt", "prompts"),
    ],
)
def test_records_come_back_as_they_were_made(config, stream):
    town = Town(SMALL)
    for split, made in (("train", "train"), ("validation", "heldout")):
        records = load_records(f"town/{config}", split)
        assert all(isinstance(record, KINDS[config]) for record in records)
        expected = _by_id(getattr(town, stream)(made))
        assert _by_id(records) == expected
        assert {r.id: dict(r.meta) for r in records} == {
            name: dict(record.meta) for name, record in expected.items()
        }


def test_fact_prompts_can_be_scored_after_the_round_trip():
    prompts = load_records("town/facts", "validation")
    assert len(prompts) == 15 * 10
    assert all(gold_score(p, p.meta["reference"]).components["correct"] == 1 for p in prompts)


def test_an_unknown_config_names_the_known_ones():
    with pytest.raises(UserError, match="facts"):
        load_records("town/fact", "train")
