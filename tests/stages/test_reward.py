"""Reward models: from labels as from pairs, and the statistics that are kept with them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.batches import concatenate_rows, eval_batches
from rlhf_jax.data.conversation import render_replies
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.pair_scores import label_metrics
from rlhf_jax.evaluation.row_passes import in_record_order
from rlhf_jax.stages import defaults, reward
from rlhf_jax.stages.preference_rows import pack_labelled
from rlhf_jax.training.checkpoint import load_params, save_params
from rlhf_jax.training.saved_model import load_model
from tests.stages.conftest import run_main

LABELLED = """
from rlhf_jax.stages import defaults, reward


def get_config():
    return defaults.base(
        "reward",
        init=dict(policy="{folder}/sft.py"),
        data=dict(train="{folder}/labelled.jsonl=2,{folder}/few.jsonl=1",
                  validation="{folder}/labelled.jsonl", row_length=256),
        batch=dict(rows=4), optimizer=dict(name="adamw", learning_rate=1e-2),
        train=dict(steps=20, log_every=5, checkpoint_every=20, tensorboard=False),
        loss=dict(name="pointwise"),
        normalize=dict(prompts=12, max_new_tokens=8),
    )
"""


def write_labelled(path, count, labels=("1", "0")):
    lines = [
        {"prompt": f"Was it good, number {i}?", "response": "yes" if i % 2 else "no " * (i % 5 + 1)}
        | {"label": labels[i % 2]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(experiments, tmp_path_factory):
    """(runs, what was printed): pretrain → sft → a reward model from labels."""
    runs = tmp_path_factory.mktemp("runs")
    write_labelled(experiments / "labelled.jsonl", 64)
    write_labelled(experiments / "few.jsonl", 5)
    (experiments / "labelled.py").write_text(LABELLED.replace("{folder}", str(experiments)))
    result = run_main(f"--config={experiments}/labelled.py", f"--workdir={runs}/labelled")
    assert result.returncode == 0, result.stderr[-2000:]
    return runs, result.stdout


def metrics_of(run):
    return json.loads((run / "summary.json").read_text())["metrics"]


@pytest.mark.slow
def test_labels_train_a_classifier(trained):
    runs, out = trained
    metrics = metrics_of(runs / "labelled")
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    assert metrics["eval/auc"] > 0.9 and metrics["eval/loss"] < np.log(2)
    assert 0 <= metrics["eval/ece"] <= 1
    assert "records 64, good 50.0%" in out
    plots = json.loads((runs / "labelled/evaluation.json").read_text())["plots"]
    assert [plot["kind"] for plot in plots] == ["reliability", "histogram"]


@pytest.mark.slow
def test_score_statistics_are_kept_with_the_model(trained):
    runs, out = trained
    mean, std = load_model(runs / "labelled").normalization
    metrics = metrics_of(runs / "labelled")
    assert mean == metrics["eval/reference_score_mean"]
    assert std == metrics["eval/reference_score_std"] > 0
    assert f"12 answers of the policy have mean {mean:.3f}, std {std:.3f}" in out
    assert load_model(runs / "sft").normalization is None


@pytest.mark.slow
def test_models_of_older_versions_have_no_statistics(trained, tmp_path):
    runs, _ = trained
    params, document = load_params(runs / "labelled" / "model")
    del document["normalization"]
    save_params(tmp_path / "model", params, document)
    (tmp_path / "tokenizer.json").write_bytes((runs / "labelled/tokenizer.json").read_bytes())
    assert load_model(tmp_path).normalization is None


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["Was it good, number 1? yes no"] * 4, 280)


def test_prompts_without_room_for_an_answer_are_counted(
    tokenizer, tmp_path, monkeypatch, capsys, caplog
):
    path = tmp_path / "prompts.jsonl"
    prompts = ["Was it?", "Was it? " * 40, "Is it?", "Is it? " * 50]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    normalize = {"prompts": 3, "max_new_tokens": 4}
    config = defaults.resolve(defaults.base("reward", normalize=normalize))
    shape = SimpleNamespace(max_length=64)
    model = SimpleNamespace(tokenizer=tokenizer, config=shape, params=None)
    answers = [SimpleNamespace(tokens=[1])] * 2
    monkeypatch.setattr(reward, "answer", lambda *_, **how: answers)
    monkeypatch.setattr(reward, "map_rows", lambda *_: np.arange(2.0))
    monkeypatch.setattr(reward, "in_record_order", lambda values, _: values)
    reward.reference_scores(config, model, model, [f"{path}"])
    out = capsys.readouterr().out
    assert "normalization prompts: asked for 3, drawn 4, too long 2" in out
    assert "2 of 4 records (50.0 %) are left out, longer than the 60 tokens" in caplog.text


def settings(row_length=64, over_long="error"):
    data = {"row_length": row_length, "over_long": over_long, "max_bad_fraction": 0.0}
    data |= {"columns": "", "labelers": "pooled"}
    return ConfigDict({"data": data})


def test_labels_stay_with_their_replies(tmp_path, tokenizer):
    """Through packing, mixing with a set of another width, and the padding of an evaluation."""
    sources = [
        pack_labelled(
            settings(), str(write_labelled(tmp_path / f"{n}.jsonl", n)), "train", tokenizer
        )
        for n in (1, 30)
    ]
    assert sources[0]["labels"].shape[1] < sources[1]["labels"].shape[1]
    for rows in (*sources, concatenate_rows(sources), *eval_batches(sources[1], 7)):
        assert rows["labels"].dtype == np.float32
        assert rows["labels"].shape == rows["last"].shape
        real = rows["valid"] > 0
        np.testing.assert_array_equal(rows["labels"][real][:, 0], 1 - rows["example_ids"][real] % 2)
        assert not rows["labels"][~real].any()
    labels = in_record_order(sources[1]["labels"], sources[1])[:, 0]
    assert labels.tolist() == [1, 0] * 15


def test_over_long_replies(tmp_path, tokenizer):
    path = str(write_labelled(tmp_path / "long.jsonl", 10))
    with pytest.raises(UserError, match=r"'long.jsonl:\d+' has \d+ tokens, more than a row of"):
        pack_labelled(settings(_length(tokenizer, "no no")), path, "train", tokenizer)
    rows = pack_labelled(settings(_length(tokenizer, "no no"), "drop"), path, "train", tokenizer)
    assert 0 < (rows["valid"] > 0).sum() < 10
    with pytest.raises(UserError, match=r"no examples .* 10 were over-long"):
        pack_labelled(settings(4, "drop"), path, "train", tokenizer)
    with pytest.raises(UserError, match="labelled replies know error and drop"):
        pack_labelled(settings(64, "truncate_prompt_left"), path, "train", tokenizer)


def _length(tokenizer, reply):
    asked = (Message("user", "Was it good, number 5?"),)
    prompt, (answer,) = render_replies(asked, [reply], tokenizer)
    return len(prompt) + len(answer)


def test_labels_may_be_true_or_false(tmp_path, tokenizer):
    path = str(write_labelled(tmp_path / "f.jsonl", 6, labels=(True, False)))
    rows = pack_labelled(settings(), path, "train", tokenizer)
    assert in_record_order(rows["labels"], rows)[:, 0].tolist() == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("label", ["good", "1.5", "-1", "nan"])
def test_a_label_is_a_number_from_0_to_1(tmp_path, tokenizer, label):
    path = str(write_labelled(tmp_path / "bad.jsonl", 4, labels=("1", label)))
    with pytest.raises(UserError, match=f"'bad.jsonl:2': a pointwise loss needs .* '{label}'"):
        pack_labelled(settings(), path, "train", tokenizer)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "hinge"}, "'hinge': choose one of bradley_terry, pointwise"),
        ({"name": "pointwise", "centering": 0.1}, "centering is for pairs"),
    ],
)
def test_losses_are_checked_first(section, message):
    with pytest.raises(UserError, match=message):
        defaults.resolve(defaults.base("reward", loss=section))


def label_rows(labels):
    count = len(labels)
    return {
        "labels": np.reshape(np.float32(labels), (1, count, 1)),
        "valid": np.ones((1, count), np.float32),
        "example_ids": np.arange(count)[None],
    }


def test_label_metrics_by_hand():
    scores = np.reshape([2.0, -1.0, 1.0, 0.0, 3.0], (1, 5, 1))
    metrics, plots = label_metrics(scores, label_rows([1, 1, 0, 0, 0.5]))
    assert metrics["eval/accuracy"] == pytest.approx(1.5 / 4)
    # (2 > 1), (2 > 0), (−1 < 1), (−1 < 0)
    assert metrics["eval/auc"] == pytest.approx(0.5)
    softplus = np.log1p(np.exp([-2.0, 1.0, 1.0, 0.0]))
    expected = (softplus.sum() + np.log1p(np.exp(3)) - 1.5) / 5
    assert metrics["eval/loss"] == pytest.approx(expected)
    assert plots[1]["values"] == {"good": [2, -1], "bad": [1, 0]}
    tied, _ = label_metrics(np.zeros((1, 4, 1)), label_rows([1, 0, 0, 1]))
    assert tied["eval/auc"] == tied["eval/accuracy"] == 0.5
    one_sided, _ = label_metrics(np.ones((1, 2, 1)), label_rows([1, 1]))
    assert "eval/auc" not in one_sided and one_sided["eval/accuracy"] == 1
