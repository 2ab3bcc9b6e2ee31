"""Points of a sweep's trade-off, and which lie above the curve of what runs started from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.report.refusals import draw_refusals
from rlhf_jax.sweep import page, tradeoff
from rlhf_jax.sweep.page import _figures, _over_starts
from rlhf_jax.sweep.results import Results
from rlhf_jax.sweep.tradeoff import Curve, Setting, above, points, read_curve, table
from rlhf_jax.tasks.safety import REFUSALS
from rlhf_jax.tasks.town.safety import KINDS, SafetyTown
from rlhf_jax.tasks.town.town import Town

REFUSAL = "I can't help with that."


def setting(arm, name, harmless, harmful, seeds=3, count=100, named=("harmless", "harmful")):
    """Models that refuse these shares of every kind's prompts, always the first ones."""
    refused = {
        (family, kind): np.arange(count) < share * count
        for family, share in zip(named, (harmless, harmful), strict=True)
        for kind in KINDS
    }
    helpful = {(kind, seed): 1 - harmless for kind in KINDS for seed in range(seeds)}
    return Setting(arm, name, {seed: dict(refused) for seed in range(seeds)}, helpful)


def test_the_curve_is_the_upper_hull_of_the_starts():
    starts = [setting("start", "a", 0.2, 0.6), setting("start", "b", 0.5, 0.7)]
    settings = [*starts, setting("tuned", "c", 0.3, 0.9), setting("tuned", "d", 0.1, 0.3)]
    found = {(name, kind): rest for name, kind, *rest in above(Curve(REFUSALS, settings))}
    x, y, curve, (low, high) = found["c", "unseen"]
    # From a to (1, 1), which lies above b: 0.6 + 0.4 · 0.1 / 0.8.
    assert (x, y, curve) == pytest.approx((0.3, 0.9, 0.65))
    assert 0.05 < low < 0.25 < high < 0.5
    x, y, curve, (low, high) = found["d", "seen"]
    assert curve == pytest.approx(0.3) and low < 0 < high  # on the line from (0, 0) to a


def test_seldom_is_a_model_said_to_lie_above_that_is_as_good_as_its_start(monkeypatch):
    """Three seeds that differ by 0.1, as small models do: in 1 of 40 sets is expected."""
    monkeypatch.setattr(tradeoff, "RESAMPLES", 200)
    random, said = np.random.default_rng(0), 0
    for _ in range(100):
        settings = []
        for arm in ("start", "tuned"):
            seeds = {}
            for seed in range(3):
                shares = np.clip(random.normal([0.4, 0.6], 0.1), 0, 1)
                seeds[seed] = {
                    (family, "unseen"): random.random(60) < share
                    for family, share in zip(("harmless", "harmful"), shares, strict=True)
                }
            settings.append(Setting(arm, arm, seeds, {}))
        (found,) = above(Curve(replace(REFUSALS, kinds=("unseen",)), settings))
        said += found[-1][0] > 0
    assert said <= 3


def test_chance_is_on_the_line_whatever_it_refuses():
    settings = [setting("start", "a", 0, 0), setting("tuned", "all", 1, 1)]
    for _, _, x, y, curve, _ in above(Curve(REFUSALS, settings)):
        assert (x, y, curve) == pytest.approx((1, 1, 1))


def test_starts_that_no_seed_has_both_of_have_no_curve():
    starts = [setting("start", name, 0.2, 0.6, seeds=2) for name in "ab"]
    for start, seed in zip(starts, (0, 1), strict=True):
        del start.seeds[seed]
    assert [*above(Curve(REFUSALS, [*starts, setting("tuned", "c", 0.3, 0.9, seeds=2)]))] == []


def test_points_and_their_figure():
    curve = Curve(REFUSALS, [setting("start", "a", 0.2, 0.6), setting("tuned", "c", 0.3, 0.9)])
    found = points(curve)
    assert len(found) == 6
    assert found[1]["harmful"] == 0.9 and found[1]["helpful"] == pytest.approx(0.7)
    # Three seeds reply alike to 100 prompts, which are no 300 independent replies.
    bounds = found[1]["harmful_low"], found[1]["harmful_high"]
    assert bounds == pytest.approx(wilson_interval(90, 100))
    plot = draw_refusals("Refusals", points=found, shares=curve.shares, what="refused")
    assert plot.svg.startswith("<svg") and len(plot.csv.splitlines()) == 7
    assert len(table(curve)) == 3
    assert curve.columns[2:4] == ("harmless refused", "harmful refused")


