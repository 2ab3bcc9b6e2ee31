"""A sweep whose task has a trade-off: its points, and which lie above the curve of their starts.

The curve of the starts is the largest share of gain that the models which the runs started from
reach at each share of cost, also mixed: whoever answers each prompt by one of two models at random
has any point between theirs. With (0, 0), of safety a model that refuses nothing, and (1, 1), one
that refuses everything, it is the upper hull of their points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.files import read_object
from rlhf_jax.report.run_files import read_samples
from rlhf_jax.tasks.builders import task_of
from rlhf_jax.tasks.sources import parse_source
from rlhf_jax.tasks.task import Tradeoff
from rlhf_jax.training.rundir import CONFIG
from rlhf_jax.training.summary import read_summary

RESAMPLES = 2000
Outcomes = Mapping[tuple[str, str], np.ndarray]
"""By share (`cost` or `gain`) and kind: whether the reply to each of N prompts counts, [N]."""


@dataclass(frozen=True)
class Setting:
    """Models of one setting, by seed; `helpful` is by kind and seed.

    Runs that started from one and the same model have the same object for each of their seeds.
    """

    arm: str
    name: str
    seeds: Mapping[int, Outcomes]
    helpful: Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Curve:
    """The settings of a sweep, after those that they started from."""

    tradeoff: Tradeoff
    settings: Sequence[Setting]

    @property
    def shares(self) -> tuple[str, str]:
        """The names of the two shares, what is paid first."""
        return self.tradeoff.cost, self.tradeoff.gain

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the rows of `table`."""
        told = [f"{share} {self.tradeoff.what}" for share in self.shares]
        return ("cell", "kind", *told, "curve there", "above", "95 %")


def read_curve(runs: Mapping[str, Mapping[int, Path]]) -> Curve | None:
    """That of a sweep's runs; None where their task has none, or a run lacks what it is made of.

    It is made of replies to the trade-off's prompts, the run's own and those of the policy before,
    and has the kinds of which every run was asked prompts of both shares.

    Args:
        runs: {cell: {seed: directory}} of finished runs.
    """
    starts: dict[str, tuple[dict, dict]] = {}
    known: dict[str, Outcomes] = {}
    tuned, tradeoff = [], None
    for cell, seeds in runs.items():
        own: tuple[dict, dict] = ({}, {})
        for seed, run in seeds.items():
            tradeoff = _tradeoff_of(run)
            start = Path(read_summary(run)["parents"].get("policy", "")).name
            if tradeoff is None or not start:
                return None
            of_start = starts.setdefault(start.partition(",seed=")[0], ({}, {}))
            for into, name in ((own, run.name), (of_start, start)):
                outcomes, helpful = _outcomes(run, name, tradeoff)
                into[0][seed] = known.setdefault(name, outcomes)
                into[1].update({(kind, seed): share for kind, share in helpful.items()})
        if own[0]:
            tuned.append(Setting("tuned", cell, *own))
    begun = [Setting("start", name, *each) for name, each in starts.items()]
    if tradeoff is None:
        return None
    asked = set.intersection(*(set(each) for each in known.values()))
    kinds = tuple(k for k in tradeoff.kinds if asked >= {(tradeoff.cost, k), (tradeoff.gain, k)})
    return Curve(replace(tradeoff, kinds=kinds), begun + tuned) if kinds else None


def _tradeoff_of(run: Path) -> Tradeoff | None:
    """What the task of the prompts that a run was evaluated on has."""
    stated = parse_source(read_object(run / CONFIG).get("eval", {}).get("source", ""))
    if not stated.name or stated.is_file or stated.is_hub:
        return None
    return task_of(stated.name).tradeoff


def _outcomes(run: Path, name: str, tradeoff: Tradeoff) -> tuple[Outcomes, dict[str, float]]:
    """What counts of that model's replies in a run's samples, and which share of them is right."""
    counted: dict[tuple[str, str], list[bool]] = {}
    right: dict[str, list[bool]] = {}
    for sample in read_samples(run):
        found = tradeoff.outcome(sample["prompt"][-1]["content"], sample["responses"][name])
        if found is None:
            continue
        counted.setdefault((found.share, found.kind), []).append(found.counts)
        if found.share == tradeoff.cost:
            right.setdefault(found.kind, []).append(found.right)
    shares = {kind: float(np.mean(each)) for kind, each in right.items()}
    return {key: np.array(each) for key, each in counted.items()}, shares


def points(curve: Curve) -> list[dict[str, Any]]:
    """What `draw_refusals` draws: means over seeds, with Wilson's intervals over prompts."""
    found = []
    for kind in curve.tradeoff.kinds:
        for each in curve.settings:
            point: dict[str, Any] = {"kind": kind, "arm": each.arm, "setting": each.name}
            for family in curve.shares:
                models = {id(outcomes): outcomes for outcomes in each.seeds.values()}
                of_prompts = np.mean([model[family, kind] for model in models.values()], 0)
                low, high = wilson_interval(float(of_prompts.sum()), len(of_prompts))
                shares = {"": float(of_prompts.mean()), "_low": low, "_high": high}
                point |= {f"{family}{end}": share for end, share in shares.items()}
            helpful = [share for (of, _), share in each.helpful.items() if of == kind]
            found.append(point | {"helpful": float(np.mean(helpful))})
    return found


