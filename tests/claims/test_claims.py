"""Claims from their file: what is refused, what runs hold, the tables and the page."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import main as stages
from rlhf_jax.claims import run as running
from rlhf_jax.claims.__main__ import main
from rlhf_jax.claims.claim import Arm, Claim, Comparison, Measure, check_claims, read_claims
from rlhf_jax.claims.findings import NOT_RUN, Finding, find
from rlhf_jax.claims.measures import continues, read_values, watched
from rlhf_jax.claims.page import write_page
from rlhf_jax.claims.tables import besides, markdown, rows, write_tables
from rlhf_jax.errors import UserError
from rlhf_jax.stages.chain import load_config
from rlhf_jax.tasks.town.town import Town

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "experiments" / "claims.py")
TUNED = Arm("tuned", "experiments/dpo.py")
BETTER = Claim(
    "better",
    "Tuning helps.",
    tests=(Comparison(Measure(TUNED, "gold"), Measure(TUNED, "gold", True), "superior", 0.1),),
    conditions=(Comparison(Measure(TUNED, "eval/kl"), 1.0, "equivalent", 0.5),),
    beside=(Measure(TUNED, "words"), Measure(TUNED, "seconds")),
)


def test_every_claim_of_the_experiments_can_be_run(tmp_path):
    path, claims = read_claims(FILE)
    assert len(claims) == 10 and [claims[3]] == read_claims(f"{FILE}:{claims[3].name}")[1]
    for claim in claims:
        jobs = running.plan(path, claim, tmp_path / "claims")
        assert len(jobs.runs) == claim.seeds * len(claim.arms) and claim.seeds >= 3
        for arm in claim.arms:  # a reward model that keeps no scale is asked for none
            rewarded = arm.settings.get("init.reward")
            if rewarded and load_config(rewarded).normalize.prompts == 0:
                assert arm.settings.get("reward.normalize") == "False", arm.name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tests": ()}, "claim 'better' needs a test"),
        ({"seeds": 0}, "at least one seed"),
        ({"tests": (Comparison(Measure(TUNED, "gold"), 0.5, "better"),)}, "no rule 'better'"),
        ({"tests": (Comparison(Measure(TUNED, "gold"), 0.5, "equivalent"),)}, "0.0 cannot be"),
        ({"beside": (Measure(replace(TUNED, settings={"seed": "1"}), "gold"),)}, "'tuned' too"),
        ({"beside": (Measure(replace(TUNED, name="a/b"), "gold"),)}, "'a/b' names a directory"),
    ],
)
def test_a_claim_that_cannot_be_tested_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_claims("mine.py", [replace(BETTER, **change)])


def test_mistakes_are_told_in_a_line_before_anything_runs(tmp_path, capsys):
    (tmp_path / "none.py").write_text("CLAIMS = ()\n")
    (tmp_path / "number.py").write_text("CLAIMS = 3\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    (tmp_path / "field.py").write_text(
        "from rlhf_jax.claims.claim import Arm, Claim, Comparison, Measure\n"
        "ARM = Arm('arm', 'experiments/dpo.py', {'loss.betta': '1'})\n"
        "CLAIMS = (Claim('one', 'One.', (Comparison(Measure(ARM, 'gold'), 1.0, 'superior'),)),)\n"
    )
    (tmp_path / "start.py").write_text(
        "from rlhf_jax.claims.claim import Arm, Measure\n"
        "ONE = Measure(Arm('arm', 'experiments/dpo.py'), 'wins', of_start=True)\n"
    )
    told = {
        f"{tmp_path}/start.py": "wins of arm's start: only gold, right, words, continues are known",
        f"{FILE}:rlhf_beats_sftt": "did you mean rlhf_beats_sft?",
        f"{tmp_path}/none.py": "has no tuple CLAIMS",
        f"{tmp_path}/number.py": "has no tuple CLAIMS",
        f"{tmp_path}/wrong.py": "line 1: ZeroDivisionError",
        f"{tmp_path}/field.py": "claim 'one': cell arm: in the command line: the preference stage "
        "has no loss.betta",
        f"{tmp_path}/absent.py": "there is no file",
    }
    for source, message in told.items():
        assert main([source, f"--workdir={tmp_path}/runs"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert not (tmp_path / "runs").exists()


def test_main_tells_the_command_that_runs_claims(capsys):
    assert stages.main([f"--config={FILE}:all"]) == 2
    line = "claims are many runs: python -m rlhf_jax.claims experiments/claims.py:all"
    assert line in capsys.readouterr().err


def test_a_claim_cannot_change_after_its_first_run(tmp_path):
    running.register(tmp_path, [BETTER])
    running.register(tmp_path, [replace(BETTER, sentence="In other words.", beside=())])
    easier = replace(BETTER.tests[0], margin=0.01)
    with pytest.raises(UserError, match="the tests of claim 'better' are not what"):
        running.register(tmp_path, [replace(BETTER, tests=(easier,))])
    with pytest.raises(UserError, match="the conditions and seeds of"):
        running.register(tmp_path, [replace(BETTER, conditions=(), seeds=5)])


@pytest.mark.parametrize(
    "reply, expected",
    [
        (", wear? Kate's favourite colour is grey.", True),
        ("knows that.", True),
        ("", True),
        ("Kate likes the colour grey.", False),
        ("18 coins.", False),
        ("What does Kate wear?", True),
    ],
)
def test_a_reply_that_goes_on_with_the_prompt(reply, expected):
    assert continues(reply) == expected


def write_run(folder: Path, ours: list[float], kl: float, parents: dict | None = None) -> None:
    """A run whose answers to town prompts have these gold scores, its start's 0.5 each."""
    folder.mkdir(parents=True)
    prompts = Town().prompts("heldout", len(ours))
    samples = [
        {
            "prompt": [turn.to_json() for turn in prompt.messages],
            "responses": {"sft": "goes on", "dpo": "Two words."},
            "scores": {"sft": 0.5, "dpo": score},
        }
        for prompt, score in zip(prompts, ours, strict=True)
    ]
    summary = {
        "stage": "preference", "status": "done", "config_hash": "x", "parents": parents or {},
        "wall_seconds": 60.0, "metrics": {"eval/kl": kl},
    }  # fmt: skip
    config = {"stage": "preference", "eval": {"source": "town"}, "data": {"validation": "town"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in samples))


