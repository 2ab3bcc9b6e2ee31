"""Raw text to DPO through the front door: chains, reuse, faults, mistakes."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import evaluate
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.main import main
from rlhf_jax.stages.chain import load_config, pick_samples, prepare, run
from rlhf_jax.training.checkpoint import seal
from rlhf_jax.training.saved_model import load_model
from rlhf_jax.training.summary import read_summary
from tests.stages.conftest import run_main


@pytest.fixture(scope="module")
def chain(experiments, tmp_path_factory):
    """(experiments, runs): pretrain → sft → dpo, run once."""
    runs = tmp_path_factory.mktemp("runs")
    result = run_main(f"--config={experiments}/dpo.py", f"--workdir={runs}/dpo")
    assert result.returncode == 0, result.stderr[-2000:]
    return experiments, runs, result.stdout


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_one_command_runs_the_whole_chain(chain):
    _, runs, out = chain
    for name in ("pretrain", "sft", "dpo"):
        assert summary(runs / name)["status"] == "done"
        assert (runs / name / "report.html").is_file()
    assert out.index("/pretrain.py in") < out.index("/sft.py in") < out.index("/dpo.py in")
    assert out.index("/sft.py in") < out.index("texts.jsonl (replay): records 300")
    metrics = summary(runs / "dpo")["metrics"]
    assert set(metrics) >= {
        "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/ece", "eval/kl",
        "eval/gold_reward", "eval/gold_win_rate", "eval/gold_win_rate_low", "eval/eos_rate",
        "eval/gold_win_rate_high", "eval/gold_reward/correct", "eval/response_length",
        "eval/correct/facts", "eval/logps/chosen", "eval/logps/rejected",
    }  # fmt: skip
    assert {"eval/loss", "eval/bpb", "eval/token_accuracy"} <= set(
        summary(runs / "pretrain")["metrics"]
    )
    samples = [json.loads(line) for line in (runs / "dpo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and list(samples[0]["responses"]) == ["pretrain", "sft", "dpo"]


def test_reported_numbers_are_recomputable(chain):
    """The win rate of summary.json is that of the scores in samples.jsonl."""
    _, runs, _ = chain
    samples = [json.loads(line) for line in (runs / "dpo/samples.jsonl").read_text().splitlines()]
    ours, theirs = ([s["scores"][name] for s in samples] for name in ("dpo", "sft"))
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    metrics = summary(runs / "dpo")["metrics"]
    assert metrics["eval/gold_win_rate"] == pytest.approx(wins / 8, abs=1e-12)
    low, high = wilson_interval(wins, 8)
    assert metrics["eval/gold_win_rate_low"] == pytest.approx(low)
    assert metrics["eval/gold_win_rate_high"] == pytest.approx(high)


def test_before_and_after_are_of_the_same_records(chain):
    """The change of gold reward is that of the scores in samples.jsonl."""
    _, runs, out = chain
    samples = [json.loads(line) for line in (runs / "dpo/samples.jsonl").read_text().splitlines()]
    ours, theirs = (
        np.array([s["scores"][name] for s in samples]) for name in ("dpo", "sft")
    )  # fmt: skip
    metrics = summary(runs / "dpo")["metrics"]
    assert metrics["before/gold_reward"] == pytest.approx(theirs.mean())
    assert metrics["change/gold_reward"] == pytest.approx((ours - theirs).mean())
    low, high = (metrics[f"change/gold_reward_{end}"] for end in ("low", "high"))
    assert low <= metrics["change/gold_reward"] <= high
    chosen = metrics["eval/logps/chosen"] - metrics["before/logps/chosen"]
    assert chosen == pytest.approx(metrics["eval/logps/chosen_change"], abs=1e-4)
    assert "before/accuracy" not in metrics  # which DPO measures against the model it began as
    metrics = summary(runs / "sft")["metrics"]
    assert metrics["eval/loss"] == pytest.approx(metrics["before/loss"] + metrics["change/loss"])
    assert metrics["change/loss_high"] < 0 and metrics["change/loss_records"] == 200
    others = json.loads((runs / "dpo/evaluation.json").read_text())["others"]
    assert [*others] == ["pretrain", "sft", "dpo"]
    assert not any(name.startswith("before/") for name in summary(runs / "pretrain")["metrics"])
    assert re.search(r"Gold reward on the same 8 held-out records: \S+ before", out)


@pytest.mark.slow
def test_evaluating_again_on_the_same_records_gives_what_the_run_reported(chain, tmp_path, capsys):
    experiments, runs, _ = chain
    data = {"pretrain": "texts", "sft": "chats", "dpo": "pairs"}
    for name, file in data.items():
        flags = [f"--workdir={runs / name}", f"--data={experiments}/{file}.jsonl"]
        flags += [] if name == "pretrain" else ["--count=3"]
        assert evaluate.main([*flags, f"--out={tmp_path / name}"]) == 0
        reported, found = summary(runs / name)["metrics"], summary(tmp_path / name)["metrics"]
        of_data = [n for n in found if re.search("loss|accuracy|logps|bpb|ece", n)]
        assert len(of_data) >= 3
        for metric in of_data:
            assert found[metric] == pytest.approx(reported[metric], rel=1e-5, abs=1e-6), metric
        assert (tmp_path / name / "report.html").is_file()
    assert len((tmp_path / "dpo/samples.jsonl").read_text().splitlines()) == 3
    assert "Gold reward on" not in capsys.readouterr().err
    assert evaluate.main([*flags, f"--out={tmp_path / 'dpo'}"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_to_more_steps_is_the_longer_run(chain, tmp_path):
    experiments, runs, _ = chain
    copy_parents(runs, tmp_path)
    flags = [f"--config={experiments}/dpo.py", "--config.optimizer.schedule=constant"]
    for name, steps in (("longer", 5), ("longer", 9), ("whole", 9)):
        result = run_main(*flags, f"--workdir={tmp_path}/{name}", f"--config.train.steps={steps}")
        assert result.returncode == 0, result.stderr[-2000:]
    longer, whole = (load_model(tmp_path / name).params for name in ("longer", "whole"))
    jax.tree.map(np.testing.assert_array_equal, longer, whole)
    ours, theirs = (summary(tmp_path / name) for name in ("longer", "whole"))
    assert ours["metrics"]["eval/accuracy"] == theirs["metrics"]["eval/accuracy"]
    assert ours["config_hash"] == theirs["config_hash"]
    result = run_main(flags[0], f"--workdir={tmp_path}/dpo", "--config.train.steps=2")
    assert result.returncode == 0, result.stderr[-2000:]
    result = run_main(flags[0], f"--workdir={tmp_path}/dpo", "--config.train.steps=4")
    assert "optimizer.schedule = 'cosine' depends on the number of steps" in result.stderr


@pytest.mark.slow
def test_the_best_model_is_kept_and_a_run_ends_without_a_better_one(chain, tmp_path):
    experiments, runs, _ = chain
    copy_parents(runs, tmp_path)
    flags = [
        f"--config={experiments}/sft.py", f"--workdir={tmp_path}/best",
        "--config.train.eval_every=1", "--config.train.best=eval/loss",
        "--config.train.patience=2", "--config.optimizer.learning_rate=0.3",
    ]  # fmt: skip
    result = run_main(*flags, fault="step:2")
    assert result.returncode == -9
    result = run_main(*flags)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = comparable(tmp_path / "best")
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    best = min(losses, key=losses.get)
    metrics = summary(tmp_path / "best")["metrics"]
    assert metrics["eval/best_step"] == best and max(losses) == best + 2 < 12
    assert metrics["eval/loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.slow
def test_epochs_are_passes_over_the_rows(chain, tmp_path):
    experiments, runs, _ = chain
    copy_parents(runs, tmp_path)
    flags = (f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo")
    result = run_main(*flags, "--config.train.epochs=1.5")
    assert result.returncode == 0, result.stderr[-2000:]
    (told,) = re.findall(r"([0-9]+) steps are ([0-9.]+) epochs of ([0-9]+) rows", result.stdout)
    steps, epochs, rows = map(float, told)
    assert steps == np.ceil(1.5 * rows / 4) and epochs == pytest.approx(4 * steps / rows, rel=1e-2)
    assert (
        json.loads((tmp_path / "dpo/metrics.jsonl").read_text().splitlines()[-1])["step"] == steps
    )
    config = json.loads((tmp_path / "dpo/config.json").read_text())
    assert config["train"]["epochs"] == 1.5 and "steps" not in config["train"]


def test_a_second_run_reuses_everything(chain):
    experiments, runs, _ = chain
    before = (runs / "dpo/summary.json").stat().st_mtime_ns
    path = runs / "sft/summary.json"
    environment = summary(runs / "sft")["environment"] | {"jax": "0.0.1"}
    path.write_text(json.dumps(summary(runs / "sft") | {"environment": environment}))
    result = run_main(f"--config={experiments}/dpo.py", f"--workdir={runs}/dpo")
    assert result.returncode == 0
    assert result.stdout.count("reusing") == 3
    assert f"{runs}/sft was made with jax 0.0.1 (here " in result.stdout
    assert (runs / "dpo/summary.json").stat().st_mtime_ns == before


def test_a_reward_model_without_a_scale_is_told_before_any_parent_is_run(tmp_path):
    given = load_config("experiments/best_of_n.py")
    given.init.reward = "experiments/labelers.py:pooled"
    with pytest.raises(UserError, match=r"keeps no statistics of its scores; set reward\.norm"):
        run(given, "experiments/best_of_n.py", tmp_path / "best")
    assert not any(tmp_path.rglob("*"))


@pytest.mark.slow
def test_reward_model_reuses_the_parents(chain):
    experiments, runs, _ = chain
    result = run_main(f"--config={experiments}/reward.py", f"--workdir={runs}/reward")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("reusing") == 2
    metrics = summary(runs / "reward")["metrics"]
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    model = load_model(runs / "reward")
    assert "score_head" in model.params
    assert model.normalization == (
        metrics["eval/reference_score_mean"],
        metrics["eval/reference_score_std"],
    )


@pytest.mark.slow
def test_a_reward_model_is_reported_beside(chain):
    experiments, runs, _ = chain
    text = (experiments / "dpo.py").read_text()
    both = f'/sft.py", reward="{experiments}/reward.py"'
    (experiments / "judged.py").write_text(text.replace('/sft.py"', both))
    result = run_main(f"--config={experiments}/judged.py", f"--workdir={runs}/judged")
    assert result.returncode == 0, result.stderr[-2000:]
    ours, reward = (summary(runs / name)["metrics"] for name in ("judged", "reward"))
    for name in ("accuracy", "accuracy_low", "accuracy_high"):
        assert ours[f"eval/reward_model/{name}"] == reward[f"eval/{name}"]


def copy_parents(runs, target):
    for name in ("pretrain", "sft"):
        shutil.copytree(runs / name, target / name)


def comparable(run):
    """metrics.jsonl without wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow  # of quick ones test_policy kills a chain, and training/test_faults a loop
