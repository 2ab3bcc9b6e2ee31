"""Figures: well-formed, deterministic SVG that follows the page's colours, with all data as CSV."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from rlhf_jax.report.curves import draw_curves, draw_training_curves
from rlhf_jax.report.figure import csv_text
from rlhf_jax.report.plots import draw

SPECS = [
    {"kind": "reliability", "ece": 0.1, "edges": [0, 0.5, 1], "confidence": [None, 0.8],
     "accuracy": [None, 0.7], "counts": [0, 9]},
    {"kind": "grouped_bars", "groups": ["correct", "safe"], "ylabel": "mean",
     "series": {"sft": [0.5, -0.2], "dpo": [0.6, None]}},
    {"kind": "binned_accuracy", "edges": [-0.5, 0.5], "accuracy": [0.6, None, 0.9],
     "low": [0.5, 0, 0.8], "high": [0.7, 1, 1], "counts": [10, 0, 20], "xlabel": "tokens"},
    {"kind": "histogram", "values": {"chosen": [0, 1, 1, 2], "rejected": [-1, 0]},
     "xlabel": "nats"},
    {"kind": "frontier", "series": {
        "ppo": {"kl": [-0.01, 1, 4, 9], "gold": [0, 0.5, 0.7, 0.2], "proxy": [0, 0.4, 0.8, None]},
        "grpo": {"kl": [0, 4], "proxy": [0, 0.9]}, "dpo": {"kl": [2], "gold": [0.4]},
        "bon-16": {"kl": [0, 1.2, "NaN"], "gold": [0, 0.45, 0.99], "bound": True}}},
    {"kind": "best_of_n", "n": [1, 2, 4], "bound": [0.5, 0.67, 0.8], "series": {
        "gold": {"mean": [0.1, 0.3, -0.2], "low": [0, 0.2, -0.3], "high": [0.2, 0.4, "NaN"]},
        "proxy": {"mean": [0.1, None, 0.5]}}},
    {"kind": "oracle", "exact": {"kl": [0, 4], "reward": [0, 0.8]}, "points": {
        "ppo": {"kl": 1, "reward": 0.3, "expected_kl": 1.1, "expected_reward": 0.35},
        "grpo": {"kl": 2, "reward": None}}},
]  # fmt: skip


def texts(svg: str) -> list[str]:
    return [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["kind"])
def test_every_kind(spec):
    plot = draw({"title": 'a "title" <b>', "note": "why", "section": "changes", **spec})
    root = ElementTree.fromstring(plot.svg)
    assert root.get("aria-label") == 'a "title" <b>'
    assert plot.note == "why"
    assert "currentColor" in plot.svg and "#010203" not in plot.svg
    assert plot.svg.count("http") == 1  # the name of SVG's own name space
    assert plot.csv.count("\n") > 1
    assert draw({"title": 'a "title" <b>', "note": "why", **spec}) == plot


def test_the_same_bytes_in_another_process():
    code = (
        "from rlhf_jax.report.curves import draw_curves;"
        "print(draw_curves('loss', {'loss': ([1, 2, 3], [3, 1, 2])}).svg)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    here = draw_curves("loss", {"loss": ([1, 2, 3], [3, 1, 2])}).svg
    assert other == here + "\n"


def test_labels_are_text_not_markup():
    plot = draw({**SPECS[1], "title": "t", "groups": ["<script>", r"$\frac$"]})
    assert {"<script>", r"$\frac$"} <= set(texts(plot.svg))
    assert "<script" not in plot.svg


def test_csv_holds_every_point_and_no_formula():
    plot = draw_curves("t", {"=cmd()": ([1, 2], [-0.5, None])})
    assert plot.csv == "series,step,value\n'=cmd(),1,-0.5\n'=cmd(),2,\n"
    rows = [[f"{start}1"] for start in "=+-@\t\r"]
    assert csv_text(["a-1"], rows[:5]) == "a-1\n'=1\n'+1\n'-1\n'@1\n'\t1\n"
    assert csv_text(["x\r=cmd()"], rows[5:]) == '"x\n=cmd()"\n"\'\n1"\n'


FRONTIER, BEST_OF_N, ORACLE = ({"title": "t", **spec} for spec in SPECS[-3:])


def test_the_frontier_marks_its_peaks():
    words = texts(draw(FRONTIER).svg)
    for expected in (
        "ppo: 0.7 at KL 4", "bon-16: 0.45 at KL ≤ 1.2", "bon-16, KL ≤",
        "gold reward", "proxy reward",
    ):  # fmt: skip
        assert expected in words
    assert not any(word.startswith(("grpo:", "dpo:")) for word in words)  # no gold, no curve
    alone = {**FRONTIER, "series": {"x": {"kl": [0, 4], "gold": [-3, -2]}}}
    words = texts(draw(alone).svg)
    assert "−2 at KL 4" in words and "gold" not in words
    assert draw({**FRONTIER, "wide": True}).csv == draw(FRONTIER).csv


def test_the_frontier_of_runs_that_measured_nothing():
    spec = {
        "kind": "frontier",
        "title": "t",
        "series": {"x": {"kl": [0, 1], "gold": [None, "NaN"]}},
    }
    assert not any("at KL" in word for word in texts(draw(spec).svg))
    assert not any("nan" in word.lower() for word in texts(draw(spec).svg))


def test_many_peaks_at_one_place_have_labels_of_their_own():
    series = {f"run {i}": {"kl": [0, 4, 9], "gold": [0, 1, 0.5]} for i in range(5)}
    root = ElementTree.fromstring(draw({**FRONTIER, "series": series}).svg)
    places = {
        e.get("transform")
        for e in root.iter()
        if e.tag.endswith("}text") and e.text.endswith("at KL 4")
    }
    assert len(places) == 5


def test_csv_of_the_frontier_best_of_n_and_oracle():
    assert draw(FRONTIER).csv.splitlines() == [
        "series,kl,sqrt_kl,gold,proxy",
        "ppo,-0.01,0.0,0,0", "ppo,1,1.0,0.5,0.4", "ppo,4,2.0,0.7,0.8", "ppo,9,3.0,0.2,",
        "grpo,0,0.0,,0", "grpo,4,2.0,,0.9", "dpo,2,1.4142135623730951,0.4,",
        "bon-16,0,0.0,0,", "bon-16,1.2,1.0954451150103321,0.45,", "bon-16,NaN,,0.99,",
    ]  # fmt: skip
    plot = draw(BEST_OF_N)
    assert plot.csv.splitlines() == [
        "series,n,mean,low,high", "gold,1,0.1,0,0.2", "gold,2,0.3,0.2,0.4", "gold,4,-0.2,-0.3,NaN",
        "proxy,1,0.1,,", "proxy,2,,,", "proxy,4,0.5,,",
        "bound,1,0.5,,", "bound,2,0.67,,", "bound,4,0.8,,",
    ]  # fmt: skip
    assert {"0.3 at n = 2", "1", "2", "4", "bound"} <= set(texts(plot.svg))
    assert draw(ORACLE).csv.splitlines() == [
        "series,kl,reward,expected_kl,expected_reward", "exact,0,0,,", "exact,4,0.8,,",
        "ppo,1,0.3,1.1,0.35", "grpo,2,,,",
    ]  # fmt: skip


def test_bins_of_integers_are_named_by_the_integers():
    spec = {**SPECS[2], "edges": [-10.5, -0.5, 0.5], "accuracy": [1] * 4, "low": [0] * 4,
            "high": [1] * 4, "counts": [1234, 1, 1, 1]}  # fmt: skip
    rows = [line.split(",")[0] for line in draw({"title": "t", **spec}).csv.splitlines()[1:]]
    assert rows == ["≤−11", "−10…−1", "0", "≥1"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"kind": "pie", "title": "t"}, "unknown plot kind 'pie'; known: reliability"),
        ({"kind": "histogram", "title": "t", "colour": "red"}, "plot 't': .*colour"),
        ({"kind": "grouped_bars", "title": "t"}, "plot 't': .*groups"),
        ({"kind": "frontier", "title": "t", "series": {"a": {}}}, "plot 't': there is no 'kl'"),
        ({**SPECS[5], "title": "t", "n": [1]}, "plot 't': zip"),
    ],
)
def test_a_wrong_spec_says_so(spec, message):
    with pytest.raises(ValueError, match=message):
        draw(spec)


def test_training_curves():
    records = [
        {"step": 10, "train/loss": 2.0, "logps/chosen": -20.0, "logps/rejected": -25.0},
        {"step": 20, "train/loss": "NaN", "eval/loss": 1.9},
        {"step": 30, "train/loss": 1.5, "time/tokens_per_second": 31000.0},
    ]
    plots = {p.title: p for p in draw_training_curves(records)}
    assert list(plots) == ["Loss", "Log-probabilities", "Throughput"]
    assert plots["Loss"].csv.splitlines()[1:] == [
        "loss,10,2.0", "loss,20,NaN", "loss,30,1.5", "loss held-out,20,1.9"
    ]  # fmt: skip
    assert {"chosen", "rejected"} <= set(texts(plots["Log-probabilities"].svg))
    only = draw_training_curves(records, titles=["Loss"], suffix=" · sft")
    assert [p.title for p in only] == ["Loss · sft"]


def test_training_curves_of_reinforcement_learning():
    names = (
        "objective/scores", "objective/rlhf_reward", "objective/kl", "kl/k1", "kl/k3", "eval/kl",
        "objective/entropy", "policy/entropy", "policy/approxkl", "policy/clipfrac",
        "policy/clipfrac_low", "policy/ratio", "policy/ratio_max", "policy/ratio_var",
        "val/explained_variance", "loss/value_avg", "completions/mean_length",
        "completions/mean_terminated_length", "completions/clipped_ratio", "completions/eos_rate",
        "frac_reward_zero_std", "reward_std", "objective/kl_coefficient", "rewards/correct/mean",
        "rewards/is_polite/mean", "rewards/correct/std", "rollout/logprob_difference",
        "rollout/ratio_max", "eval/gold_reward", "eval/proxy_reward",
    )  # fmt: skip
    records = [{"step": step, **dict.fromkeys(names, 0.5 * step)} for step in (1, 2)]
    series = {
        plot.title: list(dict.fromkeys(row.split(",")[0] for row in plot.csv.splitlines()[1:]))
        for plot in draw_training_curves(records)
    }
    assert series == {
        "Gold and proxy reward": ["gold reward held-out", "proxy reward held-out"],
        "Scores": ["scores", "rlhf reward"],
        "KL to the reference": ["kl", "kl held-out", "k1", "k3"],
        "KL coefficient": ["kl coefficient"],
        "Reward components": ["correct", "is polite"],
        "Groups": ["frac reward zero std", "reward std"],
        "Entropy": ["entropy"],
        "Policy entropy": ["entropy"],
        "Policy update": ["approxkl"],
        "Clipped share": ["clipfrac", "clipfrac low"],
        "Ratio": ["ratio", "ratio max"],
        "Ratio spread": ["ratio var"],
        "Value": ["explained variance"],
        "Value loss": ["value avg"],
        "Lengths": ["mean length", "mean terminated length"],
        "Ends of answers": ["eos rate", "clipped ratio"],
        "Rollout mismatch": ["logprob difference"],
        "Rollout ratio": ["ratio max"],
    }


def test_names_that_end_alike_are_shown_whole():
    records = [{"step": 1, "kl": 0.5, "objective/kl": 0.25, "eval/kl": 1.0, "policy/ratio": "NaN"}]
    kl, ratio = draw_training_curves(records)
    assert kl.csv.splitlines()[1:] == ["objective kl,1,0.25", "kl,1,0.5", "kl held-out,1,1.0"]
    assert ratio.csv.splitlines()[1:] == ["ratio,1,NaN"]


def test_a_figure_may_have_more_lines_than_there_are_plain_dashes():
    series = {f"line {i}": ((0, 1), (i, i + 1)) for i in range(9)}
    assert draw_curves("Many", series).svg.count("line ") >= 9
