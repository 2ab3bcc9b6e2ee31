"""From run directories to estimates, CSV files and the page, on runs that were made up."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.report.cells import draw_bands, draw_intervals
from rlhf_jax.report.run_files import read_run
from rlhf_jax.sweep.grid import Cell, make_cells, parse_grid
from rlhf_jax.sweep.jobs import Job
from rlhf_jax.sweep.outcomes import choose_metric, outcomes
from rlhf_jax.sweep.page import _last_point, write_page
from rlhf_jax.sweep.results import read_results, write_runs, write_tables
from rlhf_jax.sweep.tables import differences_of, estimates, of_search, sentences

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EFFECTS = {"0.05": 0.0, "0.1": 0.3, "0.5": 0.1}


def write_run(folder: Path, random, effect: float, *, steps=(0, 2, 4)) -> None:
    folder.mkdir(parents=True)
    theirs = random.uniform(0.3, 0.6, 40).round(3)
    ours = (theirs + effect + random.normal(0, 0.05, 40)).round(3)
    wins = (ours > theirs + 1e-9) + 0.5 * (abs(ours - theirs) <= 1e-9)
    pairs = random.normal(size=(2, 30)).tolist()
    accuracy = np.mean(np.array(pairs[0]) > np.array(pairs[1]))
    files = {
        "config.json": {"stage": "preference", "seed": 0, "data": {"validation": "town"}},
        "evaluation.json": {
            "plots": [
                {"values": {"good": [1.0]}},
                {"values": {"chosen": pairs[0], "rejected": pairs[1]}},
            ]
        },
        "summary.json": {
            "stage": "preference", "status": "done", "config_hash": "x", "parents": {},
            "wall_seconds": 61.5,
            "metrics": {
                "eval/gold_reward": ours.mean(), "eval/gold_win_rate": wins.mean(),
                "eval/accuracy": accuracy, "eval/kl": 1 + 10 * effect + random.random(),
            },
        },
    }  # fmt: skip
    lines = [
        {"step": step, "rewards/accuracies": 0.5 + effect * step + 0.1 * random.random()}
        for step in steps
    ]
    samples = [
        {"prompt": f"prompt {i}", "responses": {"sft": "a", "dpo": "b"},
         "scores": {"pretrain": 0.0, "sft": theirs[i], "dpo": ours[i]}}
        for i in range(40)
    ]  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    for name, each in {"metrics.jsonl": lines, "samples.jsonl": samples}.items():
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in each))


@pytest.fixture
def swept(tmp_path):
    """A sweep of three cells and three seeds, of which one run has failed, and of fresh seeds."""
    random = np.random.default_rng(0)
    cells = make_cells(parse_grid("loss.beta=0.05,0.1,0.5; loss.name=sigmoid"))
    runs, fresh = {}, {}
    for cell in cells:
        for seed in range(6):
            name = f"{cell.name},seed={seed}"
            job = Job(name, (), tmp_path / "abl" / name)
            write_run(job.directory, random, EFFECTS[cell.values["loss.beta"]])
            (runs if seed < 3 else fresh)[cell.name, seed] = job
    lost = runs[cells[2].name, 1]
    shutil.rmtree(lost.directory)
    return SimpleNamespace(
        directory=tmp_path / "abl", cells=cells, runs=runs, fresh=fresh, lost=lost,
        failed={lost: "error: <b>diverged</b>"},
    )  # fmt: skip


def read(swept, metric=""):
    return read_results(swept.cells, swept.cells[0].name, swept.runs, swept.failed, metric)


def test_outcomes_are_those_that_a_metric_is_the_mean_of(swept):
    run = swept.runs[swept.cells[1].name, 0].directory
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    for metric, count in {"gold_reward": 40, "gold_win_rate": 40, "accuracy": 30, "kl": 1}.items():
        values, of = outcomes(run, f"eval/{metric}")
        assert len(values) == count and values.mean() == pytest.approx(metrics[f"eval/{metric}"])
        assert bool(of) == (count > 1)
    with pytest.raises(UserError, match=r"has no metric eval/bpb; it has eval/gold_reward, eval"):
        outcomes(run, "eval/bpb")
    (run / "samples.jsonl").write_text("")  # they no longer have that mean
    assert len(outcomes(run, "eval/gold_reward")[0]) == 1


def test_the_metric_is_the_first_that_all_have():
    assert choose_metric([{"metrics": {"eval/bpb": 1, "eval/loss": 1}}]) == "eval/bpb"
    with pytest.raises(UserError, match="name one with --metric"):
        choose_metric([{"metrics": {"eval/bpb": 1}}, {"metrics": {"eval/loss": 1}}])
    ways = {"metrics": {"eval/logps/chosen": 1, "eval/kl": 1}}  # the first has no better
    assert choose_metric([ways]) == "eval/kl"


def test_a_failed_cell_is_a_row_that_says_why_and_never_the_best(swept):
    results = read(swept, "eval/gold_reward")
    row = results.rows[2]
    assert row.failures == {1: "error: <b>diverged</b>"} and row.estimate.seeds == 2
    assert results.best.name == "beta=0.1,name=sigmoid"
    assert estimates(results)[2][1] == "2 of 3"
    assert results.row("beta=0.1,name=sigmoid").difference[1] < 0.01
    assert "beta=0.5,name=sigmoid" not in results.equals_of("beta=0.1,name=sigmoid")
    assert [row[0] for row in differences_of(results)] == [c.name for c in swept.cells[1:]]
    everything = dict.fromkeys(swept.runs.values(), "killed")
    nothing = read_results(swept.cells, swept.cells[0].name, swept.runs, everything)
    assert nothing.best is None and "none is called the best" in sentences(nothing, None)[0]


def test_a_run_whose_metric_is_no_number_has_failed(swept):
    path = swept.runs[swept.cells[1].name, 0].directory / "summary.json"
    summary = json.loads(path.read_text())
    summary["metrics"]["eval/kl"] = float("nan")
    path.write_text(json.dumps(summary))
    assert read(swept, "eval/kl").rows[1].failures == {0: "its eval/kl is nan"}


def test_a_run_that_failed_has_no_numbers_of_what_was_there_before(swept):
    runs = {key: job for key, job in swept.runs.items() if job != swept.lost}
    (key, job), *_ = runs.items()
    write_runs(swept.directory, swept.cells, runs, {job: "error: it holds another run"})
    with open(swept.directory / "runs.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/kl"] == ""]
    assert [(row["cell"], int(row["seed"]), row["wall_seconds"]) for row in rows] == [(*key, "")]


def test_pairs_of_other_files_are_not_compared_pair_by_pair(swept):
    def held_out(run, data, **further):
        config = {"stage": "preference", "data": data, **further}
        (run / "config.json").write_text(json.dumps(config))
        return outcomes(run, "eval/accuracy")

    one, other = (swept.runs[swept.cells[0].name, seed].directory for seed in (0, 1))
    own = {"train": "one.jsonl", "validation": ""}
    assert held_out(one, own)[1] == held_out(other, own)[1] != ""
    assert held_out(one, own)[1] != held_out(other, own | {"train": "other.jsonl"})[1]
    values, of = held_out(one, own, feedback={"judge": "model"})  # its own answers, labelled
    assert len(values) == 1 and of == ""


def test_a_run_without_a_kl_is_no_point_at_zero(swept):
    run = swept.runs[swept.cells[0].name, 0].directory
    evaluation = json.loads((run / "evaluation.json").read_text())
    for kl, point in ((4.0, (4.0, 0.5)), (float("nan"), None)):
        evaluation["frontier"] = {"kl": [1.0, kl], "gold": [0.4, 0.5]}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        assert _last_point(read_run(run)) == point


def test_less_is_better_of_some_metrics(swept):
    assert read(swept, "eval/kl").best.name == "beta=0.05,name=sigmoid"


def test_runs_on_other_prompts_are_compared_by_their_means(swept):
    run = swept.runs[swept.cells[1].name, 0].directory / "samples.jsonl"
    run.write_text(run.read_text().replace("prompt 3", "question 3"))
    results = read(swept, "eval/gold_reward")
    assert not results.of and all(
        v.shape == (1,) for v in results.outcomes["beta=0.1,name=sigmoid"].values()
    )


def test_the_best_is_told_on_fresh_seeds(swept):
    results = read(swept, "eval/gold_reward")
    chosen = swept.cells[:2]
    runs = {key: job for key, job in swept.fresh.items() if key[0] != swept.cells[2].name}
    fresh = read_results(chosen, swept.cells[0].name, runs, {}, "eval/gold_reward")
    told = " ".join(sentences(results, fresh))
    assert "Best: beta=0.1,name=sigmoid. On 3 fresh seeds it has" in told
    assert "Best of 9 trials: beta=0.1,name=sigmoid. On 3" in of_search(fresh, chosen[1].name, 9)[0]
    assert "it is better." in told
    assert "with a single seed or cell" in sentences(results, None)[0]
    write_tables(swept.directory, results, fresh)
    write_runs(swept.directory, swept.cells, swept.runs | swept.fresh, swept.failed)
    with open(swept.directory / "cells.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seeds are"] for row in rows] == ["chosen on"] * 3 + ["fresh"] * 2
    assert float(rows[1]["mean"]) == results.rows[1].estimate.mean
    assert rows[2]["failures"] == "seed 1: error: <b>diverged</b>"
    with open(swept.directory / "outcomes.csv") as file:
        assert len(file.readlines()) == 1 + 40 * (8 + 6)
    with open(swept.directory / "runs.csv") as file:
        assert [row["eval/accuracy"] for row in csv.DictReader(file)].count("") == 1


def test_a_cells_answers_are_set_beside_the_baselines_prompt_by_prompt(swept):
    results = read(swept, "eval/gold_reward")
    name, base = "beta=0.1,name=sigmoid", "beta=0.05,name=sigmoid"
    wins = results.wins(name)
    better = [results.outcomes[name][s] > results.outcomes[base][s] for s in range(3)]
    assert wins.mean + 0.5 == pytest.approx(np.mean(better)) and wins.low < wins.mean < wins.high
    told = f"{name} gives the better answer by gold, ties ½, in {np.mean(better):.3f} ("
    assert any(told in line and "seeds 0, 1, 2" in line for line in sentences(results, None))
    assert read(swept, "eval/gold_win_rate").wins(name) is None
    run = swept.runs[swept.cells[1].name, 0].directory / "samples.jsonl"
    run.write_text(run.read_text().replace("prompt 3", "question 3"))
    assert read(swept, "eval/gold_reward").wins(name) is None


def test_the_page_has_everything_and_texts_stay_texts(swept):
    results = read(swept, "eval/gold_reward")
    page = write_page(
        swept.directory, "experiments/dpo.py", results, None, swept.runs, ["a sentence"]
    )
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 4  # intervals, parallel coordinates, clouds, one curve
    assert "&lt;b&gt;diverged" in text and "<b>diverged" not in text
    assert "<script" not in text and "src=" not in text


def test_a_cell_that_sets_no_field_has_no_place_among_parallel_coordinates(swept):
    swept.cells[0] = Cell(swept.cells[0].name, {})  # as a search's config as it is
    page = write_page(
        swept.directory, "x", read(swept, "eval/kl"), None, swept.runs, [], [["a", 16, "–", "why"]]
    )
    text = page.read_text("utf-8")
    assert "Cells as parallel" not in text and "<caption>Trials</caption>" in text


def test_figures_have_every_point_in_their_data():
    plot = draw_intervals(
        "t", cells=["a", "b,c=" + "x" * 60], mean=[1.0, 2.0], low=[0.5, float("nan")],
        high=[1.5, float("nan")], inner=[(0.9, 1.1)] * 2, runs=[[0.8, 1.2], [2.0]], xlabel="x",
    )  # fmt: skip
    assert plot.csv.splitlines()[1] == "a,1.0,0.5,1.5,0.9,1.1,0.8 1.2"
    band = {
        "steps": [1, 2],
        "mean": [1.0, 2.0],
        "low": [0.5, 1],
        "high": [2, 3],
        "runs": [[1.0, 2.0]],
    }
    assert draw_bands("t", cells={"a": band}).csv.splitlines()[2] == "a,2,2.0,1,3,2.0"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(swept, tmp_path, width):
    results = read(swept, "eval/gold_reward")
    page = write_page(
        swept.directory, "experiments/dpo.py", results, None, swept.runs, ["a sentence"]
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='{page.as_uri()}' style='width:{width}px;height:900px'></iframe><script>"
        "addEventListener('load', () => { const d = frames[0].document;"
        "const wide = [...d.querySelectorAll('.scroll')]"
        ".filter(e => e.scrollWidth > e.clientWidth);"
        "document.title = [d.documentElement.scrollWidth, wide.length].join(' ') })</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage",
               "--allow-file-access-from-files", "--virtual-time-budget=2000",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", frame.as_uri()]  # fmt: skip
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert f"<title>{width} 0</title>" in shown.stdout


def test_a_cell_with_more_of_what_should_be_less_is_worse(swept):
    chosen = swept.cells[:2]
    runs = {key: job for key, job in swept.fresh.items() if key[0] != swept.cells[2].name}
    fresh = read_results(chosen, chosen[0].name, runs, {}, "eval/kl")
    assert of_search(fresh, chosen[1].name, 9)[-1].endswith("it is worse.")


def test_values_that_a_metric_is_no_mean_of_are_not_taken_for_it(swept):
    """Samples of another evaluation, which the run had before."""
    run = swept.runs[swept.cells[0].name, 0].directory
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("eval/gold_reward", "eval/accuracy"):
        assert len(outcomes(run, metric)[0]) > 1
        summary["metrics"][metric] += 0.01
        (run / "summary.json").write_text(json.dumps(summary))
        (value,), of = outcomes(run, metric)
        assert value == summary["metrics"][metric] and of == ""
