"""Figures: well-formed, deterministic SVG that follows the page's colours, with all data as CSV."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from rlhf_jax.evaluation.plots import curves, draw, training_curves

SPECS = [
    {"kind": "curves", "series": {"a": [[1, 2], [3, 4]], "b held-out": [[1], [None]]}},
    {"kind": "reliability", "ece": 0.1, "edges": [0, 0.5, 1], "confidence": [None, 0.8],
     "accuracy": [None, 0.7], "counts": [0, 9]},
    {"kind": "grouped_bars", "groups": ["correct", "safe"],
     "series": {"sft": [0.5, -0.2], "dpo": [0.6, None]}, "low": {"sft": [0.4, -0.3]},
     "high": {"sft": [0.6, -0.1]}},
    {"kind": "intervals", "labels": ["dpo"], "values": [0.7], "low": [0.6], "high": [0.8],
     "reference": 0.5},
    {"kind": "binned_accuracy", "edges": [-0.5, 0.5], "accuracy": [0.6, None, 0.9],
     "low": [0.5, 0, 0.8], "high": [0.7, 1, 1], "counts": [10, 0, 20]},
    {"kind": "histogram", "values": {"chosen": [0, 1, 1, 2], "rejected": [-1, 0]}, "bins": 3},
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
        "from rlhf_jax.evaluation.plots import curves;"
        "print(curves('loss', {'loss': ([1, 2, 3], [3, 1, 2])}, resumes=[2]).svg)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    here = curves("loss", {"loss": ([1, 2, 3], [3, 1, 2])}, resumes=[2]).svg
    assert other == here + "\n"


def test_labels_are_text_not_markup():
    plot = draw({**SPECS[2], "title": "t", "groups": ["<script>", r"$\frac$"]})
    assert {"<script>", r"$\frac$"} <= set(texts(plot.svg))
    assert "<script" not in plot.svg


def test_csv_holds_every_point_and_no_formula():
    plot = draw({"kind": "curves", "title": "t", "series": {"=cmd()": [[1, 2], [-0.5, None]]}})
    assert plot.csv == "series,step,value\n'=cmd(),1,-0.5\n'=cmd(),2,\n"


def test_bins_of_integers_are_named_by_the_integers():
    spec = {**SPECS[4], "edges": [-10.5, -0.5, 0.5], "accuracy": [1] * 4, "low": [0] * 4,
            "high": [1] * 4, "counts": [1234, 1, 1, 1]}  # fmt: skip
    rows = [line.split(",")[0] for line in draw({"title": "t", **spec}).csv.splitlines()[1:]]
    assert rows == ["≤−11", "−10…−1", "0", "≥1"]
    rows = draw({"title": "t", **spec, "edges": [0.25, 0.5, 0.75]}).csv.splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["<0.25", "0.25…0.5", "0.5…0.75", "≥0.75"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"kind": "pie", "title": "t"}, "unknown plot kind 'pie'; known: curves"),
        ({"kind": "histogram", "title": "t", "colour": "red"}, "plot 't': .*colour"),
        ({"kind": "intervals", "title": "t"}, "plot 't': .*labels"),
    ],
)
def test_a_wrong_spec_says_so(spec, message):
    with pytest.raises(ValueError, match=message):
        draw(spec)


def test_training_curves():
    records = [
        {"step": 10, "train/loss": 2.0, "logps/chosen": -20.0, "logps/rejected": -25.0},
        {"step": 20, "train/loss": "NaN", "eval/loss": 1.9, "time/resumed": 1},
        {"step": 30, "train/loss": 1.5, "time/tokens_per_second": 31000.0},
    ]
    plots = {p.title: p for p in training_curves(records)}
    assert list(plots) == ["Loss", "Log-probabilities", "Throughput"]
    assert plots["Loss"].csv.splitlines()[1:] == [
        "loss,10,2.0", "loss,20,NaN", "loss,30,1.5", "loss held-out,20,1.9"
    ]  # fmt: skip
    assert {"chosen", "rejected"} <= set(texts(plots["Log-probabilities"].svg))
    assert all("resumed" in texts(p.svg) for p in plots.values())
    assert "resumed" not in texts(training_curves(records[:1])[0].svg)
    only = training_curves(records, titles=["Loss"], suffix=" · sft")
    assert [p.title for p in only] == ["Loss · sft"]
