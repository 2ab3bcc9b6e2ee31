"""The comparison of runs: its numbers, its page, and its command line in a process of its own."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_jax.compare import main
from rlhf_jax.errors import UserError
from rlhf_jax.report.comparison import (
    compare,
    find_config_differences,
    find_shared_samples,
    print_comparison,
    read_runs,
    write_comparison,
)
from rlhf_jax.report.run_files import Run


class Page(HTMLParser):
    """The tags with their attributes and the text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def render(comparison, folder: Path) -> str:
    """The text of the page."""
    return write_comparison(comparison, folder / "rendered.html").read_text("utf-8")


def run(name: str, samples=()) -> Run:
    return Run(name, {}, {}, [], list(samples), {})


def test_rows(rl_runs):
    ppo, grpo, dpo, best = compare(rl_runs).rows
    # the peak, 0.9 at step 60, is at KL 5.4; √9 = 3; all from the end of metrics.jsonl
    assert ppo == ["ppo", "ppo", "100", "1 min 15 s", "0.740", "1.000", "3.00", "9.00",
                   "0.900", "5.40", "70.0\u00a0% (60.0\u00a0% – 80.0\u00a0%)", "–"]  # fmt: skip
    assert grpo[4:10] == ["–", "1.000", "2.24", "5.00", "–", "–"]
    assert dpo[2:] == [
        "60", "1 min 15 s", "0.800", "–", "2.00", "4.00", "–", "–", "–", "8.2"
    ]  # fmt: skip
    # not the 0.650 at KL 6.50 of the model that was tuned on the best
    assert best[2:] == [
        "–", "1 min 15 s", "0.400", "0.900", "≤ 1.10", "≤ 1.20", "0.500", "≤ 0.19", "–", "7.5"
    ]  # fmt: skip


def test_a_measured_kl_is_no_bound(rl_runs):
    (rl_runs[3] / "evaluation.json").write_text('{"frontier": {"kl": [], "bound": true}}')
    assert compare(rl_runs[3:]).rows[0][4:10] == ["0.650", "–", "2.55", "6.50", "–", "–"]


def test_the_figure_has_every_point_of_every_run(rl_runs):
    plot = compare(rl_runs).plot
    names = [line.split(",")[0] for line in plot.csv.splitlines()[1:]]
    assert {name: names.count(name) for name in names} == {
        "ppo": 11, "grpo": 3, "dpo": 1, "best_of_n": 3
    }  # fmt: skip
    assert "ppo: 0.9 at KL 5.4" in plot.svg and "best_of_n: 0.5 at KL ≤ 0.19" in plot.svg
    (rl_runs[1] / "metrics.jsonl").write_text('{"step": 3, "eval/kl": 1.0}\n')
    assert "No KL to the reference was measured of grpo." in compare(rl_runs[1:]).plot.note
    assert compare(rl_runs[1:2]).plot is None


def test_a_point_of_greedy_answers_beside_the_kl_of_sampled_ones_is_said_to_be(rl_runs):
    note = "of dpo is of the answers that were judged, greedy ones by default, not of the sampled"
    assert note in compare(rl_runs).plot.note
    assert not compare([rl_runs[0], rl_runs[3]]).plot.note


def test_evaluation_json_wins_over_metrics(rl_runs):
    points = {"kl": [1.0, None], "gold": [0.25, 0.5]}
    (rl_runs[0] / "evaluation.json").write_text(json.dumps({"frontier": points}))
    comparison = compare(rl_runs[:1])
    assert comparison.plot.csv.splitlines()[1:] == ["ppo,1.0,1.0,0.25,", "ppo,,,0.5,"]
    assert comparison.rows[0][8:10] == ["0.500", "–"]


def test_config_differences():
    a = {"stage": "ppo", "seed": 0, "train": {"steps": 5, "batch": 2}, "ppo": {"epochs": 4}}
    b = {"stage": "grpo", "seed": 0, "train": {"steps": 9, "batch": 2}, "init": None}
    every, some = find_config_differences({"a": a, "b": b})
    assert every == [["stage", '"ppo"', '"grpo"'], ["train.steps", "5", "9"]]
    assert some == [["ppo.epochs", "4", "–"], ["init", "–", "null"]]
    assert find_config_differences({"a": a, "b": a}) == ([], [])