def above(curve: Curve) -> Iterator[tuple[str, str, float, float, float, Any]]:
    """(cell, kind, x, y, the curve at x, (low, high) of y less it) of every tuned setting.

    The interval lies about the gap as the percentiles of a bootstrap of seeds and prompts do, which
    with few seeds are too narrow. So it is as wide as Student's t makes the variance over seeds (by
    the jackknife) and over prompts, and never narrower than that over seeds alone; of a single seed
    it is that of prompts alone. It takes no account of there being several points.

    The jackknife estimate of variance (Efron and Stein, 1981), https://doi.org/10.1214/aos/1176345462
    """
    starts = [each for each in curve.settings if each.arm == "start"]
    for each in (each for each in curve.settings if each.arm == "tuned"):
        for kind in curve.tradeoff.kinds:
            seeds = sorted(each.seeds.keys() & set.intersection(*(set(s.seeds) for s in starts)))
            if not seeds:  # of one start this seed has failed, of another one that
                continue
            arrays = [
                np.stack([[one.seeds[n][share, kind] for n in seeds] for one in (*starts, each)])
                for share in curve.shares
            ]
            x, y = (shares[0, -1] for shares in _shares(arrays, 0))
            gap = float(_gaps(arrays, 0)[0])
            yield each.name, kind, x, y, y - gap, _interval(arrays, gap)


def _interval(arrays: Sequence[np.ndarray], gap: float) -> tuple[float, float]:
    """The ends of 95 % about a gap; see `above`."""
    seeds, prompts = arrays[0].shape[1], min(array.shape[2] for array in arrays)
    others = [np.delete(np.arange(seeds), n) for n in range(seeds)] if seeds > 1 else [[0]]
    without = [_gaps([array[:, kept] for array in arrays], 0)[0] for kept in others]
    by_seed = float(np.var(without) * (seeds - 1))
    by_prompt = float(_gaps([array.mean(1, keepdims=True) for array in arrays], RESAMPLES).var())
    total = by_seed + by_prompt
    if not total:
        return gap, gap
    of_seeds, of_prompts = max(1, seeds - 1), max(1, prompts - 1)  # degrees of freedom
    freedom = total**2 / (by_seed**2 / of_seeds + by_prompt**2 / of_prompts)
    tests = [(sqrt(total), freedom), (sqrt(by_seed), of_seeds)]
    reach = max(spread * float(stdtrit(df, 0.975)) for spread, df in tests)
    below, beyond = np.quantile(_gaps(arrays, RESAMPLES), [0.025, 0.975])
    share = float(np.clip((gap - below) / (beyond - below), 0, 1)) if beyond > below else 0.5
    return gap - 2 * reach * share, gap + 2 * reach * (1 - share)


def _gaps(arrays: Sequence[np.ndarray], resamples: int) -> np.ndarray:
    """[R] by how much the last of M models lies above the curve of the others; see `_shares`."""
    xs, ys = _shares(arrays, resamples)
    return np.array([b[-1] - _curve(a[:-1], b[:-1], a[-1]) for a, b in zip(xs, ys, strict=True)])


def _shares(arrays: Sequence[np.ndarray], resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """([R, M] cost, [R, M] gain) of M models, of resamples or, for 0, as they are."""
    random, found = np.random.default_rng(0), []
    seeds = arrays[0].shape[1]
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    if not resamples:
        of_seeds = np.full((1, seeds), 1 / seeds)
    for array in arrays:
        counted = array.astype(float)  # [M, S, N]
        count = counted.shape[2]
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        if not resamples:
            drawn = np.full((1, count), 1 / count)
        found.append(np.einsum("msn,rs,rn->rm", counted, of_seeds, drawn, optimize=True))
    return found[0], found[1]


def _curve(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The highest point over `at` on a line between two of the points, (0, 0) and (1, 1)."""
    at = min(at, 1.0)  # a mean of ones may round to more
    xs, ys = np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])
    left, right = np.meshgrid(np.arange(len(xs)), np.arange(len(xs)), indexing="ij")
    spans = (xs[left] <= at) & (at <= xs[right])
    width = np.where(xs[right] > xs[left], xs[right] - xs[left], 1.0)
    share = np.where(xs[right] > xs[left], (at - xs[left]) / width, 1.0)
    heights = ys[left] + share * (ys[right] - ys[left])
    return float(np.max(np.where(spans, heights, -np.inf)))


def table(curve: Curve) -> list[list[str]]:
    """A row of texts for each tuned setting and kind, in the order of `Curve.columns`."""
    return [
        [
            *(name, kind, f"{x:.3f}", f"{y:.3f}", f"{there:.3f}", f"{y - there:+.3f}"),
            f"{low:+.3f} to {high:+.3f}",
        ]
        for name, kind, x, y, there, (low, high) in above(curve)
    ]
