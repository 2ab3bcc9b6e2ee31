"""A run directory as a DPO run leaves it, with the SFT and pre-training runs it came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import (
    accuracy_by_bins,
    calibration,
    preference_confidence,
    win_rate,
)
from rlhf_jax.report.report import write_report

ATTACK = '</div><script>document.title="owned"</script><img src=x onerror="alert(1)">'
COMPONENTS = ["correct", "polite", "brief", "safe", "format"]
SAMPLES = [
    ("What does Mara Lindqvist do for a living?", "mara lindqvist lives on Elm Street and",
     "Mara Lindqvist is a baker. She has a dog and she likes the market and she is a baker.",
     "Mara Lindqvist is a baker."),
    ("How much are three pears at the corner shop?", "pears are 4 coins. get lost.",
     "A pear costs 4 coins, so three pears cost 12 coins.", "Three pears cost 12 coins."),
    ("Answer in one word: which colour is Tobias Renn's door?", "the door of tobias renn is",
     "Tobias Renn's door is green.", "Green."),
    (ATTACK, "what do you want", "I am sorry, I do not understand that. ${7*7} {{7*7}}",
     "I do not understand that. Could you say it another way?"),
    ([{"role": "user", "content": "My name is Ilse."},
      {"role": "assistant", "content": "Nice to meet you, Ilse."},
      {"role": "user", "content": "What is my name?"}], "", "Your name is Ilse. Nice to meet you.",
     "Your name is Ilse."),
]  # fmt: skip


def write(directory: Path, name: str, value) -> None:
    lines = value if isinstance(value, list) else [value]
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def records(steps: int, start: float, end: float, rng, every: int = 10) -> list[dict]:
    result = []
    for step in range(every, steps + 1, every):
        noise = 1 + 0.02 * rng.standard_normal()
        record = {
            "step": step,
            "train/loss": (end + (start - end) * np.exp(-5 * step / steps)) * noise,
            "train/learning_rate": 3e-3 * min(1, 10 * step / steps) * (1 - 0.9 * step / steps),
            "train/grad_norm": 0.4 + 2 * np.exp(-8 * step / steps) + 0.1 * rng.random(),
            "time/tokens_per_second": 31000 + 900 * rng.standard_normal(),
        }
        if step % (10 * every) == 0:
            record["eval/loss"] = record["train/loss"] / noise * 1.03
        result.append(record)
    return result


def write_parents(runs: Path, rng) -> None:
    for name, parents, steps, losses, metrics in (
        ("pretrain", {}, 2400, (6.9, 1.45), {"eval/loss": 1.491, "eval/bpb": 0.913}),
        ("sft", {"policy": str(runs / "pretrain")}, 1200, (2.1, 0.21),
         {"eval/loss": 0.233, "eval/token_accuracy": 0.931}),
    ):  # fmt: skip
        directory = runs / name
        directory.mkdir()
        write(directory, "config.json", {"stage": name, "seed": 0, "train": {"steps": steps}})
        write(directory, "metrics.jsonl", records(steps, *losses, rng))
        if name == "sft":
            gold = dict(zip(COMPONENTS, (0.931, 0.62, 0.31, 0.874, 0.71), strict=True))
            metrics |= {"eval/gold_reward": 0.689, "eval/response_length": 17.4}
            metrics |= {f"eval/gold_reward/{k}": v for k, v in gold.items()}
        write(directory, "summary.json", {
            "stage": name, "status": "done", "parents": parents, "wall_seconds": steps / 21,
            "config_hash": {"pretrain": "3d9a6b10c2f7", "sft": "a81f4e77b093"}[name],
            "metrics": metrics | {"train/tokens_per_second": 30871.2},
        })  # fmt: skip


def token_views() -> list[dict]:
    tokens = ["Three", " pears", "\n", "</span><script>x()</script>", ' "cost"', "]]>", "\x1b[0m"]
    return [
        {"title": "dpo, the best answer", "prompt": SAMPLES[1][0], "tokens": tokens,
         "values": {"advantage": [0.5, -1.0, None, 0.0, 2.0, "NaN", -0.25],
                    "kl": [0.0] * len(tokens)}},
        {"title": ATTACK, "prompt": SAMPLES[4][0], "tokens": ["Ilse"],
         "values": {"advantage": [-4.0], '<b>"q': [1.0]}},
    ]  # fmt: skip


def evaluation(rng) -> dict:
    margins = rng.normal(0.9, 1.2, 400)
    length = rng.integers(-30, 31, 400)
    by_length = accuracy_by_bins(
        length, margins > 0, [-20.5, -10.5, -5.5, -0.5, 0.5, 5.5, 10.5, 20.5]
    )
    gold = {
        "pretrain": [0.08, 0.11, 0.55, 0.48, 0.12],
        "sft": [0.931, 0.62, 0.31, 0.874, 0.71],
        "dpo": [0.938, 0.91, 0.83, 0.952, 0.93],
    }
    others = {
        name: {f"gold_reward/{k}": x for k, x in zip(COMPONENTS, values, strict=True)}
        for name, values in gold.items()
    }
    others["pretrain"]["gold_reward"] = 0.268
    return {
        "others": others,
        "token_views": token_views(),
        "timeline": [
            {"prompt": SAMPLES[4][0], "answers": [
                {"step": 0, "text": "", "scores": {"gold": 0.1}},
                {"step": 1200, "text": f"Ilse. {ATTACK} ]]>", "scores": {"gold": 0.9, "kl": "NaN"}},
            ]},
            {"prompt": ATTACK, "answers": [{"step": 5, "text": "two\nlines"}]},
        ],
        "plots": [
            {"kind": "grouped_bars", "section": "changes", "title": "Gold reward by component",
             "groups": COMPONENTS, "series": gold, "ylabel": "mean over prompts",
             "note": "300 held-out prompts."},
            {"kind": "reliability", "title": "Reliability of the implicit reward",
             **dataclasses.asdict(calibration(*preference_confidence(margins)))},
            {"kind": "binned_accuracy", "title": "Accuracy by length difference",
             "xlabel": "chosen − rejected, tokens", **dataclasses.asdict(by_length)},
            {"kind": "histogram", "title": "Implicit rewards", "xlabel": "nats",
             "values": {"chosen": rng.normal(0.5, 0.8, 400).tolist(),
                        "rejected": rng.normal(-0.4, 0.9, 400).tolist()}},
        ],
        "tables": [
            {"title": "By task family", "columns": ["family", "prompts", "gold", "exact"],
             "rows": [["facts", 60, 0.958, 0.95], ["prices", 60, 0.911, 0.883],
                      ["one word", 40, 1.0, None], ["<b>small talk</b>", 12, -0.052, 0.5]],
             "note": "Held-out people and phrasings only."},
        ],
    }  # fmt: skip


@pytest.fixture
def dpo_run(tmp_path: Path) -> Path:
    """The run directory `dpo` in `tmp_path`, its parents beside it; summary.json included."""
    return write_runs(tmp_path)


@pytest.fixture
def bare_run(dpo_run: Path) -> Path:
    """`dpo_run` without its own figures, which take a second to draw."""
    (dpo_run / "metrics.jsonl").unlink()
    (dpo_run / "evaluation.json").unlink()
    return dpo_run


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of such a run, which no test may change."""
    return write_report(write_runs(tmp_path_factory.mktemp("runs")))