def test_the_page_says_what_the_tradeoff_is_of(monkeypatch):
    of_answers = replace(REFUSALS, cost="short", gain="true", what="answered")
    curve = Curve(of_answers, [setting("start", "a", 0.2, 0.6, named=("short", "true"))])
    entry = _over_starts(curve)
    assert entry["columns"][2:4] == ("short answered", "true answered")
    assert "how much more true answered than" in entry["note"]
    assert "harm" not in entry["note"]
    monkeypatch.setattr(page, "draw_intervals", lambda *args, **more: None)
    *_, plot = _figures(Results("eval/a", "", [], {}, ""), {}, "a", curve)
    assert plot.title == "Answered, by kind of request" and "harm" not in plot.csv


def test_one_model_that_all_seeds_started_from_counts_once():
    many = setting("start", "a", 0.2, 0.6)
    once = Setting("start", "a", dict.fromkeys(range(3), many.seeds[0]), many.helpful)
    (alone, *_), (each, *_) = (points(Curve(REFUSALS, [one])) for one in (once, many))
    assert alone == each


def write_run(directory, start, own, of_start, few=None):
    directory.mkdir()
    summary = {"stage": "preference", "status": "done", "metrics": {}}
    summary |= {"wall_seconds": 1.0, "config_hash": "x"}
    summary["parents"] = {"policy": str(directory.parent / start)}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "config.json").write_text('{"eval": {"source": "safety/prompt"}}')
    samples = [
        {
            "prompt": [message.to_json() for message in prompt.messages],
            "responses": {directory.name: own(prompt), start: of_start(prompt)},
        }
        for prompt in SafetyTown(Town()).held_out()[:few]
    ]
    text = "".join(f"{json.dumps(sample)}\n" for sample in samples)
    (directory / "samples.jsonl").write_text(text)


def test_runs_are_read_with_what_they_started_from(tmp_path):
    runs = {}
    for cell in ("x", "y"):
        runs[cell] = {}
        for seed in (0, 1):
            directory = runs[cell][seed] = tmp_path / f"{cell},seed={seed}"
            due = lambda p: p.meta["reference"]  # noqa: E731
            write_run(directory, f"sft,seed={seed}", due, lambda p: REFUSAL)
    curve = read_curve(runs)
    start, *tuned = curve.settings
    assert (start.arm, start.name, sorted(start.seeds)) == ("start", "sft", [0, 1])
    assert [each.name for each in tuned] == ["x", "y"]
    assert start.seeds[1]["harmless", "unseen"].all()
    assert len(start.seeds[0]["harmful", "seen"]) == 60
    assert not tuned[0].seeds[0]["harmless", "wrapped"].any()
    assert tuned[0].helpful["seen", 0] == 1 and start.helpful["seen", 0] == 0
    for _, _, x, y, there, _ in above(curve):
        assert (x, y, there) == pytest.approx((0, 1, 0))


def test_kinds_that_few_prompts_leave_out_are_left_out(tmp_path):
    for count, kinds in ((8, None), (14, ("unseen", "wrapped")), (20, KINDS)):
        run = tmp_path / f"{count}"
        write_run(run, "sft", lambda p: "No.", lambda p: REFUSAL, few=count)
        curve = read_curve({"x": {0: run}})
        assert (curve and curve.tradeoff.kinds) == kinds
        if kinds:
            assert [point["kind"] for point in points(curve)] == [k for k in kinds for _ in "ab"]
            assert [kind for _, kind, *_ in table(curve)] == [*kinds]


@pytest.mark.parametrize("source", ["town/prompt", "mine.jsonl", "", "safety/facts"])
def test_runs_on_prompts_without_a_tradeoff_have_no_curve(tmp_path, source):
    write_run(tmp_path / "x", "sft", lambda p: "", lambda p: "")
    (tmp_path / "x" / "config.json").write_text(json.dumps({"eval": {"source": source}}))
    asked = {"prompt": [{"role": "user", "content": "Who?"}], "responses": {"x": "", "sft": ""}}
    (tmp_path / "x" / "samples.jsonl").write_text(json.dumps(asked))
    assert read_curve({"x": {0: tmp_path / "x"}}) is None and read_curve({}) is None
