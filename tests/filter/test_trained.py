"""What a trained town's perplexity and reward model tell of defects that no rule finds."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from rlhf_jax.data.records import Message
from rlhf_jax.evaluation.statistics import auc
from rlhf_jax.filter.models import perplexities, scores, unlikely
from rlhf_jax.filter.records import Item
from rlhf_jax.filter.texts import Band
from rlhf_jax.training.saved_model import load_model
from tests.filter.defects import clean_records

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("garbled", "wrong", "rude")


def trained(folder: Path) -> tuple[str, str]:
    """The runs of a town's fine-tuned model and reward model."""
    policy: tuple[str, ...] = ()
    for stage in ("pretrain", "sft", "reward"):
        command = ["-m", "rlhf_jax.main", f"--config=experiments/{stage}.py", *policy]
        evaluated = ["--config.eval.count=8"] if stage == "sft" else []
        run = [sys.executable, *command, *evaluated, f"--workdir={folder / stage}"]
        subprocess.run(run, cwd=ROOT, check=True)
        policy = (f"--config.init.policy={folder / stage}",)
    return str(folder / "sft"), str(folder / "reward")


def spoilt(count: int, each: int) -> list[tuple[Item, str]]:
    """Right answers, then `each` with words out of order, to another question, or made rude."""
    random, records = Random(0), clean_records(count)
    made = [(Item(record, "town", n), "") for n, record in enumerate(records)]
    for n in range(each):
        words = records[n].messages[-1].content.split()
        other = records[n + each].messages[-1].content
        random.shuffle(words)
        rude = f"{records[n].messages[-1].content} Now shut up."
        for text, defect in ((" ".join(words), "garbled"), (other, "wrong"), (rude, "rude")):
            turns = (*records[n].messages[:-1], Message("assistant", text))
            made.append((Item(dataclasses.replace(records[n], messages=turns), "town", n), defect))
    return made


def measure(language: str, reward: str) -> dict[str, float]:
    """AUCs of right answers against defects, and what a band finds of the first two kinds."""
    items, defects = map(list, zip(*spoilt(1_000, 50), strict=True))
    kinds, found = np.array(defects), {}
    values = {
        "perplexity": -perplexities(items, load_model(language)),
        "reward": scores(items, reward),
    }
    for name, given in values.items():
        for kind in KINDS:
            found[f"{name}/{kind}"] = auc(given[kinds == ""], given[kinds == kind])
    gone = unlikely(items, Band("", "91%"), language)
    hits = sum(defects[index] in KINDS[:2] for index in gone)
    return found | {"precision": hits / len(gone), "recall": hits / 100}


@pytest.mark.slow
def test_perplexity_and_a_reward_model_tell_right_answers_from_defects(tmp_path):
    found = measure(*trained(tmp_path))
    for name, value in found.items():
        print(f"{name:20} {value:.3f}")
    assert found["perplexity/garbled"] > 0.95 and found["perplexity/wrong"] > 0.95
    assert min(found["precision"], found["recall"]) > 0.7
    # The reward model, right on 70 % of pairs, hardly tells these from right ones.
    assert all(found[f"reward/{kind}"] < found[f"perplexity/{kind}"] for kind in KINDS)
