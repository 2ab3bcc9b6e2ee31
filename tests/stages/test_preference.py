"""The loss of the preference stage, on log-probs given to it."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import pair_scores
from rlhf_jax.evaluation.before_after import Evaluated
from rlhf_jax.losses.preference import LOSSES
from rlhf_jax.stages import defaults, preference, preference_rows
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.saved_model import Model
from tests.stages.conftest import run_main


def _config(**settings):
    return defaults.resolve(defaults.base("preference", loss=settings))


def _loss(monkeypatch, logprobs, batch, **settings):
    config = _config(**settings)
    monkeypatch.setattr(preference, "sequence_logprobs", lambda *_: logprobs)
    return preference.loss(config, None, None, batch, None)


@pytest.mark.parametrize(
    ("during", "every", "asked"), [(0, 2, []), (1, 2, [["a"]]), (9, 2, [["a", "b"]]), (9, 0, [])]
)
def test_as_many_prompts_are_answered_on_the_way_as_asked_for(monkeypatch, during, every, asked):
    class Stop(Exception):
        pass

    def fit(*arguments, keeps_start, **_):
        assert keeps_start == bool(asked)
        arguments[-1](None)  # evaluate
        raise Stop

    seen = []
    for name, does in {
        "load_start": lambda *_: Model(None, None, None),
        "pack_preferences": lambda *_, **__: {},
        "training": lambda *_, **__: (),
        "reference_logprobs": lambda *_: None,
        "check_held_out_prompts": lambda *_: PromptSet(["a", "b"], []),
        "evaluation": lambda *_: lambda params: Evaluated({}, [], {}),
        "sampled_metrics": lambda *arguments: seen.append(arguments[-1]) or {},
        "fit": fit,
    }.items():
        monkeypatch.setattr(preference, name, does)
    stated = {"train": {"eval_every": every}, "eval": {"during": during}}
    with pytest.raises(Stop):
        config = defaults.resolve(defaults.base("preference", **stated))
        preference.run(config, None, {"policy": None})
    assert seen == asked


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_sft_term_makes_sigmoid_rpo(monkeypatch, coefficient):
    rng = np.random.default_rng(0)
    logprobs, reference = (jnp.asarray(-rng.uniform(1, 30, (3, 4, 2))) for _ in range(2))
    batch = {
        "reference_logprobs": reference,
        "lengths": jnp.asarray(rng.integers(1, 9, (3, 4, 2))),
        "valid": jnp.asarray(rng.integers(0, 2, (3, 4)), jnp.float32),
    }
    (total, weight), metrics = _loss(
        monkeypatch, logprobs, batch, name="sigmoid", sft_coefficient=coefficient
    )
    twin = {"name": "rpo", "sft_weight": coefficient}
    (expected, pairs), _ = _loss(monkeypatch, logprobs, batch, **twin)
    np.testing.assert_allclose([total, weight], [expected, pairs], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (total, weight), rtol=1e-5)
    valid = np.asarray(batch["valid"]) > 0
    nll = -np.asarray(logprobs / batch["lengths"])[..., preference.CHOSEN][valid]
    np.testing.assert_allclose(metrics["sft_loss"], [nll.sum(), valid.sum()], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_rewards_are_those_of_the_loss(monkeypatch, name):
    rng = np.random.default_rng(1)
    logprobs, reference = (-rng.uniform(1, 30, (3, 4, 3)).astype(np.float32) for _ in range(2))
    batch = {
        "reference_logprobs": reference,
        "lengths": rng.integers(1, 9, (3, 4, 3)),
        "valid": rng.integers(0, 2, (3, 4)).astype(np.float32),
        "example_ids": np.arange(12).reshape(3, 4),
    }
    _, training = _loss(
        monkeypatch, jnp.asarray(logprobs), jax.tree.map(jnp.asarray, batch), name=name
    )
    pairs = batch | {"lengths": batch["lengths"][..., : preference.MISMATCHED]}
    held_out, _ = preference.implicit_rewards(
        _config(name=name), *(x[..., : preference.MISMATCHED] for x in (logprobs, reference)), pairs
    )
    total, weight = training["rewards/accuracies"]
    assert held_out["eval/accuracy"] == pytest.approx(float(total / weight), abs=1e-5)
    total, weight = training["rewards/margins"]
    assert held_out["eval/rewards/margins"] == pytest.approx(
        float(total / weight), rel=1e-5, abs=1e-5
    )


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_an_unpaired_reply_is_beside_one_to_another_prompt(tmp_path):
    tokenizer = train_bpe(["abc"], 280)
    records = [
        {"prompt": p, "completion": c, "label": i % 2 == 0}
        for i, (p, c) in enumerate([("p", "a"), ("p", "b"), ("q", "c"), ("p", "d")])
    ]
    path = _write(tmp_path / "f.jsonl", records)
    rows = preference_rows.pack_preferences(
        _config(name="kto"), path, "train", tokenizer, mismatched=True
    )
    assert rows["labels"][rows["valid"] > 0][:, 0].tolist() == [1, 0, 1, 0]
    texts = {}
    for sequence in range(8):
        ids = rows["targets"][0][(rows["sequences"][0] == sequence) & (rows["weights"][0] > 0)]
        texts.setdefault(int(rows["example_ids"][0][sequence // 2]), []).append(
            tokenizer.decode(ids.tolist()).strip()
        )
    assert texts == {0: ["a", "c"], 1: ["b", "c"], 2: ["c", "d"], 3: ["d", "c"]}
    with pytest.raises(UserError, match=r"unpaired records: use loss.name = 'kto', or"):
        preference_rows.pack_preferences(
            _config(name="sigmoid"), path, "train", tokenizer, mismatched=False
        )
    alone = _write(tmp_path / "g.jsonl", records[:2])
    with pytest.raises(UserError, match="replies to two prompts or more"):
        preference_rows.pack_preferences(
            _config(name="kto"), alone, "train", tokenizer, mismatched=True
        )


def _pairs_file(path, identical, others):
    """Pairs of one reply twice among others, alternating as far as they go."""
    same = [{"prompt": f"p{i}", "chosen": "abc", "rejected": "abc"} for i in range(identical)]
    apart = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(others)]
    mixed = [x for both in itertools.zip_longest(same, apart) for x in both if x]
    return _write(path, mixed)


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
@pytest.mark.parametrize("stage", ["preference", "reward"])
def test_pairs_of_one_reply_twice_weigh_nothing(tmp_path, caplog, stage, name):
    tokenizer = train_bpe(["abc"], 280)

    def pack(identical, others, split="train"):
        path = _pairs_file(tmp_path / "f.jsonl", identical, others)
        if stage == "reward":
            return preference_rows.pack_pairs(_config(name=name), path, split, tokenizer)
        return preference_rows.pack_preferences(
            _config(name=name), path, split, tokenizer, mismatched=name == "kto"
        )

    rows, without = pack(5, 4), pack(0, 4)
    assert "5 of 9 pairs (55.6 %) are the same, chosen as rejected: these pairs are left out" in (
        caplog.text
    )
    assert rows.keys() == without.keys()
    for key in rows.keys() - {"example_ids"}:
        np.testing.assert_array_equal(rows[key], without[key])
    caplog.clear()
    pack(4, 4)
    assert not caplog.records
    with pytest.raises(UserError, match=r"f.jsonl \(train\): the replies of all 3 pairs are the"):
        pack(3, 0)


def test_margins_that_no_loss_uses_are_a_line(tmp_path, caplog):
    tokenizer = train_bpe(["abc"], 280)
    pair = {"prompt": "p", "chosen": "ab", "rejected": "c"}
    path = _write(tmp_path / "f.jsonl", [pair | {"margin": 3}, pair | {"prompt": "q"}])
    for split in ("validation", "train"):
        assert not caplog.records
        preference_rows.pack_pairs(_config(name="sigmoid"), path, split, tokenizer)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path} (train): 1 of 2 pairs say by what margin they are preferred; no loss uses that: "
        "they count as the others do"
    )


def test_held_out_pairs_of_one_reply_twice_are_ties(tmp_path, caplog):
    tokenizer = train_bpe(["abc"], 280)
    path = _pairs_file(tmp_path / "f.jsonl", 5, 3)
    rows = preference_rows.pack_pairs(_config(name="sigmoid"), path, "validation", tokenizer)
    assert "5 of 8 pairs (62.5 %)" in caplog.text and "count half as right" in caplog.text
    noise = np.random.default_rng(0).normal(0, 1e-5, rows["last"].shape).astype(np.float32)
    first_wins = np.array([1, 0], np.float32)
    # Records 1, 3 and 5 are no ties, of which the last is wrong: 2 + 5 / 2 of 8.
    right = np.where(rows["example_ids"] < 5, 1, -1)[..., None] * first_wins
    metrics, _ = preference.implicit_rewards(
        _config(name="sigmoid"), right + noise, noise[::-1], rows
    )
    assert metrics["eval/accuracy"] == 4.5 / 8
    scored, _ = pair_scores.score_metrics(right + noise, rows)
    assert scored["eval/accuracy"] == 4.5 / 8
    assert scored["eval/rewards/margins"] == pytest.approx(1 / 8, abs=1e-4)


def test_a_reward_model_to_show_beside_is_looked_at_before_training(tmp_path, monkeypatch):
    def summary(name, **metrics):
        document = {"stage": "sft", "status": "done", "config_hash": "", "parents": {}}
        (tmp_path / name).mkdir()
        whole = document | {"wall_seconds": 1.0, "metrics": metrics}
        (tmp_path / name / "summary.json").write_text(json.dumps(whole))
        return tmp_path / name

    monkeypatch.setattr(preference, "load_start", None)  # which comes first of what takes time
    parents = {"policy": tmp_path, "reward": summary("sft", **{"eval/loss": 1.0})}
    with pytest.raises(UserError, match=r"init.reward = .*sft has no eval/accuracy to show beside"):
        preference.run(_config(), None, parents)
    accuracy = {"eval/accuracy": 0.7, "eval/accuracy_low": 0.6, "eval/accuracy_high": 0.8}
    shown = preference.reward_model_metrics(summary("reward", **accuracy))
    assert shown == {k.replace("eval/", "eval/reward_model/"): v for k, v in accuracy.items()}


@pytest.mark.slow
def test_kto_learns_from_labels_alone(experiments, tmp_path):
    records = [
        {"prompt": f"Was it good, number {i}?", "label": i % 2 == 0}
        | {"completion": "yes" if i % 2 == 0 else "no no"}
        for i in range(64)
    ]
    path = _write(tmp_path / "own.jsonl", records)
    result = run_main(
        *(f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/kto", "--config.loss.name=kto"),
        *(f"--config.data.train={path}", "--config.data.validation=", "--config.eval.source="),
        "--config.train.steps=20",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((tmp_path / "kto/summary.json").read_text())
    assert summary["metrics"]["eval/auc"] == 1
    assert "held out: the last 5 % of" in result.stdout
    config = json.loads((tmp_path / "kto/config.json").read_text())
    assert config["data"]["validation"] == config["eval"]["source"] == f"{path}[95%:]"
