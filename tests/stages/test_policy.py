"""The on-policy stages through the front door: metrics, faults, mistakes of reward functions."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax import evaluate
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.environments import trajectories
from rlhf_jax.errors import UserError
from rlhf_jax.rl import judge
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout, pack_rows
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages import defaults, sampled
from rlhf_jax.stages.online_preference import pack_best_and_worst
from rlhf_jax.tasks.data_files import data_folder
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.checkpoint import load_params
from rlhf_jax.training.rundir import RunDirectory
from tests.chat_model import make_chat_model
from tests.stages.conftest import run_main, started

PROMPTS = [Prompt(str(i), (Message("user", f"Why {i}?"),), {}) for i in range(2)]


@pytest.fixture(scope="module")
def chain(experiments, tmp_path_factory):
    """(experiments, runs): everything up to ppo, run once."""
    runs = tmp_path_factory.mktemp("runs")
    result = run_main(f"--config={experiments}/ppo.py", f"--workdir={runs}/ppo")
    assert result.returncode == 0, result.stderr[-3000:]
    return experiments, runs


def summary(run):
    return json.loads((run / "summary.json").read_text())["metrics"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run):
    """Lines of metrics.jsonl without measurements of time."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in lines(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_ppo_reports_what_a_researcher_watches(chain):
    _, runs = chain
    logged = lines(runs / "ppo/metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    # An iteration in which no answer ended has no mean length of those that did.
    assert set().union(*logged) >= {
        "objective/kl", "objective/kl_k2", "objective/kl_k3", "objective/kl_exact",
        "objective/entropy", "objective/scores", "objective/rlhf_reward",
        "objective/non_score_reward", "objective/kl_coefficient",
        "policy/approxkl", "policy/clipfrac", "policy/clipfrac_low", "policy/clipfrac_high",
        "policy/ratio", "policy/ratio_max", "policy/ratio_var", "policy/entropy",
        "loss/policy_avg", "loss/value_avg", "val/clipfrac", "val/explained_variance",
        "advantages/mean", "advantages/std", "completions/mean_length",
        "completions/mean_terminated_length", "completions/mean_truncated_length",
        "completions/clipped_ratio", "completions/eos_rate", "completions/min_length",
        "train/grad_norm", "val/skipped", "rewards/model/mean", "rewards/gold/mean",
        "rewards/length/mean", "rollout/logprob_difference",
    }  # fmt: skip
    assert abs(logged[0]["objective/kl"]) < 1e-5 and logged[1]["objective/kl"] != 0
    assert logged[0]["rollout/logprob_difference"] < 1e-4
    evaluated = [line for line in logged if "eval/kl" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {"eval/gold_reward", "eval/proxy_reward"} <= set(evaluated[0])
    metrics = summary(runs / "ppo")
    assert {"eval/gold_win_rate", "eval/kl", "eval/proxy_reward"} <= set(metrics)
    before = json.loads((runs / "ppo/before.json").read_text())["measured"]
    assert metrics["before/proxy_reward"] == pytest.approx(before["eval/proxy_reward"])
    after = metrics["before/proxy_reward"] + metrics["change/proxy_reward"]
    assert after == pytest.approx(metrics["eval/proxy_reward"])
    assert metrics["change/proxy_reward_low"] <= metrics["change/proxy_reward_high"]


@pytest.mark.slow
def test_evaluating_again_without_training_says_the_same(chain, tmp_path):
    experiments, runs = chain
    flags = [f"--workdir={runs}/ppo", f"--data={experiments}/prompts.jsonl"]
    assert evaluate.main([*flags, f"--out={tmp_path}/ppo"]) == 0
    found, reported = (
        json.loads((path / "summary.json").read_text())["metrics"]
        for path in (tmp_path / "ppo", runs / "ppo")
    )
    for name in ("eval/proxy_reward", "before/proxy_reward", "change/gold_reward", "eval/kl"):
        assert found[name] == pytest.approx(reported[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.skipif(
    data_folder() is None or not (data_folder() / "safety_xstest").is_dir(),
    reason="no public sets here",
)
def test_a_chat_model_answers_public_requests(chain, tmp_path, capsys):
    _, runs = chain
    flags = [f"--workdir={runs}/sft", "--tasks=xstest,advbench", "--count=6"]
    assert evaluate.main([*flags, "--max-new-tokens=4", f"--out={tmp_path}/out"]) == 0
    written = json.loads((tmp_path / "out/rates.json").read_text())
    assert {line["prompts"] for line in written["sets"]["advbench"]} == {6}
    assert "mean nothing" in written["warning"] and "mean nothing" in capsys.readouterr().out
    assert len(lines(tmp_path / "out/samples.jsonl")) == 12
    assert evaluate.main([f"--workdir={runs}/reward", flags[1], f"--out={tmp_path}/no"]) == 2
    assert "is no chat model" in capsys.readouterr().err


def test_the_report_has_what_was_sampled(chain):
    _, runs = chain
    kept = json.loads((runs / "ppo/evaluation.json").read_text())
    assert len(kept["frontier"]["kl"]) == 3 and abs(kept["frontier"]["kl"][0]) < 1e-6
    assert [a["step"] for a in kept["timeline"][0]["answers"]] == [0, 2, 4]
    view = kept["token_views"][0]
    assert len(view["tokens"]) == len(view["values"]["advantage"]) == len(view["values"]["value"])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("rollout:3", marks=pytest.mark.slow),
        pytest.param("scored:3", marks=pytest.mark.slow),
        "update:3",
        pytest.param("checkpoint:sealed:2", marks=pytest.mark.slow),
        pytest.param("evaluation:2", marks=pytest.mark.slow),
        pytest.param("evaluation:4", marks=pytest.mark.slow),
        pytest.param("summary", marks=pytest.mark.slow),
    ],
)
def test_killed_in_an_iteration_it_ends_with_the_same_bits(chain, fault):
    experiments, runs = chain
    there = runs.with_name(f"{runs.name}-{fault.replace(':', '-')}")
    for parent in ("pretrain", "sft", "reward"):
        shutil.copytree(runs / parent, there / parent)
    command = f"--config={experiments}/ppo.py", f"--workdir={there}/ppo"
    assert run_main(*command, fault=fault).returncode == -9
    assert not (there / "ppo/summary.json").exists()
    result = run_main(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = (load_params(path / "ppo/model")[0] for path in (there, runs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert timeless(there / "ppo") == timeless(runs / "ppo")
    for name in ("samples.jsonl", "timeline.jsonl", "views.jsonl", "evaluation.json"):
        assert (there / "ppo" / name).read_text() == (runs / "ppo" / name).read_text()


def test_a_mistake_in_the_last_evaluation_costs_no_training(tmp_path):
    """Its answers may be longer than those that are sampled on the way."""
    model, prompts = make_chat_model(tmp_path / "start"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Who?"}\n' * 4)
    config = defaults.on_policy(
        "grpo",
        data={"train": str(prompts), "validation": str(prompts)},
        rollout={"max_prompt_tokens": 16, "max_new_tokens": 8},
        reward={"scorers": "length"},
        eval={"source": str(prompts), "max_new_tokens": model.config.max_length},
    )
    with pytest.raises(UserError, match="leaves no held-out prompt room"):
        sampled.held_out_set(defaults.resolve(config), model)


@pytest.mark.parametrize("scorer", ["gold", "correct", "number", "math", "exact"])
def test_prompts_without_an_answer_cost_no_training(tmp_path, scorer):
    model, prompts = make_chat_model(tmp_path / "start"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1?", "answer": "2"}\n' * 5 + '{"prompt": "2 + 2?"}\n')
    config = defaults.on_policy(
        "grpo",
        data={"train": str(prompts), "validation": str(prompts)},
        rollout={"max_prompt_tokens": 16, "max_new_tokens": 8, "prompts": 2, "samples": 2},
        reward={"scorers": f"length,{scorer}"},
        eval={"source": str(prompts)},
    )
    with pytest.raises(UserError, match=rf"'{scorer}', prompt 'prompts.jsonl:6': .*error=mask"):
        sampled.training_prompts(defaults.resolve(config), model)
    config.reward.on_error = "mask"
    assert len(sampled.training_prompts(defaults.resolve(config), model)[0].records) == 6


@pytest.mark.slow
def test_killed_under_a_limit_it_ends_at_the_same_price(chain, tmp_path):
    experiments, runs = chain
    flags = "--config.lagrange.cost=over_refusal", "--config.lagrange.limit=0.01"
    for parent in ("pretrain", "sft", "reward"):
        shutil.copytree(runs / parent, tmp_path / parent)
    command = f"--config={experiments}/ppo.py", *flags
    result = run_main(*command, f"--workdir={tmp_path}/whole")
    assert result.returncode == 0, result.stderr[-2000:]
    assert run_main(*command, f"--workdir={tmp_path}/killed", fault="update:3").returncode == -9
    assert run_main(*command, f"--workdir={tmp_path}/killed").returncode == 0
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    prices = [line["objective/multiplier"] for line in lines(tmp_path / "whole/metrics.jsonl")]
    assert prices[0] == 1 and len({*prices}) > 1
    ours, theirs = (load_params(tmp_path / name / "model")[0] for name in ("killed", "whole"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_groups_a_mixed_in_text_and_dynamic_sampling(chain):
    experiments, runs = chain
    result = run_main(f"--config={experiments}/grpo.py", f"--workdir={runs}/grpo")
    assert result.returncode == 0, result.stderr[-2000:]
    logged = lines(runs / "grpo/metrics.jsonl")
    names = {"loss/ptx", "rewards/gold/std", "rollout/blocks", "frac_reward_zero_std", "reward_std"}
    assert all(names <= set(line) for line in logged)
    assert all(line["rollout/blocks"] in (1, 2) for line in logged)


@pytest.mark.slow
def test_an_ensemble_of_one_model_twice_scores_as_the_model(chain):
    experiments, runs = chain
    result = run_main(f"--config={experiments}/ensemble.py", f"--workdir={runs}/ensemble")
    assert result.returncode == 0, result.stderr[-2000:]
    (logged,) = lines(runs / "ensemble/metrics.jsonl")
    assert {"loss/kl", "rewards/model/mean"} <= set(logged)
    result = run_main(
        f"--config={experiments}/ensemble.py",
        f"--workdir={runs}/single",
        "--config.reward.ensemble=mean",
    )
    (single,) = lines(runs / "single/metrics.jsonl")
    assert logged["objective/scores"] == pytest.approx(single["objective/scores"], abs=1e-5)


JUDGE = """
from itertools import groupby

def judge(prompts, responses, ids):
    scores, sizes = [], set()
    for _, answers in groupby(zip(ids, responses, strict=True), key=lambda pair: pair[0]):
        answers = [text for _, text in answers]
        sizes.add(len(answers))
        scores += [sum(a > b for b in answers) / len(answers) for a in answers]
    assert sizes <= {1, 3}, sizes  # held-out prompts have one answer
    return scores
"""


@pytest.mark.slow
def test_online_pairs_labelled_by_a_judge_that_compares(chain, tmp_path):
    experiments, runs = chain
    (tmp_path / "judge.py").write_text(JUDGE)
    result = run_main(
        f"--config={experiments}/online.py",
        f"--workdir={runs}/online",
        f"--config.reward.scorers={tmp_path}/judge.py:judge",
        "--config.init.reward=",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    logged = lines(runs / "online/metrics.jsonl")
    assert {"pairs/tied", "rewards/margins", "objective/scores"} <= set(logged[-1])
    assert 0 < logged[-1]["objective/scores"] < 1
    assert "eval/gold_win_rate" in summary(runs / "online")


@pytest.mark.slow
def test_best_of_n_measures_and_trains(chain):
    experiments, runs = chain
    result = run_main(f"--config={experiments}/best_of_n.py", f"--workdir={runs}/best_of_n")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "best of 8: proxy" in result.stdout and "KL ≤ 1.20" in result.stdout
    metrics = summary(runs / "best_of_n")
    kept = json.loads((runs / "best_of_n/evaluation.json").read_text())
    frontier, gold = kept["frontier"], [metrics[f"eval/best_of_{n}/gold"] for n in (1, 2, 4, 8)]
    assert frontier["bound"] is True and frontier["gold"] == gold
    np.testing.assert_allclose(frontier["kl"], [np.log(n) - (n - 1) / n for n in (1, 2, 4, 8)])
    assert gold[(1, 2, 4, 8).index(metrics["eval/best_of_n/peak_n"])] == max(gold)


FUNCTIONS = """
import math, time

def good(prompts, responses, ids, **columns):
    return [len(r) / 10 for r in responses]

def raises(prompts, responses):
    raise RuntimeError("no such thing")

def nan(prompts, responses):
    return [math.nan] + [0.0] * (len(responses) - 1)

def none(prompts, responses):
    return [None] + [0.0] * (len(responses) - 1)

def short(prompts, responses):
    return [0.0]

def hangs(prompts, responses):
    time.sleep(600)

def training_only(prompts, responses):
    if len(responses) == 6:  # held-out prompts
        raise RuntimeError("no judge for these")
    return [len(r) / 10 for r in responses]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "no such thing"),
        pytest.param("nan", "heldout-", marks=pytest.mark.slow),
        pytest.param("none", "heldout-", marks=pytest.mark.slow),
        pytest.param("short", "returned 1 scores for", marks=pytest.mark.slow),
        pytest.param("hangs", "2 s", marks=pytest.mark.slow),
    ],
)
def test_a_reward_function_that_fails_ends_the_run_in_one_line(chain, tmp_path, name, message):
    experiments, runs = chain
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    result = run_main(
        f"--config={experiments}/ppo.py",
        f"--workdir={runs}/fails-{name}",
        f"--config.reward.scorers={file}:{name}",
        "--config.reward.timeout_seconds=2",
    )
    assert result.returncode == 2, result.stdout[-500:] + result.stderr[-2000:]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert name in error and message in error


PATIENT = """
import time
from pathlib import Path

calls = Path(__file__).with_name("calls")

def judge(prompts, responses):
    count = int(calls.read_text()) + 1
    calls.write_text(str(count))
    if count == 5:
        calls.with_name("hangs").touch()
        time.sleep(600)
    return [len(set(response)) / 10 for response in responses]
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["hangs", "raises"])
def test_a_stop_while_a_reward_function_hangs_or_raises_keeps_the_step_before(
    chain, tmp_path, ends
):
    """It is the third iteration's; the other calls are the evaluations' before and after two."""
    experiments, runs = chain
    file, calls, hangs = (tmp_path / name for name in ("patient.py", "calls", "hangs"))
    raised = PATIENT.replace("time.sleep(600)", "time.sleep(2); raise ValueError")
    file.write_text(PATIENT if ends == "hangs" else raised)

    def command(name):
        return (
            f"--config={experiments}/ppo.py", f"--workdir={runs}/{ends}-{name}",
            f"--config.reward.scorers={file}:judge", "--config.train.checkpoint_every=100",
        )  # fmt: skip

    calls.write_text("0")
    with started(*command("stopped")) as process:
        while not hangs.exists():
            assert process.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - began < 10, errors
    run = runs / f"{ends}-stopped"
    assert errors.splitlines()[-1].startswith(f"stopped: {run} is saved at step 2; ")
    result = run_main(*command("stopped"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "continuing after step 2" in result.stdout
    calls.write_text("100")
    assert run_main(*command("whole")).returncode == 0
    whole = runs / f"{ends}-whole"
    assert timeless(run) == timeless(whole)
    for name in ("views.jsonl", "timeline.jsonl", "histograms.json"):
        assert (run / name).read_text() == (whole / name).read_text()


@pytest.mark.slow
def test_a_reward_function_of_ones_own_and_masked_failures(chain, tmp_path):
    experiments, runs = chain
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    result = run_main(
        f"--config={experiments}/ppo.py",
        f"--workdir={runs}/mine",
        f"--config.reward.scorers={file}:good=1,{file}:nan=0.5",
        "--config.reward.on_error=mask",
        "--config.train.steps=1",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (logged,) = lines(runs / "mine/metrics.jsonl")
    assert logged["completions/masked"] == 1 and logged["rewards/failures"] == 1


@pytest.mark.slow
def test_why_rewards_failed_stands_in_the_console_and_in_the_run(chain, tmp_path):
    experiments, runs = chain
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    result = run_main(
        f"--config={experiments}/ppo.py",
        f"--workdir={runs}/unjudged",
        f"--config.reward.scorers={file}:training_only",
        "--config.reward.on_error=mask",
        "--config.train.steps=2",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("RuntimeError: no judge for these (") == 1
    kept = json.loads((runs / "unjudged/reward_failures.json").read_text())
    ((reason, failed),) = kept.items()
    assert reason == f"{file}:training_only: raised" and "no judge for these" in failed["first"]
    assert failed["count"] == 12  # the evaluations before and after
    for logged in lines(runs / "unjudged/metrics.jsonl"):
        assert "eval/proxy_reward" not in logged and logged["rewards/failures"] == 0
        assert logged["rewards/total/mean"] > 0


@pytest.mark.slow
def test_a_run_whose_rewards_all_fail_names_them_and_its_iterations(chain, tmp_path):
    experiments, runs = chain
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    result = run_main(
        f"--config={experiments}/ppo.py",
        f"--workdir={runs}/unscored",
        f"--config.reward.scorers={file}:raises",
        "--config.reward.on_error=mask",
    )
    assert result.returncode == 2, result.stderr[-2000:]
    said = "error: steps 1 to 2 end in 8 skipped updates, which left the parameters as they were: "
    assert f"{said}nothing in them has weight (rewards/failures = 8" in result.stderr
    (logged,) = lines(runs / "unscored/metrics.jsonl")
    assert not any(n.startswith(("rewards/total", "policy/", "val/mean")) for n in logged)


def test_a_truncated_distribution_is_refused_before_the_parents_run(experiments, tmp_path):
    result = run_main(
        f"--config={experiments}/ppo.py",
        f"--workdir={tmp_path}/runs/ppo",
        "--config.rollout.top_p=0.9",
    )
    assert result.returncode == 2
    assert "the policy stage has no rollout.top_p" in result.stderr
    assert not (tmp_path / "runs/sft").exists()


def samples(lengths, each):
    """Prompts of 3 tokens with answers of given lengths."""
    count = len(lengths) // each
    records = [Prompt(str(i), (Message("user", "x"),)) for i in range(count)]
    prompts = PromptSet(records, [[1, 2, 3]] * count)
    answers = [Completion(list(range(10, 10 + n)), np.zeros(n, np.float32), True) for n in lengths]
    return Rollout.of(prompts, answers, [""] * len(answers), 6)


def test_every_sampled_token_has_its_slot():
    lengths = [1, 5, 3, 4, 2, 2, 6, 1]
    rows = pack_rows(samples(lengths, 4), row_length=32, max_prompt=3, multiple=4, shortest=8)
    assert len(rows["tokens"]) % 4 == 0
    found = {}
    for row in range(len(rows["members"])):
        for s, member in enumerate(rows["members"][row]):
            used = rows["mask"][row, s] > 0
            if member < 0:
                assert not used.any()
                continue
            slots = rows["slots"][row, s][used]
            assert (rows["weights"][row, slots] == 1).all()
            found[int(member)] = rows["targets"][row, slots].tolist()
    assert found == {n: list(range(10, 10 + length)) for n, length in enumerate(lengths)}
    assert rows["mask"].sum() == rows["weights"].sum() == sum(lengths)


def pairs_of(answers, scores):
    """The rows of pairs, two at a time, and how many prompts had none."""
    weights = np.ones(len(scores), np.float32)
    scored = dataclasses.replace(answers, scores=np.array(scores), weights=weights)
    config = defaults.online_preference(data={"row_length": 32})
    return pack_best_and_worst(defaults.resolve(config), scored, 2)


def test_the_best_and_the_worst_answer_make_a_pair():
    rows, tied = pairs_of(samples([1, 2, 3, 4, 5, 6], 3), [0.5, 0.1, 0.9, 1.0, 1.0, 1.0])
    assert tied == 1
    (place,) = np.argwhere(rows["valid"] > 0)
    assert rows["lengths"][tuple(place)].tolist() == [3, 2]


def test_answers_of_the_same_tokens_make_no_pair():
    rows, tied = pairs_of(samples([3, 2, 3, 1, 2, 3], 3), [1.0, 0.5, 0.0, 1.0, 0.5, 0.0])
    assert tied == 1 and rows["example_ids"][rows["valid"] > 0].tolist() == [1]


def judged(caplog, *scored):
    """What is warned of when a scorer says so of (answers' lengths, answers to each prompt)."""
    config = ConfigDict(
        {
            "reward": {"scorers": "length=0.5", "normalize": False, "pattern": ""}
            | {"timeout_seconds": 1.0, "on_error": "fail"}
        }
    )
    with Judge(config, {}, None) as judge:
        for lengths, each in scored:
            judge.score(samples(lengths, each))
        early = len(caplog.records)
    return [record.getMessage() for record in caplog.records], early


@pytest.mark.parametrize(
    ("scored", "warning", "early"),
    [
        ([([1] * 60, 1), ([1] * 60, 2)], "all 60 answers score 0.5 so far", 1),
        ([([1] * 20, 1), ([1] * 20, 4)], "all 40 answers score 0.5 so far", 1),
        ([([1] * 4, 2), ([1] * 4, 1)], "all 8 answers score 0.5 so far", 0),
        ([([1, 1, 2, 2] * 8, 2)], "all 32 answers score as the others to their prompt so far", 1),
        ([([1] * 29, 1), ([2], 1)], None, 0),
        ([([1] * 28, 2), ([1, 2], 2), ([1] * 60, 2)], None, 0),
        ([([1], 1)], None, 0),
    ],
)
def test_a_reward_that_prefers_nothing_is_warned_of_once(caplog, scored, warning, early):
    messages, found = judged(caplog, *scored)
    assert [m.split("reward: ")[1].split(":")[0] for m in messages] == (
        [warning] if warning else []
    )
    assert found == early


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["online", "best_of_n", "ensemble"])
def test_a_constant_reward_is_one_warning_on_the_console(chain, tmp_path, stage):
    experiments, runs = chain
    (tmp_path / "constant.py").write_text(
        "def score(prompts, responses):\n    return [1.0] * len(responses)\n"
    )
    there = tmp_path / "runs"
    for parent in ("pretrain", "sft", "reward"):
        shutil.copytree(runs / parent, there / parent)
    result = run_main(
        f"--config={experiments}/{stage}.py", f"--workdir={there}/{stage}",
        f"--config.reward.scorers={tmp_path}/constant.py:score",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("ties teach nothing") == 1
    assert "warning: reward: all " in result.stderr and "answers score 1 so far" in result.stderr


def test_the_first_evaluation_is_read_back_by_the_same_run_only(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sampled, "evaluate", lambda *_: made.append(1) or {"eval/kl": len(made)})

    def first(count):
        with RunDirectory(tmp_path, {"eval": {"count": count}}) as run:
            return sampled.first_evaluation(None, run, None, None, None)["eval/kl"]

    assert [first(8), first(8), first(9), first(9)] == [1, 1, 2, 2]
    for text, said in {
        "[]": "must hold a JSON object",
        '{"metrics": {}}': "has no config_hash",
    }.items():
        (tmp_path / "before.json").write_text(text)
        with pytest.raises(UserError, match=rf"before\.json .*{said}"):
            first(9)


def test_a_damaged_line_of_the_timeline_costs_that_step(tmp_path, caplog):
    asked = Prompt("1", (Message("user", "Why?\u2028\x85"),), {})
    answers = Rollout.of(PromptSet([asked], [[1]]), [], ["So."], 1)
    for step in (0, 2, 4):
        sampled.keep_timeline(tmp_path, step, answers, {"proxy": np.ones(1)})
    path = tmp_path / "timeline.jsonl"
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"step": 2, "prom\n' + last)
    (tmp_path / "views.jsonl").write_text("{}\n")
    evaluations = [{"eval/kl": 0.0}, *({"step": step, "eval/kl": 0.0} for step in (2, 4))]
    report = sampled.report_of(tmp_path, evaluations)
    (entry,) = report["timeline"]
    assert [answer["step"] for answer in entry["answers"]] == [0, 4]
    assert report["token_views"] == []
    assert len(caplog.messages) == 2 and all("the first is line" in m for m in caplog.messages)
    sampled.keep_timeline(tmp_path, 4, answers, {"proxy": np.ones(1)})
    assert path.read_bytes() == first + last
    path.write_text("{")
    assert sampled.report_of(tmp_path, evaluations)["timeline"] == []


def test_answers_to_other_prompts_are_of_another_evaluation(tmp_path):
    one, two = (
        Rollout.of(PromptSet(asked, [[1]] * len(asked)), [], ["So."] * len(asked), 1)
        for asked in ([PROMPTS[0]], PROMPTS)
    )
    for step, answers in ((0, one), (2, one), (4, one), (0, two), (2, two), (4, two)):
        sampled.keep_timeline(tmp_path, step, answers, {"proxy": np.ones(len(answers.texts))})
    # The same first prompts of more: step 2 is of an evaluation that has no line any more.
    evaluations = [{"eval/kl": 0.0}, {"step": 4.0, "eval/kl": 0.0}]
    timeline = sampled.report_of(tmp_path, evaluations)["timeline"]
    assert [[each["step"] for each in entry["answers"]] for entry in timeline] == [[0, 4]] * 2


def test_evaluating_again_the_environment_answers(tmp_path, monkeypatch):
    seen = []

    def evaluated(config, out, model, before, held_out, *others):
        seen.append(held_out.environments)
        return {}

    monkeypatch.setattr(sampled, "held_out_set", lambda *_: PromptSet([], []))
    monkeypatch.setattr(sampled, "evaluate", evaluated)
    for name in ("reward_changes", "report_of"):
        monkeypatch.setattr(sampled, name, lambda *_: {})
    monkeypatch.setattr(judge, "Judge", lambda *_: nullcontext())
    monkeypatch.setattr(trajectories, "environments_of", nullcontext)
    evaluate._sampled(SimpleNamespace(environment="mine"), None, None, {}, tmp_path)
    assert seen == ["mine"] * 2
