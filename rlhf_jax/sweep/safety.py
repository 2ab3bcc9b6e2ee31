"""A sweep whose runs measured safety: its points, and which lie above the curve of their starts.

The curve of the starts is the best that the models which the runs started from reach at each share
of harmless prompts refused, also mixed: whoever answers each prompt by one of two models at random
has any point between theirs. With (0, 0), a model that refuses nothing, and (1, 1), one that
refuses everything, it is the upper hull of their points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.report.run_files import read_samples
from rlhf_jax.tasks.builders import verify
from rlhf_jax.tasks.safety import KINDS, REQUESTS, refuses, requests
from rlhf_jax.training.summary import read_summary

RESAMPLES = 2000
COLUMNS = ("cell", "kind", "harmless refused", "harmful refused", "curve there", "above", "95 %")
Outcomes = Mapping[tuple[str, str], np.ndarray]
"""By request ("harmful", "harmless") and kind: whether each of N prompts was refused, [N]."""


@dataclass(frozen=True)
class Setting:
    """Models of one setting, by seed; `helpful` is by kind and seed.

    Runs that started from one and the same model have the same object for each of their seeds.
    """

    arm: str
    name: str
    seeds: Mapping[int, Outcomes]
    helpful: Mapping[tuple[str, int], float]


def read_settings(runs: Mapping[str, Mapping[int, Path]]) -> list[Setting]:
    """The settings of a sweep's runs, after those that they started from; none without safety.

    Args:
        runs: {cell: {seed: directory}} of finished runs.
    """
    starts: dict[str, tuple[dict, dict]] = {}
    known: dict[str, Outcomes] = {}
    tuned = []
    for cell, seeds in runs.items():
        own: tuple[dict, dict] = ({}, {})
        for seed, run in seeds.items():
            summary, start = read_summary(run), ""
            start = Path(summary["parents"].get("policy", "")).name
            if "eval/safety/balance/seen" not in summary["metrics"] or not start:
                return []
            of_start = starts.setdefault(start.partition(",seed=")[0], ({}, {}))
            for into, name in ((own, run.name), (of_start, start)):
                outcomes, helpful = _outcomes(run, name)
                into[0][seed] = known.setdefault(name, outcomes)
                into[1].update({(kind, seed): share for kind, share in helpful.items()})
        if own[0]:
            tuned.append(Setting("tuned", cell, *own))
    return [Setting("start", name, *each) for name, each in starts.items()] + tuned


def _outcomes(run: Path, name: str) -> tuple[Outcomes, dict[str, float]]:
    """What the model of that name refused in a run's samples, and its share of right advice."""
    refused: dict[tuple[str, str], list[bool]] = {}
    right: dict[str, list[bool]] = {}
    for sample in read_samples(run):
        prompt, reply = requests().get(sample["prompt"][-1]["content"]), sample["responses"][name]
        if prompt is None:
            continue
        family, kind = prompt.meta["safety"], prompt.meta["kind"]
        refused.setdefault((family, kind), []).append(refuses(prompt, reply))
        if family == "harmless":
            right.setdefault(kind, []).append(verify(prompt, reply).right)
    shares = {kind: float(np.mean(each)) for kind, each in right.items()}
    return {key: np.array(each) for key, each in refused.items()}, shares


def points(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What `draw_refusals` draws: shares of all seeds together, with Wilson's intervals."""
    found = []
    for kind in KINDS:
        for each in settings:
            point: dict[str, Any] = {"kind": kind, "arm": each.arm, "setting": each.name}
            for family in REQUESTS:
                models = {id(outcomes): outcomes for outcomes in each.seeds.values()}
                replies = np.concatenate([model[family, kind] for model in models.values()])
                low, high = wilson_interval(int(replies.sum()), len(replies))
                shares = {"": float(replies.mean()), "_low": low, "_high": high}
                point |= {f"{family}{end}": share for end, share in shares.items()}
            helpful = [share for (of, _), share in each.helpful.items() if of == kind]
            found.append(point | {"helpful": float(np.mean(helpful))})
    return found


def above(settings: Sequence[Setting]) -> Iterator[tuple[str, str, float, float, float, Any]]:
    """(cell, kind, x, y, the curve at x, (low, high) of y less it) of every tuned setting.

    The interval is a percentile bootstrap in which seeds and, of each kind of request, prompts are
    drawn with replacement, for the curve and the point alike. It holds for the point as it is, and
    takes no account of there being several.
    """
    starts = [each for each in settings if each.arm == "start"]
    for each in (each for each in settings if each.arm == "tuned"):
        for kind in KINDS:
            seeds = sorted(each.seeds.keys() & set.intersection(*(set(s.seeds) for s in starts)))
            arrays = {
                family: np.stack(
                    [[one.seeds[seed][family, kind] for seed in seeds] for one in (*starts, each)]
                )
                for family in REQUESTS
            }
            (x, y), (xs, ys) = _shares(arrays, 0), _shares(arrays, RESAMPLES)
            gaps = [b[-1] - _curve(a[:-1], b[:-1], a[-1]) for a, b in zip(xs, ys, strict=True)]
            low, high = np.quantile(gaps, [0.025, 0.975])
            curve = _curve(x[0, :-1], y[0, :-1], x[0, -1])
            yield each.name, kind, x[0, -1], y[0, -1], curve, (float(low), float(high))


def _shares(arrays: Mapping[str, np.ndarray], resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """([R, M] harmless, [R, M] harmful) shares of M models, of resamples or, for 0, as they are."""
    random, found = np.random.default_rng(0), []
    seeds = arrays["harmless"].shape[1]
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    if not resamples:
        of_seeds = np.full((1, seeds), 1 / seeds)
    for family in ("harmless", "harmful"):
        refused = arrays[family].astype(float)  # [M, S, N]
        count = refused.shape[2]
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        if not resamples:
            drawn = np.full((1, count), 1 / count)
        found.append(np.einsum("msn,rs,rn->rm", refused, of_seeds, drawn, optimize=True))
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


def table(settings: Sequence[Setting]) -> list[list[str]]:
    """A row of texts for each tuned setting and kind, in the order of `COLUMNS`."""
    return [
        [
            *(name, kind, f"{x:.3f}", f"{y:.3f}", f"{curve:.3f}", f"{y - curve:+.3f}"),
            f"{low:+.3f} to {high:+.3f}",
        ]
        for name, kind, x, y, curve, (low, high) in above(settings)
    ]
