"""What a search proposes and how it goes on; runs as jobs of a cluster."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.sweep import jobs as pool
from rlhf_jax.sweep.engines import on_cluster
from rlhf_jax.sweep.jobs import Job, run_jobs
from rlhf_jax.sweep.search import Range, Search, corners, parse_space, search

SPACE = parse_space("loss.beta=0.01..1:log; loss.name=good,bad; train.rows=2..9")


def test_a_space_has_ranges_and_choices():
    assert {
        "loss.beta": Range(0.01, 1.0, True),
        "loss.name": ["good", "bad"],
        "train.rows": Range(2, 9, False),
    } == SPACE
    assert parse_space("x.y=-1..0.5")["x.y"] == Range(-1.0, 0.5, False)
    assert [cell.values["loss.name"] for cell in corners(SPACE)] == ["good", "bad"]
    assert corners(SPACE)[1].values["loss.beta"] == "1.0"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--search is empty"),
        ("loss.beta", "'loss.beta' is no field=value,value"),
        ("loss.beta=1..0.1", "a range rises"),
        ("loss.beta=0..1:log", "one in log is above 0"),
        ("loss.beta=a..b", "is no range of numbers"),
        ("seed=1..9", "--search: seeds are set by --seeds"),
        ("train.steps=10..90", "train.steps are the config's, or a quarter of them"),
    ],
)
def test_mistakes_in_a_space(text, message):
    with pytest.raises(UserError, match=message):
        parse_space(text)


def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"--search needs optuna: pip install -r requirements-sw"):
        Search(tmp_path / "journal", tmp_path, "eval/accuracy", 64, {})
    with pytest.raises(UserError, match=r"--engine=slurm needs submitit: pip install -r require"):
        on_cluster(tmp_path, {})


class Runs:
    """Runs that are best at beta = 0.1, and worse by far where the name is "bad"."""

    def __init__(self, stop_at: int = 10**9):
        self.short: list[str] = []
        self.whole: list[str] = []
        self.stop_at = stop_at

    def __call__(self, cells):
        values: list[float | str] = []
        for cell, steps in cells:
            if len(self.short) + len(self.whole) == self.stop_at:
                raise KeyboardInterrupt
            (self.short if steps == 16 else self.whole).append(cell.name)
            off = abs(math.log10(float(cell.values["loss.beta"])) + 1)
            values.append(0.8 - 0.1 * off - 0.3 * (cell.values["loss.name"] == "bad"))
        return values


def study_in(folder: Path, owner: str = "one", steps: int = 64, searched: str = "") -> Search:
    made_from = {"--search": searched, "flags": ["--config.train.log_every=1"]}
    return Search(folder / "search.journal", folder / owner, "eval/accuracy", steps, made_from)


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="requirements-sweep.txt is not installed")


def test_the_best_quarter_is_run_whole_and_the_best_is_found(optuna, tmp_path):
    study, runs = study_in(tmp_path), Runs()
    search(study, SPACE, 40, 2, runs)
    assert study.count() == len(runs.short) == 40
    assert len(runs.whole) <= 20  # a quarter, but for the first ones, which have no others
    beta = float(study.best().values["loss.beta"])
    assert study.best().values["loss.name"] == "good" and 0.05 < beta < 0.2
    cell, steps, value, why = study.trials()[0]
    assert (cell, steps, why) == (study.best().name, 64, "") and value > 0.76
    assert len(study.trials()) == 40


def test_what_is_run_is_in_its_range_and_what_the_study_is_told(optuna, tmp_path):
    study, space = study_in(tmp_path), parse_space("loss.beta=0.12345..0.12355")
    for _ in range(5):
        trial, cell = study.ask(space)
        ran = float(cell.values["loss.beta"])
        assert 0.12345 <= ran <= 0.12355 and ran == trial.params["loss.beta"]


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_search_that_was_killed_goes_on_with_the_same_trials(optuna, tmp_path, stop_at):
    first = Runs(stop_at)
    with pytest.raises(KeyboardInterrupt):
        search(study_in(tmp_path), SPACE, 12, 2, first)
    study, again = study_in(tmp_path), Runs()
    search(study, SPACE, 12, 2, again)
    assert study.count() == 12
    if stop_at == 1:  # both trials were under way, and are run again
        assert first.short[0] in again.short[:2]
    assert len({*first.short, *again.short}) > 9  # and nothing is proposed over and over


def test_machines_share_a_study_and_leave_each_others_trials_alone(optuna, tmp_path):
    one = study_in(tmp_path)
    trial, cell = one.ask(SPACE)
    other = study_in(tmp_path, "other")
    search(other, SPACE, 4, 2, Runs())
    assert one.goes_on(trial, 0.9)  # it is still there, and the best so far
    one.tell(trial, 0.9)
    assert one.count() == other.count() == 5
    assert other.best().name == cell.name


def test_trials_of_other_runs_are_not_mixed(optuna, tmp_path):
    search(study_in(tmp_path), SPACE, 2, 2, Runs())
    with pytest.raises(UserError, match=r"trials with train\.steps = 64, and this is 128; name a"):
        study_in(tmp_path, steps=128)
    with pytest.raises(UserError, match=r"trials with --search = , and this is \S+,new; name"):
        study_in(tmp_path, searched="loss.name=good,new")
    assert study_in(tmp_path).count() == 2


def test_a_journal_that_cannot_be(optuna, tmp_path):
    with pytest.raises(UserError, match=r"--storage=.*No such file"):
        Search(tmp_path / "nowhere" / "journal", tmp_path, "eval/accuracy", 64, {})


def test_a_trial_that_fails_has_ended_and_says_why(optuna, tmp_path):
    study = study_in(tmp_path)
    search(study, SPACE, 3, 1, lambda cells: ["error: it diverged" for _ in cells])
    assert study.count() == 3 and study.best() is None
    assert {why for *_, why in study.trials()} == {"error: it diverged"}


def test_runs_are_jobs_of_a_cluster(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="requirements-sweep.txt is not installed")
    (tmp_path / "scripted_run.py").write_text(
        "import sys; from pathlib import Path; kind = sys.argv[1]; print('said', kind)\n"
        "if kind == 'fails': print('error: it fails'); sys.exit(2)\n"
        "folder = Path(sys.argv[-1].partition('=')[2]); folder.mkdir()\n"
        "(folder / 'done').touch()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pool, "MODULE", "scripted_run")
    monkeypatch.setattr(Job, "is_done", lambda job: (job.directory / "done").exists())
    engine = on_cluster(tmp_path / "slurm", {"timeout_min": 5}, cluster="local")
    jobs = [Job(name, (name,), tmp_path / name) for name in ("runs", "fails")]
    told: list[Job] = []
    failed = run_jobs(jobs, 2, tmp_path / "logs", told.append, engine=engine)
    assert told == jobs[:1] and failed == {jobs[1]: "error: it fails"}
    assert (tmp_path / "logs" / "runs.log").read_text() == "said runs\n"
    with pytest.raises(UserError, match="--slurm: "):
        on_cluster(tmp_path / "slurm", {"colour": "red"}, cluster="local")