def test_shared_samples():
    one = {"prompt": "p", "responses": {"sft": "x", "ppo": "ours"}, "scores": {"ppo": 0.5}}
    other = {"prompt": [{"role": "user", "content": "p"}], "responses": {"dpo": "theirs"}}
    alone = {"prompt": "q", "responses": {"dpo": "z"}}
    runs = {"a": run("a", [one, one]), "b": run("b", [alone, other]), "c": run("c", [alone])}
    shared = find_shared_samples(runs)
    assert [list(s["responses"].items()) for s in shared] == [
        [("a", "ours"), ("b", "theirs")], [("b", "z"), ("c", "z")]
    ]  # fmt: skip
    assert shared[0]["scores"] == {"a": 0.5}


def seeded(runs: list[Path], folder: Path) -> Path:
    """Three seeds of the first run, as a sweep leaves them, beside files of another kind."""
    sweep = folder / "abl"
    for seed, gold in enumerate((0.7, 0.74, 0.78)):
        run = sweep / f"beta=0.1,name=a_rather_long_name,seed={seed}"
        shutil.copytree(runs[0], run)
        config = json.loads((run / "config.json").read_text()) | {"seed": seed}
        (run / "config.json").write_text(json.dumps(config))
        lines = (run / "metrics.jsonl").read_text().replace("0.74", str(gold))
        (run / "metrics.jsonl").write_text(lines)
    (sweep / "logs").mkdir()
    (sweep / "cells.csv").write_text("")
    return sweep


def test_seeds_stand_as_one_with_their_mean_and_deviation(rl_runs, tmp_path):
    sweep = seeded(rl_runs, tmp_path)
    both = compare([*sorted(sweep.glob("beta*")), rl_runs[1]])
    assert both.names == ["beta=0.1,name=a_rather_long_name, 3 seeds", "grpo"]
    assert both.rows[0][2:8] == [
        "100", "3 min 45 s", "0.740 ± 0.040", "1.000 ± 0.000", "3.00 ± 0.00", "9.00 ± 0.00"
    ]  # fmt: skip
    assert both.rows[0][10] == "70.0\u00a0% ± 0.0\u00a0%"
    mean = both.plot.csv.splitlines()[-4].split(",")[-2]  # at the last point
    assert float(mean) == pytest.approx(0.74)
    assert not any(field[0] == "seed" for field in both.fields + both.partial)
    alone = compare([next(sweep.glob("beta*"))])
    assert alone.names == ["beta=0.1,name=a_rather_long_name,seed=0"]


