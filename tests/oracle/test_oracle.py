"""The oracle through the front door: where algorithms land, and that a wrong place is an error."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from rlhf_jax.evaluation.selection import best_of_n_law, kl_terms
from rlhf_jax.main import main
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.oracle.oracle_rows import BEST_OF, ROWS
from rlhf_jax.oracle.row_training import train_on_pairs, train_policy
from rlhf_jax.oracle.verdicts import judge, judge_best_of
from rlhf_jax.stages import defaults
from tests.stages.conftest import run_main

CONFIG = "--config=experiments/oracle.py"
N = 8


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run directory, its process) of three rows."""
    run = tmp_path_factory.mktemp("runs") / "oracle"
    rows = "--config.oracle.rows=rloo, dpo,best_of_8"
    steps = ("--config.oracle.table_steps=200", "--config.oracle.preference_steps=400")
    return run, run_main(CONFIG, rows, *steps, "--config.seed=3", f"--workdir={run}")


def test_rows_land_where_they_must(done):
    run, result = done
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    names = ("reward", "kl", "regret", "ok")
    assert set(metrics) == {f"oracle/{r}/{n}" for r in ("rloo", "dpo", BEST_OF) for n in names}
    assert all(value == 1 for name, value in metrics.items() if name.endswith("/ok"))
    np.testing.assert_allclose(metrics["oracle/dpo/reward"], 0.5585, atol=1e-3)
    assert metrics["oracle/rloo/regret"] < 0.005
    assert metrics[f"oracle/{BEST_OF}/kl"] < 1.2044
    lines = [line for line in result.stdout.splitlines() if "must be" in line]
    assert [line.split()[0] for line in lines] == ["rloo", "dpo", BEST_OF]
    assert "must be E r  0.5585, KL  0.7373 (the optimum): ok" in lines[0]
    assert len({line.index("must be") for line in lines}) == 1


def test_the_report_shows_them(done):
    run, _ = done
    evaluation = json.loads((run / "evaluation.json").read_text())
    (table,), (figure,) = evaluation["tables"], evaluation["plots"]
    assert [(row[0], row[-1]) for row in table["rows"]] == [
        ("rloo", "ok"), ("dpo", "ok"), (BEST_OF, "ok"),
    ]  # fmt: skip
    assert len(table["columns"]) == len(table["rows"][0])
    assert figure["kind"] == "oracle" and set(figure["points"]) == {"rloo", "dpo", BEST_OF}
    assert "Where each algorithm landed" in (run / "report.html").read_text()


def test_a_row_in_the_wrong_place_fails_the_run_and_is_reported(tmp_path):
    run = tmp_path / "oracle"
    rows = ("--config.oracle.rows=rloo,best_of_8", "--config.oracle.table_steps=3")
    result = run_main(CONFIG, *rows, f"--workdir={run}")
    assert result.returncode == 1
    assert "RuntimeError: 1 of 2 rows failed: rloo: regret over 0.005" in result.stderr
    assert "(the optimum): regret over 0.005" in result.stdout and "best_of_8" in result.stdout
    assert "regret over 0.005" in (run / "report.html").read_text()
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("rows=rloo,rlo", "oracle.rows: there is no row 'rlo'; there are: reinforce,"),
        ("rows=rloo_two_devices", "'rloo_two_devices' needs 2 devices to train on, of which there"),
        ("threads=0", "oracle.threads = 0 must be at least 1"),
        ("table_steps=0", "oracle.table_steps = 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(flag, message, tmp_path, monkeypatch, capfd):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert main([CONFIG, f"--config.oracle.{flag}", f"--workdir={tmp_path}/oracle"]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and message in errors


def drawn(scale=1.0):
    """20,000 samples a prompt of the reference, its log-probs times `scale`; law; (E r, KL)."""
    reference = world.logprobs(world.REFERENCE)
    random = np.random.default_rng(0)
    probs = np.exp(world.log_softmax(scale * reference))
    chosen = np.stack([random.choice(len(p), 20_000, p=p) for p in probs])
    pairs = zip(np.exp(reference), world.REWARDS, strict=True)
    law = np.stack([best_of_n_law(p, r, N) for p, r in pairs])
    terms = (world.REWARDS, kl_terms(N, reference))
    reward, kl = (float((law * term).sum(1).mean()) for term in terms)
    return chosen, law, (reward, kl)


def test_best_of_n_is_held_to_its_law():
    chosen, law, where = drawn()
    np.testing.assert_allclose(where, [0.6462, 1.1970], atol=5.1e-5)
    assert judge_best_of(chosen, law, where, N)[0] == "ok"
    assert judge_best_of(*drawn(0.9), N)[0].startswith("not its law")
    assert judge_best_of(chosen, law, (where[0] + 0.05, where[1]), N)[0].startswith("reward")
    assert judge_best_of(chosen, law, (where[0], where[1] - 0.02), N)[0].startswith("KL should")


FEW = {"table_steps": 6, "transformer_steps": 2, "preference_steps": 50}
SPLIT = [name for name, row in ROWS.items() if row.microbatches * row.devices > 1]


def outcome(row, **steps):
    config = defaults.base("oracle", oracle=steps)
    return train_on_pairs(row, config) if row.policy == "pairs" else train_policy(row, config)


@functools.cache
def whole_outcome(name):
    return outcome(ROWS[name], **FEW)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "rloo_four_parts")) for n in SPLIT],
)
def test_a_row_that_is_split_goes_where_the_whole_one_goes(name):
    split = outcome(ROWS[name], **FEW)
    whole = whole_outcome(name.removesuffix("_four_parts").removesuffix("_two_devices"))
    for field in ("reward", "kl", "regret", "coefficient"):
        expected = getattr(whole, field)
        np.testing.assert_allclose(getattr(split, field), expected, atol=1e-4, err_msg=field)
    assert whole.kl > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPLIT if ROWS[name].devices > 1])
def test_a_row_on_two_devices_lands_where_it_must(name):
    assert judge(ROWS[name], outcome(ROWS[name])) == "ok"


@pytest.mark.slow
def test_every_row_of_the_shipped_experiment_on_one_device(tmp_path):
    result = run_main(CONFIG, f"--workdir={tmp_path}/oracle")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "oracle/summary.json").read_text())["metrics"]
    fit = {name for name, row in ROWS.items() if row.devices == 1}
    assert {name.split("/")[1] for name in metrics} == fit | {BEST_OF}
    left_out = ", ".join(name for name in ROWS if name not in fit)
    assert f"for more devices than there are here: {left_out}\n" in result.stdout