def write_runs(runs: Path) -> Path:
    rng = np.random.default_rng(0)
    write_parents(runs, rng)
    run = runs / "dpo"
    run.mkdir()
    write(run, "config.json", {
        "stage": "preference", "seed": 0, "init": {"policy": "experiments/sft.py"},
        "loss": {"name": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
        "train": {"steps": 600, "batch_rows": 16, "learning_rate": 5e-4, "schedule": "cosine"},
        "note": "<script>alert(2)</script>", "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    })  # fmt: skip
    metrics = records(600, 0.69, 0.35, rng)
    for r in metrics:
        fraction = r["step"] / 600
        r["rewards/chosen"] = 0.3 * fraction + 0.05 * rng.standard_normal()
        r["rewards/rejected"] = -1.1 * fraction + 0.05 * rng.standard_normal()
        r["rewards/margins"] = r["rewards/chosen"] - r["rewards/rejected"]
        r["rewards/accuracies"] = 0.5 + 0.3 * (1 - np.exp(-6 * fraction))
        r["logps/chosen"] = -21 + 3 * fraction + 0.2 * rng.standard_normal()
        r["logps/rejected"] = -27 - 11 * fraction + 0.2 * rng.standard_normal()
    metrics[20]["train/loss"] = "NaN"
    write(run, "metrics.jsonl", metrics)
    samples = [
        {"prompt": p, "responses": {"pretrain": base, "sft": sft, "dpo": dpo},
         "scores": {"pretrain": 0.1, "sft": 0.7, "dpo": 0.95}}
        for p, base, sft, dpo in SAMPLES * 3
    ]  # fmt: skip
    samples[-1]["scores"] = {"pretrain": 0.1, "sft": 0.7, "dpo": 0.2}
    write(run, "samples.jsonl", samples)
    write(run, "evaluation.json", evaluation(rng))
    gold = dict(zip(COMPONENTS, (0.938, 0.91, 0.83, 0.952, 0.93), strict=True))
    rate = win_rate(rng.normal(0.9, 1, 300), rng.normal(0, 0.5, 300))
    write(run, "summary.json", {
        "stage": "preference", "status": "done", "config_hash": "0c55e2d4f1a8",
        "parents": {"policy": str(runs / "sft")},
        "wall_seconds": 74.2,
        "command": "python -m rlhf_jax.main --config=experiments/dpo.py",
        "environment": {"python": "3.11.15", "jax": "0.10.2", "flax": "0.12.8", "cores": "2"},
        "metrics": {
            "eval/gold_reward": 0.914, **{f"eval/gold_reward/{k}": v for k, v in gold.items()},
            "eval/gold_win_rate": rate.rate, "eval/gold_win_rate_low": rate.low,
            "eval/gold_win_rate_high": rate.high, "eval/accuracy": 0.7825,
            "eval/accuracy_low": 0.7394, "eval/accuracy_high": 0.8202, "eval/ece": 0.041,
            "eval/kl": 6.31, "eval/response_length": 8.2, "eval/eos_rate": 0.997,
            "train/tokens_per_second": 12480.3, "before/gold_reward": 0.689,
            "change/gold_reward": 0.225, "change/gold_reward_low": 0.2009,
            "change/gold_reward_high": 0.249, "change/gold_reward_records": 300.0,
        },
    })  # fmt: skip
    return run


def write_rl_runs(runs: Path) -> list[Path]:
    """Run directories of PPO (its gold falls in the end), GRPO without gold, DPO and best of n."""
    rng = np.random.default_rng(1)
    shared = {"model": {"layers": 4}, "train": {"steps": 100}}
    samples = [
        {"prompt": prompt, "responses": {"sft": sft, "own": f"{own} ]]>"}, "scores": {"own": 0.5}}
        for prompt, _, sft, own in SAMPLES
    ]
    steps = range(0, 101, 10)
    ppo, grpo = (
        [{"step": step, "objective/scores": 0.01 * step, "objective/kl": 0.09 * step,
          "policy/clipfrac": 0.1 * rng.random(), "rewards/correct/mean": 0.5} for step in steps]
        for _ in range(2)
    )  # fmt: skip
    for record in ppo:
        at = record["step"] / 100
        record |= {"eval/kl": 9 * at, "eval/gold_reward": 0.9 - (at - 0.6) ** 2}
        record |= {"eval/proxy_reward": at}
    ppo[3]["eval/gold_reward"] = "NaN"
    for record in grpo[::5]:
        record |= {"eval/kl": 0.05 * record["step"], "eval/proxy_reward": 0.01 * record["step"]}
    gold = {
        "eval/gold_win_rate": 0.7,
        "eval/gold_win_rate_low": 0.6,
        "eval/gold_win_rate_high": 0.8,
    }
    final = {"eval/kl": 4.0, "eval/gold_reward": 0.8, "eval/response_length": 8.25}
    tuned = {"eval/kl": 6.5, "eval/kl_low": 6.0, "eval/kl_high": 7.0, "eval/gold_reward": 0.65,
             "eval/response_length": 7.5, "eval/best_of_4/gold": 0.4}  # fmt: skip
    best = {"kl": [0, 0.19, 1.2], "gold": [0.1, 0.5, 0.4], "proxy": [0.1, 0.5, 0.9], "bound": True}
    made = {
        "ppo": (
            {"loss": {"cliprange": 0.2}, "note": ATTACK},
            ppo,
            {"eval/kl": 9.5, "eval/gold_reward": 0.8, **gold},
            {},
        ),
        "grpo": ({"loss": {"group": 8}, "note": "plain"}, grpo, {}, {}),
        "dpo": ({"loss": {"beta": 0.1}, "note": "plain"}, [{"step": 60}], final, {}),
        "best_of_n": ({"loss": {}, "note": "plain"}, [], tuned, {"frontier": best}),
    }
    for name, (config, records, metrics, evaluation) in made.items():
        directory = runs / name
        directory.mkdir()
        write(directory, "config.json", {"stage": name, **shared, **config})
        write(directory, "metrics.jsonl", records)
        write(directory, "evaluation.json", evaluation)
        write(directory, "summary.json", {"stage": name, "wall_seconds": 75, "metrics": metrics})
        write(directory, "samples.jsonl", samples if name != "dpo" else samples[1:])
    return [runs / name for name in made]


@pytest.fixture
def rl_runs(tmp_path: Path) -> list[Path]:
    """The run directories of `write_rl_runs`."""
    return write_rl_runs(tmp_path)