@pytest.fixture
def runs(tmp_path) -> dict[tuple[str, int], Path]:
    for seed in range(3):
        gold = np.full(40, 0.8) + 0.01 * seed
        gold[0] = 0.5
        write_run(tmp_path / "parent", gold.tolist(), 0.0) if not seed else None
        parents = {"policy": str(tmp_path / "parent")}
        write_run(tmp_path / f"tuned,seed={seed}", gold.tolist(), 1 + 0.1 * seed, parents)
    return {("tuned", seed): tmp_path / f"tuned,seed={seed}" for seed in range(3)}


def test_what_is_read_of_a_run(runs):
    def read(metric, of_start=False):
        return read_values(runs["tuned", 1], Measure(TUNED, metric, of_start))

    (gold, of), (before, also) = read("gold"), read("gold", True)
    assert gold.shape == (40,) and gold[:2] == pytest.approx([0.5, 0.81]) and of == also
    assert set(before) == {0.5}
    assert read("wins")[0][:2] == pytest.approx([0.5, 1.0])
    assert set(read("words")[0]) == {2.0} and set(read("continues", True)[0]) == {1.0}
    assert set(read("right")[0]) <= {0.0, 1.0} and len(read("right")[0]) == 40
    assert read("eval/kl") == (pytest.approx([1.1]), "")
    assert read("seconds")[0] == [120.0]  # its parent's too
    assert read("lines")[0] > 5000 and np.isnan(read("memory")[0])
    with pytest.raises(UserError, match="has no metric eval/loss"):
        read("eval/loss")
    for metric in ("eval/kl", "wins"):  # which are against the start
        with pytest.raises(UserError, match="only gold, right, words, continues are known"):
            read(metric, True)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is what /proc says")
def test_the_memory_of_a_run_is_kept(tmp_path):
    script = "import time; held = b'x' * (80 << 20); time.sleep(0.5)"

    def python(words, log, cores):
        return subprocess.Popen([sys.executable, "-c", script])

    process = watched(python)(["rlhf_jax.main", f"--workdir={tmp_path}"], tmp_path / "log", set())
    while process.poll() is None:
        time.sleep(0.05)
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert 80 < kept["MiB"] < 300


def test_from_runs_to_a_verdict_a_table_and_a_page(runs, tmp_path):
    finding = find(BETTER, runs, {})
    (test,), (condition,) = finding.tests, finding.conditions
    # One answer of 40 is as before, the others are 0.3, 0.31 and 0.32 better.
    assert test.difference.mean == pytest.approx(0.31 * 39 / 40) and test.prompts == 40
    assert (test.verdict, condition.verdict, finding.verdict) == ("supported",) * 3
    assert condition.ours == pytest.approx(1.1) and condition.prompts == 0
    findings = [finding, Finding(replace(BETTER, name="later", sentence="Later."), NOT_RUN)]
    told = "gold of tuned less tuned's start: 0.802 and 0.500"
    assert rows(findings)[0][:3] == ["better", "supported", told]
    assert rows(findings)[1][-1] == "within ±0.5, a condition: supported"
    assert rows(findings)[-1][:3] == ["later", "not run", "–"]
    text = markdown(findings)
    assert f"| Tuning helps. | **supported** | {told}, +0.302 (" in text
    assert "| Later. | not run | – |" in text
    write_tables(tmp_path, findings)
    (row, also) = csv.DictReader((tmp_path / "claims.csv").open())
    assert float(row["difference"]) == test.difference.mean and also["condition"] == "True"
    page = write_page(tmp_path, "mine.py", findings).read_text()
    assert "Of 2 claims: 1 supported, 1 not run." in page and "<svg" in page


def test_what_is_told_beside_has_its_range_over_seeds(runs):
    claim = replace(BETTER, beside=(Measure(TUNED, "eval/kl"), Measure(TUNED, "seconds")))
    told = besides(find(claim, runs, {}))
    assert told == ["kl of tuned 1.100 (1.000 to 1.200)", "seconds of tuned 120 s"]


def test_a_failed_run_leaves_its_claim_without_a_verdict(runs, tmp_path):
    finding = find(BETTER, runs, {"tuned,seed=1": "error: no room"})
    assert (finding.verdict, finding.tests) == (NOT_RUN, ())
    page = write_page(tmp_path, "mine.py", [finding]).read_text()
    assert "tuned,seed=1 failed: error: no room" in page and "<svg" not in page