@pytest.mark.parametrize("fault", ["step:7", "checkpoint:arrays:8", "summary"])
def test_killed_dpo_resumes_to_the_same_bits(chain, tmp_path, fault):
    experiments, runs, _ = chain
    copy_parents(runs, tmp_path)
    command = (f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo")
    killed = run_main(*command, fault=fault)
    assert killed.returncode == -9 and not (tmp_path / "dpo/summary.json").exists()
    resumed = run_main(*command)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    ours, theirs = (load_model(path / "dpo").params for path in (tmp_path, runs))
    for a, b in zip(*(map(np.asarray, _leaves(p)) for p in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert comparable(tmp_path / "dpo") == comparable(runs / "dpo")
    same, other = (summary(path / "dpo")["metrics"] for path in (tmp_path, runs))
    wall_clock = {name for name in same | other if name.startswith("train/")}
    assert {k: v for k, v in same.items() if k not in wall_clock} == {
        k: v for k, v in other.items() if k not in wall_clock
    }


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_changed_config_of_a_started_run_is_refused(chain, tmp_path):
    experiments, runs, _ = chain
    copy_parents(runs, tmp_path)
    command = (f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo")
    assert run_main(*command, fault="checkpoint:renamed").returncode == -9
    result = run_main(*command, "--config.loss.beta=0.5")
    assert result.returncode == 2
    assert "loss.beta: 0.1 -> 0.5" in result.stderr


def test_parent_trained_anew_is_noticed(chain, tmp_path):
    """A finished child of another parent is neither reused nor silently mixed."""
    experiments, runs, _ = chain
    for name in ("pretrain", "sft", "dpo"):
        shutil.copytree(runs / name, tmp_path / name)
    path = tmp_path / "sft/model/data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 12}))
    (path.parent / "manifest.json").unlink()
    seal(path.parent)
    result = run_main(f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo")
    assert result.returncode == 2 and "(the model of init.policy has changed)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.trian.steps=3"], "no section trian; did you mean train?"),
        (
            ["--config.rollout.top_p=0.5"],
            "no rollout.top_p; it is read by online_preference, best_of",
        ),
        (["--config.train.step=3"], "has no train.step; did you mean train.steps?"),
        (["--config.train.steps=many"], "invalid literal"),
        (["--config.loss.name=sigmiod"], "did you mean 'sigmoid'?"),
        (["--config.loss.name=dpo"], "did you mean 'sigmoid'?"),
        (["--config.loss.gamma=1"], "an option of simpo; 'sigmoid' has no option gamma"),
        (["--config.loss.gama=1"], "has no loss.gama; did you mean loss.gamma?"),
        (["--config.loss.options=gamma=1"], "each option is a field now, as --config.loss."),
        (["--config.optimizer.b1=0.8"], "there is no optimizer.b1 any more: it is 0.9"),
        (["--config.optimizer.decay_fraction=0.1"], "only with optimizer.schedule = wsd"),
        (["--config.data.train=twon"], "unknown data set 'twon'"),
        (["--config.data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--config.data.train=/dev/null"], "/dev/null is no data set, and no file of a kind that"),
        (["--config.data.train=a.jsonl=2,a.jsonl=1"], "'a.jsonl' is named twice"),
        (
            ["--config.init.policy=nowhere"],
            "nowhere is not the directory of a finished run, and there",
        ),
        (["--config.optimizer.name=adam"], "did you mean 'adamw'?"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_runs(
    experiments, tmp_path, capfd, arguments, message
):
    rows = "--config.batch.rows=8"  # which eight devices divide
    flags = [f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo", rows]
    assert main([*flags, *arguments]) == 2
    check_one_line(capfd.readouterr().err, message)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_a_process_in_one_line(experiments, tmp_path):
    mistake = "--config.train.step=3"
    result = run_main(f"--config={experiments}/dpo.py", f"--workdir={tmp_path}/dpo", mistake)
    assert result.returncode == 2, result.stderr[-2000:]
    check_one_line(result.stderr, "has no train.step; did you mean train.steps?")
    assert not list(tmp_path.iterdir())


def check_one_line(errors, message):
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in errors


MISTAKEN = {
    "def get_config(:\n": "line 1: SyntaxError",
    "def get_config():\n    return nosuch\n": "line 2: NameError: name 'nosuch' is not defined",
    "import nosuch\n": "line 1: ModuleNotFoundError",
    "def get_config():\n    return eval('1+')\n": "line 2: SyntaxError: invalid syntax",
    "def get_config():\n    return 3\n": "get_config returns none of",
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    '    return ConfigDict({"stage": "pretrain"})\n': "pretrain stage needs the section batch",
}


@pytest.mark.parametrize("text", MISTAKEN)
def test_a_mistake_in_a_config_file_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    for load in (lambda: main([f"--config={path}"]), lambda: prepare(load_config(f"{path}"))):
        try:
            assert load() == 2
            message = capsys.readouterr().err.removeprefix("error: ").strip()
        except UserError as error:
            message = str(error)
        assert MISTAKEN[text] in message and "\n" not in message


def test_a_full_disk_is_one_line_wherever_it_shows(experiments, tmp_path, monkeypatch, capsys):
    def full(*_, **options):
        raise OSError(28, "No space left on device", f"{tmp_path}/nowhere/file")

    monkeypatch.setattr("rlhf_jax.stages.chain.run", full)
    assert main([f"--config={experiments}/pretrain.py"]) == 75
    said = (
        rf"stopped: no room for {tmp_path}/nowhere/file \(No space left on device\): \d+ free in "
    )
    assert re.match(
        said + f"{tmp_path}; make room and run the same command", capsys.readouterr().err
    )


SUMMARY = {"stage": "sft", "status": "done", "config_hash": "x", "parents": {}, "metrics": {}}
SUMMARY["wall_seconds"] = 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", r"summary\.json must hold a JSON object, not a list"),
        ("{", r"summary\.json is not JSON"),
        ('{"status": "done"}', r"summary\.json is not as this package writes it: it has no stage"),
        (json.dumps(SUMMARY | {"parents": []}), "parents is of another type"),
        (json.dumps(SUMMARY | {"parents": {"policy": 1}}), "parents is of another type"),
        (json.dumps(SUMMARY | {"metrics": {"eval/loss": "1"}}), "metrics is of another type"),
        (json.dumps(SUMMARY | {"status": "no"}), "is not the directory of a finished run"),
    ],
)
def test_a_summary_of_another_shape_is_named(tmp_path, text, said):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, r"and there is no such directory; .* hf download NAME"),
        ([], r"and has no config\.json of a model"),
        (["config.json"], "it has not ended; its command goes on with it"),
        (["adapter_config.json"], "an adapter of PEFT; merge it into its model"),
    ],
)
def test_what_is_there_in_place_of_a_finished_run_is_said(tmp_path, files, said):
    directory = tmp_path / "llama"
    if files is not None:
        directory.mkdir()
        for name in files:
            (directory / name).write_text("{}")
    with pytest.raises(
        UserError, match=rf"^{directory} is not the directory of a finished run.*{said}"
    ):
        read_summary(directory)
    with pytest.raises(UserError, match=said):
        load_model(directory)


def test_missing_config_is_a_mistake():
    result = run_main("--config=experiments/nothing.py")
    assert result.returncode == 2 and "there is no file" in result.stderr


def test_one_sample_of_each_of_the_largest_families_is_shown():
    def sample(family, *texts):
        return {"family": family, "responses": dict(zip(("sft", "dpo"), texts, strict=True))}

    samples = [
        sample("sums", "3", "4"), sample("facts", "same", "same"), sample("facts", "a", "b"),
        sample("facts", "c", "d"), sample("claims", "yes", "no"), sample("lists", "x", "y"),
        sample("lists", "u", "v"),
    ]  # fmt: skip
    assert pick_samples(samples) == [samples[2], samples[5], samples[0]]
    plain = [{"responses": s["responses"]} for s in samples]
    assert pick_samples(plain) == [plain[0], plain[2], plain[3]]
