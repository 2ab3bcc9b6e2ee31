"""Rates of what tasks count, and episodes that go well several times in a row."""

from __future__ import annotations

import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.outcomes import (
    interval_of,
    outcome_values,
    pass_metrics,
    rate_metrics,
    rate_plots,
    rate_tables,
    repeat_prompts,
)
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.report.plots import draw
from rlhf_jax.tasks.task import Task, Verdict

RECORDS = [Prompt(str(i), (Message("user", "?"),)) for i in range(4)]


def count(record, turns):
    """Of a record's turns, those that say yes; of even records alone, the same by number."""
    yes = sum(turn == "yes" for turn in turns)
    even = {f"by/{10 * len(turns)}": (yes, len(turns))} if int(record.id) % 2 == 0 else {}
    return {"yes": (yes, len(turns))} | even


TASK = Task("t", {}, lambda *args: {}, outcomes=count)
TURNS = [["yes", "no"], ["yes"], ["no"], ["yes", "yes"]]


def test_rates_are_of_what_records_count():
    values = outcome_values(TASK, RECORDS, TURNS)
    assert [*values] == ["by/10", "by/20", "yes"]  # numbers as numbers
    metrics = rate_metrics(values)
    assert metrics["eval/yes"] == 4 / 6 and metrics["eval/by/20"] == 0.5
    assert metrics["eval/by/10"] == 0
    # Turns of a record are no independent draws: 1, 1, 2, 2 weigh as 6² / 10 = 3.6 equal records.
    low, high = wilson_interval(3.6 * 4 / 6, 3.6)
    assert (metrics["eval/yes_low"], metrics["eval/yes_high"]) == pytest.approx((low, high))
    assert interval_of("by/20", values["by/20"]) == wilson_interval(0.5, 1)
    assert outcome_values(Task("t", {}, lambda *args: {}), RECORDS, TURNS) == {}


@pytest.mark.parametrize("name", ["questions/of_fewest", "moves/of_best"])
def test_of_a_ratio_the_interval_is_of_resampled_records_whatever_was_drawn(name):
    # Of two records one is drawn twice in half of the resamplings: 4 / 2, 6 / 2 or 8 / 2.
    assert interval_of(name, Values.of([2, 4], [1, 1])) == (2.0, 4.0)
    low, high = interval_of(name, Values.of([9.0, 4.5] * 50, [4.5] * 100))
    assert 1.38 < low < 1.43 and 1.57 < high < 1.62  # 1.5 ± 1.96 · 0.5 / 10
    # In this run all were lucky, or took as many as the best player does: none exceeds 1.
    low, high = interval_of(name, Values.of([2.25, 4.5] * 50, [4.5] * 100))
    assert 0.69 < low < 0.72 and 0.78 < high < 0.81  # 0.75 ± 1.96 · 0.25 / 10


def test_a_share_above_one_is_refused_by_name():
    with pytest.raises(ValueError, match="eval/yes is above 1"):
        interval_of("yes", Values.of([2, 0], [1, 1]))


def test_the_table_has_every_model_and_the_figure_a_curve_for_a_name_that_ends_in_numbers():
    before = outcome_values(TASK, RECORDS, [["no"] * len(turns) for turns in TURNS])
    rates = {"sft": before, "dpo": outcome_values(TASK, RECORDS, TURNS)}
    (table,) = rate_tables(rates)
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["yes"][:3] == [4, 0.0, 4 / 6] and len(table["columns"]) == 6
    (plot,) = rate_plots(rates)
    assert plot["groups"] == ["10", "20"] and plot["series"] == {"sft": [0, 0], "dpo": [0, 0.5]}
    assert draw(plot).note.endswith("20: 0.05 to 0.95")


def test_a_rate_that_only_the_last_model_has_is_no_number_of_the_others():
    values = outcome_values(TASK, RECORDS, TURNS)
    (table,) = rate_tables({"sft": {"yes": values["yes"]}, "dpo": values})
    assert table["rows"][0][:4] == ["by/10", 1, None, 0.0]
    assert rate_tables({"sft": {}, "dpo": {}}) == []


def verdict(total):
    return Verdict(total, {"correct": total})


@pytest.mark.parametrize("total", [0.0, 1.0])
def test_where_all_prompts_are_alike_the_interval_is_no_point(total):
    metrics = pass_metrics([[verdict(total)] * 8] * 20)
    assert metrics["eval/pass^8"] == total
    bounds = metrics["eval/pass^8_low"], metrics["eval/pass^8_high"]
    assert bounds == wilson_interval(20 * total, 20)


def test_episodes_in_a_row_have_one_kind_of_interval_also_where_few_prompts_differ():
    # One of 20 prompts succeeds: the bootstrap's lower end would be 0, its upper one 0.15.
    metrics = pass_metrics([[verdict(float(i == 0))] * 8 for i in range(20)])
    bounds = metrics["eval/pass^8_low"], metrics["eval/pass^8_high"]
    assert bounds == pytest.approx(wilson_interval(1, 20))


def test_in_a_row_is_over_several_episodes_to_a_prompt():
    asked = repeat_prompts(RECORDS[:2])
    assert len({record.id for record in asked}) == 16 and asked[0].meta == RECORDS[0].meta
    groups = [[verdict(float(i < c)) for i in range(8)] for c in (8, 4)]
    metrics = pass_metrics(groups)
    assert metrics["eval/pass^1"] == 0.75
    assert metrics["eval/pass^2"] == pytest.approx((1 + 6 / 28) / 2)
    assert metrics["eval/pass^8"] == 0.5
    assert metrics["eval/pass^8_low"] <= 0.5 <= metrics["eval/pass^8_high"]
