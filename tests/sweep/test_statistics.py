"""Estimates over seeds and prompts: hand values, coverage, and what a sweep of equals finds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation.statistics import bootstrap_interval
from rlhf_jax.sweep import statistics
from rlhf_jax.sweep.statistics import differences, estimate, holm


def test_of_seeds_alone_it_is_students_t():
    values = np.array([0.8, 0.7, 0.9, 0.75, 0.85])
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, 0.8, stats.sem(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert found.high - found.low == pytest.approx(high - low)
    assert found.low == pytest.approx(low, abs=0.01)  # the values lie evenly about their mean
    assert (found.mean, found.seeds) == (pytest.approx(0.8), 5)


def test_the_variance_has_a_part_of_seeds_and_one_of_prompts():
    # Seeds differ by ±1 and prompts by ±2 exactly: nothing is left, v_s = 2/2, v_p = (16/3)/4.
    values = np.add.outer([-1.0, 1.0], [-2.0, 2.0, -2.0, 2.0]) + 10
    found = estimate(values)
    total, freedom = 1 + 4 / 3, (1 + 4 / 3) ** 2 / (1 + (4 / 3) ** 2 / 3)
    both, seeds = stats.t.ppf(0.975, freedom) * total**0.5, stats.t.ppf(0.975, 1)
    assert found.p == pytest.approx(
        max(2 * stats.t.sf(10 / total**0.5, freedom), 2 * stats.t.sf(10, 1))
    )
    assert found.high - found.low == pytest.approx(2 * max(both, seeds))


def test_an_interval_leans_to_where_the_outcomes_do():
    found = estimate(np.tile([[1.0] * 60 + [0.0] * 4], (4, 1)))
    assert 0 < found.high - found.mean < found.mean - found.low


def test_a_single_seed_says_nothing_and_equal_outcomes_what_their_signs_say():
    one = estimate(np.ones((1, 8)))
    assert one.mean == 1 and all(x != x for x in (one.deviation, one.low, one.high, one.p))
    same = estimate(np.full((3, 8), 0.0))
    assert same.p == 1 and same.low != same.low and same.high != same.high
    # Two seeds of ±0.25 or 0 each are the same, and not 0, in an eighth of all sweeps by chance.
    alike = estimate(np.array([[0.25], [0.25]]))
    assert alike.p == 0.5 and alike.low != alike.low and alike.high != alike.high
    rounded = estimate(np.array([[0.3 - 0.2], [0.4 - 0.3]]))
    assert rounded.deviation > 0 and rounded.p == 0.5
    # Of six seeds the sign test excludes, at 5 % and not at 2.5 %, all but what they have.
    six = np.full((6, 1), 0.25)
    assert (estimate(six).low, estimate(six).high, estimate(six).p) == (0.25, 0.25, 1 / 32)
    strict = estimate(six, level=0.975)
    assert strict.p == 1 / 32 and strict.low != strict.low and strict.high != strict.high
    for bad in (np.zeros((0, 4)), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="need finite outcomes"):
            estimate(bad)


def test_holm():
    # https://en.wikipedia.org/wiki/Holm-Bonferroni_method: .01·4, .03·2 after .02·3, .04
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    kept = holm([0.01, float("nan"), 0.5])
    assert kept[0] == 0.02 and kept[1] != kept[1] and kept[2] == 0.5


def test_differences_are_of_the_same_seeds_and_prompts():
    random = np.random.default_rng(0)
    prompts, seeds = random.normal(0, 5, 64), random.normal(0, 3, 5)
    base = {s: prompts + seeds[s] for s in range(5)}
    cells = {
        "base": base,
        "up": {s: base[s] + 0.5 + random.normal(0, 0.1, 64) for s in (0, 1, 2, 4)},
        "none": {},
    }
    found = differences(cells, "base")
    assert list(found) == ["up"]
    up, p = found["up"]
    assert up.seeds == 4 and up.mean == pytest.approx(0.5, abs=0.05) and p == up.p < 0.001
    assert differences({"base": {}, "up": base}, "base") == {}


def test_a_variance_that_is_small_by_chance_is_that_of_all_cells():
    means = {"base": [0, 0, 0], "lucky": [1, 1.001, 0.999], "wide": [1, -2, 1]}
    cells = {n: {s: np.array([v]) for s, v in enumerate(vs)} for n, vs in means.items()}
    lucky, _ = differences(cells, "base")["lucky"]
    assert lucky.p > 0.1  # on its own 4e-7
    pair, _ = differences({n: cells[n] for n in ("base", "lucky")}, "base")["lucky"]
    assert pair.p < 1e-5


def simulated(random, *, cells=6, seeds=5, prompts=256, of_seeds=0.01, left=0.2, effect=0.0,
              noisy=1.0):  # fmt: skip
    """Outcomes of a sweep: prompts differ by 0.3, seeds by `of_seeds`, and `left` is what is left.

    Cell "1" has an effect; the seeds of the last one differ `noisy` times as much as the others'.
    """
    base = 0.7 + random.normal(0, 0.3, prompts)
    made = {}
    for cell in range(cells):
        shape = seeds, prompts
        apart = random.normal(0, of_seeds * (noisy if cell == cells - 1 else 1), (seeds, 1))
        values = base + apart + random.normal(0, left, shape)
        made[str(cell)] = dict(enumerate(values + effect * (cell == 1)))
    return made


@pytest.fixture
def without_intervals(monkeypatch):
    """Leaves out the bootstrap, of which no p-value depends."""
    monkeypatch.setattr(statistics, "_resample", lambda values: values.mean() + np.array([-1, 1]))


def found_in(sweeps: int, **settings) -> float:
    """The share of simulated sweeps that find a difference of any cell, or of the one planted."""
    random, found = np.random.default_rng(1), 0
    for _ in range(sweeps):
        cells = simulated(random, **settings)
        ps = {name: p for name, (_, p) in differences(cells, "0").items()}
        found += (ps["1"] if "effect" in settings else min(ps.values())) < 0.05
    return found / sweeps


EQUALS = [
    {}, {"of_seeds": 0.03}, {"of_seeds": 0.0}, {"seeds": 3, "left": 0.4},
    {"cells": 2}, {"cells": 12, "prompts": 64}, {"of_seeds": 0.02, "noisy": 4.0},
]  # fmt: skip


@pytest.mark.parametrize("settings", EQUALS[:4], ids=str)
def test_sweeps_of_equal_cells_find_no_more_differences_than_chance_allows(
    settings, without_intervals
):
    assert found_in(200, **settings) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("settings", EQUALS, ids=str)
def test_nor_do_many_more_of_them(settings, without_intervals):
    share = found_in(4000, **settings)
    print(settings, share)
    assert share <= 0.055  # 5 % but for chance


@pytest.mark.slow
@pytest.mark.parametrize("noise", [{}, {"of_seeds": 0.015, "left": 0.3}], ids=str)
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_power_grows_with_seeds(seeds, noise, without_intervals):
    share = found_in(2000, effect=0.05, seeds=seeds, **noise)
    print(seeds, "seeds", noise, share)
    assert share >= {3: 0.2, 5: 0.5, 8: 0.85}[seeds]


@pytest.mark.parametrize("settings", [{}, {"seeds": 8, "of_seeds": 0.015, "left": 0.3}], ids=str)
def test_an_effect_of_five_points_is_found_four_times_of_five(settings, without_intervals):
    assert found_in(200, effect=0.05, **settings) >= 0.8


def test_intervals_cover_and_those_over_prompts_alone_do_not():
    random = np.random.default_rng(0)
    covered, prompts_alone, widths = 0, 0, []
    for _ in range(100):
        made = simulated(random, cells=1, prompts=64, of_seeds=0.12, left=0.1)
        values = np.stack([*made["0"].values()])  # 0.7 on average
        whole = estimate(values)
        low, high = bootstrap_interval(values.T, 0)
        covered += whole.low <= 0.7 <= whole.high
        prompts_alone += low <= 0.7 <= high
        widths.append((whole.high - whole.low) / (high - low))
    assert covered >= 92
    assert prompts_alone < 80 and np.median(widths) > 1.5