def test_seeds_of_which_one_has_fewer_points_are_drawn_at_their_last(rl_runs, tmp_path):
    runs = sorted(seeded(rl_runs, tmp_path).glob("beta*"))
    logged = (runs[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[2] / "metrics.jsonl").write_text("".join(logged[1:]))
    (point,) = compare(runs).plot.csv.splitlines()[1:]
    assert float(point.split(",")[-2]) == pytest.approx(0.74)


def test_a_run_that_was_set_aside_is_no_further_seed(rl_runs, tmp_path):
    sweep = seeded(rl_runs, tmp_path)
    last = max(sweep.glob("beta*"))
    shutil.copytree(last, last.with_name(f"{last.name}.1"))  # as --rerun leaves it
    name = "beta=0.1,name=a_rather_long_name"
    assert compare([*sorted(sweep.glob("beta*"))]).names == [f"{name}, 3 seeds", f"{name},seed=2.1"]


def test_a_seed_that_has_not_finished_is_in_no_mean(rl_runs, tmp_path):
    runs = sorted(seeded(rl_runs, tmp_path).glob("beta*"))
    (runs[2] / "summary.json").unlink()
    logged = (runs[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[2] / "metrics.jsonl").write_text("".join(logged[:3]))  # killed on the way
    both = compare(runs)
    assert both.names == ["beta=0.1,name=a_rather_long_name, 2 seeds", runs[2].name]
    assert both.rows[0][4] == "0.720 ± 0.028"  # of 0.7 and 0.74


def test_seeds_that_lack_a_number_are_counted(rl_runs, tmp_path):
    runs = sorted(seeded(rl_runs, tmp_path).glob("beta*"))
    lines = (runs[2] / "metrics.jsonl").read_text().replace("0.78", '"NaN"')
    (runs[2] / "metrics.jsonl").write_text(lines)
    assert compare(runs).rows[0][4] == "0.720 ± 0.028 (2 of 3)"


def test_a_pattern_stands_for_the_runs_it_matches(rl_runs, tmp_path, capsys):
    sweep = seeded(rl_runs, tmp_path)
    assert len(read_runs([f"{sweep}/*"])) == 3
    left_out = capsys.readouterr().out
    assert left_out == f"left out, being no runs: {sweep}/cells.csv, {sweep}/logs\n"
    with pytest.raises(UserError, match="matches nothing"):
        read_runs([f"{tmp_path}/nothing*"])
    with pytest.raises(UserError, match="logs is not a run directory"):
        read_runs([sweep / "logs"])


def test_long_names_are_whole_on_a_narrow_console(rl_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    paths = []
    for i in range(9):
        paths.append(tmp_path / f"cauchy_with_width_{i}")
        shutil.copytree(rl_runs[0], paths[-1])
        config = json.loads((paths[-1] / "config.json").read_text()) | {"width": i}
        (paths[-1] / "config.json").write_text(json.dumps(config))
    print_comparison(compare(paths))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert sum("Comparison" in line for line in lines) == 3  # 4, 4 and 1 of 9
    assert sum(line.strip().startswith("stage") for line in lines) == 3


def test_the_page_is_self_contained_and_text_stays_text(rl_runs, tmp_path):
    comparison = compare(rl_runs)
    source = render(comparison, tmp_path)
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    links = [a["href"] for _, a in page.tags if "href" in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {"frontier", "numbers", "config", "samples"} <= ids
    attack = json.loads((rl_runs[0] / "config.json").read_text())["note"]
    assert page.text.count(attack) == 1  # as a prompt
    assert json.dumps(attack) in page.text  # as a value of the config
    assert "Three pears cost 12 coins. ]]>" in page.text
    data = next(a["href"] for _, a in page.tags if "download" in a)
    assert base64.b64decode(data.partition("base64,")[2]).decode() == comparison.plot.csv
    assert render(compare(rl_runs), tmp_path) == source


def test_runs_of_one_name_are_told_apart(rl_runs, tmp_path):
    (tmp_path / "old").mkdir()
    old = tmp_path / "old" / "ppo"
    rl_runs[0].rename(old)
    rl_runs[1].rename(rl_runs[0])
    assert compare([old, rl_runs[0], rl_runs[2]]).names == [str(old), str(rl_runs[0]), "dpo"]


def test_hostile_directory_names(rl_runs, tmp_path):
    hostile = rl_runs[0].with_name('<img src=x onerror="x()">')
    rl_runs[0].rename(hostile)
    page = Page(render(compare([hostile, rl_runs[1]]), tmp_path))
    assert not any(tag == "img" for tag, _ in page.tags)
    assert hostile.name in page.text


@pytest.mark.parametrize(
    "frontier, message",
    [
        ([], "frontier must be an object with a list kl"),
        ({"kl": [1], "gold": [1, 2]}, r"frontier\.gold must be as long as kl"),
        ({"kl": [1], "proxy": ["much"]}, r"frontier\.proxy: could not convert"),
    ],
)
def test_a_broken_frontier_is_named(rl_runs, frontier, message):
    (rl_runs[3] / "evaluation.json").write_text(json.dumps({"frontier": frontier}))
    with pytest.raises(UserError, match=f"best_of_n/evaluation.json: {message}"):
        compare(rl_runs)


@pytest.mark.parametrize("out", ["no/such/compare.html", "ppo", "ppo/config.json/x.html", ""])
def test_a_page_that_cannot_be_written(rl_runs, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot write"):
        write_comparison(compare(rl_runs[2:3]), out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "in the command line: the following arguments are required: runs"),
        (["--colour=red", "x"], "in the command line: unrecognized arguments: --colour=red"),
        (["nowhere"], "nowhere is not a run directory: it has no config.json"),
        (["ppo", "./ppo"], "ppo is named twice"),
    ],
)
def test_mistakes_are_one_line(rl_runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n" and captured.out == ""


def test_command_line(rl_runs, tmp_path):
    command = [sys.executable, "-m", "rlhf_jax.compare", *(path.name for path in rl_runs)]
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from rlhf_jax.compare import main; "
    command[1:3] = ["-c", code + "code = main(); print(*sys.modules, file=sys.stderr); exit(code)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "jax" not in done.stderr.split()
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "ppo grpo dpo best_of_n" in lines
    assert "KL 9.00 5.00 4.00 ≤ 1.20" in lines
    assert lines[-1] == "comparison: compare.html"
    assert (tmp_path / "compare.html").read_text("utf-8") == render(compare(rl_runs), tmp_path)

    module = [sys.executable, "-m", "rlhf_jax.compare", str(tmp_path / "nowhere")]
    done = subprocess.run(module, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
