"""How many gold labels a judge's label is worth: reward models from both, told right by gold order.

Two answers of a policy to each of many prompts are labelled by gold and by the judge. From the
first n labels of either a reward model is trained, in as many steps, for several n and with several
seeds, which draw the prompts and the answers too. Accuracy on held-out pairs in the order of gold
is taken to grow with the logarithm of n:

    accuracy(gold, n) = a + b log₂ n        accuracy(judge, n) = a + b log₂ (n · worth)

so that log₂ worth is a difference of accuracies over the slope b. Both are known of each seed; the
interval of their ratio is Fieller's, which has no end where b may be 0.

Some Problems in Interval Estimation (Fieller, 1954), https://www.jstor.org/stable/2984043
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_jsonl
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import Judge, SimulatedJudge
from rlhf_jax.judges.labels import label
from rlhf_jax.judges.sampled import Pairs
from rlhf_jax.label.files import Line
from rlhf_jax.stages import defaults, reward
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.start import load_start
from rlhf_jax.stopping import stop_point
from rlhf_jax.sweep.statistics import Estimate, estimate
from rlhf_jax.training.learner import make_learner

GOLD = Principle("gold", "", "", "", "total")


class Ratio(NamedTuple):
    """A ratio with its 95 % interval, whose ends may be infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Worth:
    """What labels came to, over counts and seeds.

    Attributes:
        counts: of labels, [C].
        gold, judge: accuracies by gold order of reward models from so many, [C, S].
    """

    counts: Sequence[int]
    gold: np.ndarray
    judge: np.ndarray

    @property
    def each(self) -> list[Ratio]:
        """How many gold labels a label of the judge is worth, at each count."""
        logs = np.log2(self.counts)
        slopes = np.polyfit(logs, self.gold, 1)[0]
        line = self.gold.mean(0) + slopes * (logs - logs.mean())[:, None]
        return [_power_of_two(fieller(gap, slopes)) for gap in self.judge - line]

    @property
    def whole(self) -> Ratio:
        """The same over all counts."""
        slopes = np.polyfit(np.log2(self.counts), self.gold, 1)[0]
        return _power_of_two(fieller((self.judge - self.gold).mean(0), slopes))

    def estimates(self) -> list[tuple[int, Estimate, Estimate]]:
        """(count, accuracy from gold labels, from the judge's) of each count."""
        both = zip(self.counts, self.gold, self.judge, strict=True)
        return [(count, estimate(gold), estimate(judge)) for count, gold, judge in both]

    def to_json(self) -> dict[str, Any]:
        """All numbers; an end of an interval that there is not is None."""
        found = {"all": self.whole, **dict(zip(map(str, self.counts), self.each, strict=True))}
        return {
            "counts": [*self.counts],
            "accuracy": {"gold": self.gold.tolist(), "judge": self.judge.tolist()},
            "worth": {
                name: [value if abs(value) < inf else None for value in ratio]
                for name, ratio in found.items()
            },
        }


def fieller(above: np.ndarray, below: np.ndarray) -> Ratio:
    """The ratio of two means over the same S seeds, with its 95 % interval.

    It has every ρ for which mean(above − ρ · below) may be 0 by Student's t; where that is not an
    interval, since the mean of `below` may be 0, all numbers.

    Args:
        above, below: [S].
    """
    seeds = len(above)
    reach = float(stdtrit(seeds - 1, 0.975)) ** 2 / seeds
    (upper, both), (_, lower) = np.cov(above, below)
    x, y = float(above.mean()), float(below.mean())
    # (x − ρ y)² ≤ reach · var(above − ρ · below) is a ρ² − 2 h ρ + c ≤ 0.
    a, h, c = y**2 - reach * lower, x * y - reach * both, x**2 - reach * upper
    if a <= 0:
        return Ratio(x / y if y else inf, -inf, inf)
    root = sqrt(max(0.0, h * h - a * c))
    return Ratio(x / y, (h - root) / a, (h + root) / a)


def _power_of_two(ratio: Ratio) -> Ratio:
    return Ratio(*(inf if value > 1000 else 2.0**value for value in ratio))


def label_both(
    judge: Judge, pairs: Pairs, principles: Sequence[Principle], count: int
) -> tuple[list[Line], list[Line]]:
    """The first `count` pairs that both label: (as gold has them, as the judge has them).

    Raises:
        UserError: there are fewer.
    """
    known = [
        {line["pair"]: line for line in label(each, name, pairs, under, 0)[0] if "tie" not in line}
        for each, name, under in ((SimulatedJudge(), "gold", [GOLD]), (judge, "judge", principles))
    ]
    shared = [pair for pair in known[0] if pair in known[1]]
    if len(shared) < count:
        raise UserError(
            f"--counts: of {len(pairs.of)} pairs gold and the judge both prefer a side of "
            f"{len(shared)}, fewer than {count}; sample more with --count"
        )
    return [known[0][pair] for pair in shared[:count]], [known[1][pair] for pair in shared[:count]]


def accuracies(
    folder: Path, labels: Mapping[str, Sequence[Line]], counts: Sequence[int], config: Config
) -> dict[str, list[float]]:
    """{whose labels: accuracy of a reward model from the first n of them, for each count n}.

    Args:
        folder: where the labels are written, as files that `reward.py:own` reads too.
        config: of the reward stage; `data.train` is set here.
    """
    policy = load_start(config, Path(config.init.policy))
    learner, evaluate = None, None
    found: dict[str, list[float]] = {}
    for name, lines in labels.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
        found[name] = []
        for count in counts:
            stop_point()
            data = dataclasses.replace(config.data, train=f"{folder}/{name}.jsonl[:{count}]")
            trained = reward.training(dataclasses.replace(config, data=data), policy, {})
            if learner is None or evaluate is None:
                evaluate = reward.evaluation(config, trained.model)
                learner = make_learner(
                    config, config.optimizer, trained.model.params, trained.loss_fn,
                    updates=config.train.steps,
                )  # fmt: skip
            state = learner.init()
            for _ in range(config.train.steps):
                state, _ = learner.step(state, next(trained.batches.iterator))
            found[name].append(evaluate(learner.params(state)).metrics["eval/accuracy"])
            print(f"{name}, {count} labels: {found[name][-1]:.3f}", flush=True)
    return found


def reward_config(policy: str, data: str, seed: int, steps: int) -> Config:
    """The reward stage of experiments/reward.py on a policy, with so many steps of 8 rows."""
    config = load_config("reward")
    config.seed = seed
    sections: dict[str, dict[str, Any]] = {
        "init": {"policy": policy},
        "data": {"train": data, "validation": data, "row_length": 224},
        "batch": {"rows": 8},
        "train": {"steps": steps},
    }
    return defaults.resolve(defaults.lay(config, sections))


def table(worth: Worth) -> tuple[Sequence[str], list[list[str]]]:
    """(columns, rows) of it, a row a count."""
    columns = ("labels", "from gold", "95 %", "from the judge", "95 %", "a label is worth", "95 %")
    rows = []
    for (count, gold, judge), ratio in zip(worth.estimates(), worth.each, strict=True):
        told = [f"{count:,}"]
        for each in (gold, judge):
            told += [f"{each.mean:.3f}", f"{each.low:.3f} to {each.high:.3f}"]
        rows.append([*told, f"{ratio.value:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"])
    return columns, rows
