"""What a model is trained on where labelers differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Pair
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.labelers.training import settle, vote_effects
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.checks import check
from rlhf_jax.stages.defaults import resolve
from rlhf_jax.stages.preference_rows import pack_pairs
from rlhf_jax.tasks.builders import load_records
from tests.labelers.test_agreement import votes_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def vote(pair, chosen, rejected, labeler):
    meta = {"labeler": labeler, "pair": pair, "order": "chosen_first"}
    name = f"{pair}-{labeler}"
    return Pair(name, (Message("user", f"{pair}?"),), chosen, rejected, meta=meta)


VOTES = [
    vote("p", "yes", "no", "ann"),
    vote("p", "no", "yes", "bob"),
    vote("p", "no", "yes", "cyd"),
    vote("q", "yes", "no", "ann"),
    vote("q", "no", "yes", "bob"),
]


def test_pooled_votes_are_pairs_as_they_are():
    settled = settle(VOTES, "pooled", "votes")
    assert settled.records == VOTES and settled.effects is None and settled.weights is None


def test_a_majority_is_one_pair_and_an_even_vote_is_none(capsys):
    settled = settle(VOTES, "majority", "votes")
    assert [(pair.chosen, pair.rejected) for pair in settled.records] == [("no", "yes")]
    assert settled.weights is None
    assert "5 votes about 2 pairs, of which 1 are undecided and left out" in capsys.readouterr().out


def test_weights_are_how_sure_dawid_skene_is():
    votes = [vote(f"p{i}", "yes", "no", who) for i in range(20) for who in ("ann", "bob", "cyd")]
    settled = settle([*votes, *VOTES[:3]], "weighted", "votes")
    assert len(settled.records) == len(settled.weights) == 21
    assert settled.weights[:20].min() > 0.99 and 0 < settled.weights[20] < 0.99


def test_without_a_decided_pair_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match="no pair has a majority"):
        settle(VOTES[3:], "majority", "votes")


@pytest.mark.parametrize("how", ["majority", "weighted", "nuisance"])
def test_votes_on_one_reply_twice_are_left_out(how, capsys):
    votes = [vote(f"p{i}", *[("yes", "no"), ("no", "yes")][i % 2], who)
             for i in range(40) for who in ("ann", "bob", "cyd")]  # fmt: skip
    votes = [replace(each, meta=each.meta | {"order": ""}) for each in votes]
    same = [vote(f"s{i}", "yes", "yes", who) for i in range(9) for who in ("ann", "bob", "cyd")]
    settled, alone = settle([*same, *votes], how, "votes"), settle(votes, how, "votes")
    assert "27 votes on the same reply twice are left out" in capsys.readouterr().out
    assert [*settled.records] == [*alone.records]
    np.testing.assert_array_equal(settled.effects, alone.effects)


def test_pairs_without_labelers_are_no_votes():
    with pytest.raises(UserError, match="has no labeler"):
        settle([Pair("a", (Message("user", "?"),), "b", "c")], "nuisance", "votes")


@pytest.fixture(scope="module")
def biased():
    """(votes of ten people of whom three prefer what is longer, what they are fitted to be)."""
    records = load_records("town/biased_votes", "train")
    return records, settle(records, "nuisance", "town").effects


def test_a_liking_for_length_is_a_bias_for_what_is_longer(biased):
    records, effects = biased
    longer = np.array([len(r.chosen.split()) - len(r.rejected.split()) for r in records])
    loving = np.array(["length-loving" in r.meta["labeler"] for r in records])
    # Their truth is 0.6 logits per word; of the others it is 0.
    for mine, per_word in ((loving, 0.6), (~loving, 0.0)):
        slope = (longer * effects[:, 1])[mine].sum() / (longer**2)[mine].sum()
        assert slope == pytest.approx(per_word, abs=0.25)
    honest = np.array(["honest" in r.meta["labeler"] for r in records])
    assert effects[honest, 0].mean() > effects[loving, 0].mean()
    assert effects[:, 2].min() >= 0 and effects[:, 2].max() < 0.2


def test_rows_have_their_votes_effects_and_held_out_rows_have_none(tmp_path):
    tokenizer = train_bpe([f"p{i} yes no" for i in range(50)], 300)
    data = SimpleNamespace(
        row_length=64, over_long="error", labelers="nuisance", max_bad_fraction=0.0, columns=""
    )
    config = SimpleNamespace(data=data, stage="reward")
    lines = [
        {"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "labeler": who}
        | ({"chosen": "no", "rejected": "yes"} if (i + 7 * (who == "cyd")) % 2 else {})
        for i in range(60)
        for who in ("ann", "bob", "cyd")
    ]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = pack_pairs(config, str(path), "train", tokenizer)
    valid = rows["valid"] > 0
    assert rows["votes"].shape == (*valid.shape, 3) and valid.sum() == len(lines)
    effects = np.zeros((len(lines), 3))
    effects[rows["example_ids"][valid]] = rows["votes"][valid]
    assert (effects[:, 2] > 0).all() and not rows["votes"][~valid].any()
    # Ann and Bob agree on every pair, and Cyd says the opposite.
    assert (effects[0::3, 0] > 0).all() and (effects[2::3, 0] < 0).all()
    assert "votes" not in pack_pairs(config, str(path), "validation", tokenizer)


def test_votes_that_tell_nothing_of_replies_have_no_effects_to_take_out():
    with pytest.raises(UserError, match="don't tell how good replies are"):
        settle(VOTES, "nuisance", "votes")


@pytest.mark.parametrize(
    ("experiment", "how", "why"),
    [
        ("labelers.py:ratings", "majority", "votes on pairs"),
        ("dpo.py", "nuisance", "for reward models"),
    ],
)
def test_what_becomes_of_votes_must_fit_the_loss(experiment, how, why):
    config = load_config(str(EXPERIMENTS / experiment))
    config.data.labelers = how
    with pytest.raises(UserError, match=why):
        check(resolve(config))


def test_a_bias_is_for_the_side_that_was_chosen():
    votes = votes_of([(who, pair, pair % 2) for pair in range(40) for who in range(3)])
    votes = replace(votes, first=np.where(votes.labeler == 0, 1.0, -1.0) * votes.labeler)
    effects = vote_effects(votes)
    one, other = effects[3:6], effects[:3]  # for a, for b
    np.testing.assert_allclose(one[:, 1], -other[:, 1], atol=1e-9)
