"""The scorers of texts: the verifiers on tables of cases, weights, checks and masks."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.scorers import Scores, TextScorers, parse_rewards
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.data_files import data_folder
from rlhf_jax.tasks.stated_answers import number
from rlhf_jax.tasks.town.gold import gold_score


def prompt(name="a", **meta) -> Prompt:
    return Prompt(name, (Message("user", "How many?"),), meta)


def score(weights, prompts, responses, *, given=None, lengths=None, **options) -> Scores:
    lengths = [len(response.split()) for response in responses] if lengths is None else lengths
    with TextScorers(weights, **options) as scorers:
        return scorers.score(prompts, responses, lengths=lengths, given=given or {})


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("model", {"model": 1}),
        ("model=1,length=-0.01", {"model": 1, "length": -0.01}),
        (" gold = .5 , exact=2e-1, ", {"gold": 0.5, "exact": 0.2}),
        ("runs/lr=0.1/my.py:f=0.5", {"runs/lr=0.1/my.py:f": 0.5}),
        ("my.py:f", {"my.py:f": 1}),
    ],
)
def test_parse_rewards(spec, weights):
    assert parse_rewards(spec) == weights
    assert [*parse_rewards(spec)] == [*weights]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "none is named"),
        ("modle=1", "did you mean 'model'"),
        ("lenght", "did you mean 'length'"),
        ("model=a lot", "weight of 'model' is no finite number: 'a lot'"),
        ("model=", "no finite number"),
        ("model=nan", "no finite number"),
        ("gold=inf", "no finite number"),
        ("gold=1,gold=2", "named twice"),
        ("my.py=1", "names no function"),
        ("my.py:2f", "names no function"),
    ],
)
def test_parse_rewards_refuses(spec, says):
    with pytest.raises(UserError, match=says) as error:
        parse_rewards(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", "72"),
        ("#### 72", "72"),
        ("The answer is 72.", "72"),
        ("It is 1,234", "1234"),
        ("1,234,567.50 in all", "1234567.5"),
        ("It costs $5.00", "5"),
        ("It costs $1,000.", "1000"),
        ("3, 4", "4"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        ("0.1", "0.1"),
        (".5", "0.5"),
        ("-3", "-3"),
        ("x=-3", "-3"),
        ("−3", "-3"),
        ("$-3", "-3"),
        ("-$3", "-3"),
        ("+3", "3"),
        ("7-5", "5"),
        ("7 - 5", "5"),
        ("48/2=24>>24 clips", "24"),
        ("50%", "50"),
        ("12345678901234567890.1", "12345678901234567890.1"),
        ("007", "7"),
        ("", None),
        ("none at all", None),
        ("$", None),
    ],
)
def test_number(text, value):
    assert number(text) == (None if value is None else Fraction(value))


def test_number_is_exact_and_of_any_style():
    responses = ["0.30", "0.30000000000000001", "I say .3", "3 of 10", "no idea"]
    found = score({"number": 1}, [prompt(answer="0.3")] * 5, responses)
    assert found.total.tolist() == [1, 0, 1, 0, 0]
    assert found.valid.all()
    assert found.failures == {}
    same = score({"number": 1}, [prompt(answer="#### $1,234.")], ["so 1234 it is"])
    assert same.total.tolist() == [1]


def test_exact_takes_the_answer_before_the_reference():
    prompts = [prompt(answer="yes", reference="no"), prompt(reference="no"), prompt(answer=" a\n")]
    assert score({"exact": 1}, prompts, [" yes\n", "no", "a"]).total.tolist() == [1, 1, 1]
    assert score({"exact": 1}, prompts, ["no", "No", "a."]).total.tolist() == [0, 0, 0]


def test_regex_searches():
    found = score(
        {"regex": 2}, [prompt()] * 3, ["x <b>y</b>", "<b>", ""], pattern=r"<b>(\w|,|=)+</b>"
    )
    assert found.total.tolist() == [2, 0, 0]


@pytest.mark.parametrize("on_error", ["fail", "mask"])
def test_a_search_without_end_is_killed(on_error):
    prompts, endless = [prompt("a"), prompt("b")], "a" * 40 + "!"
    options = {"pattern": "(a+)+$", "timeout_seconds": 0.5, "on_error": on_error}
    with TextScorers({"regex": 1}, **options) as scorers:
        begun = time.monotonic()
        if on_error == "fail":
            with pytest.raises(UserError, match="'regex', prompt 'a' and 'b': took longer than"):
                scorers.score(prompts, ["aa", endless], lengths=[1, 1])
        else:
            found = scorers.score(prompts, ["aa", endless], lengths=[1, 1])
            assert not found.valid.any() and found.failures == {"regex: timed out": 2}
        assert time.monotonic() - begun < 60  # the search itself would take days
        assert scorers.score(prompts, ["\ud800aa", "b"], lengths=[1, 1]).total.tolist() == [1, 0]


def test_the_towns_scorers():
    prompts = load_records("town", "validation[:4]", kind="prompt")
    responses = [p.meta["reference"] for p in prompts[:3]] + ["gibberish blah"]
    found = score({"gold": 1, "correct": 10}, prompts, responses)
    gold = [gold_score(*pair).total for pair in zip(prompts, responses, strict=True)]
    right = [gold_score(*pair).right for pair in zip(prompts, responses, strict=True)]
    assert right == [True, True, True, False]
    np.testing.assert_allclose(found.components["gold"], gold)
    np.testing.assert_allclose(found.components["correct"], right)
    np.testing.assert_allclose(found.total, np.array(gold) + 10 * np.array(right))


def test_total_is_the_weighted_sum_of_lengths_and_given_scores():
    found = score(
        {"model": 2, "length": -0.5, "regex": 0},
        [prompt()] * 2,
        ["a", "b"],
        given={"model": np.array([1.5, -1.0], np.float32)},
        lengths=np.array([4, 1]),
        pattern="a",
    )
    assert found.total.dtype == np.float64
    assert found.total.tolist() == [2 * 1.5 - 2, -2 - 0.5]
    assert found.components["regex"].tolist() == [1, 0]
    assert [*found.components] == ["model", "length", "regex"]


def test_a_missing_reference_names_the_prompt_or_masks_it():
    prompts = [prompt("first", answer="1"), prompt("second"), prompt("third", answer="one")]
    with pytest.raises(UserError, match=r"'number', prompt 'second'.*meta\['answer'\]"):
        score({"number": 1}, prompts, ["1"] * 3)
    found = score({"number": 1, "length": 1}, prompts, ["1"] * 3, on_error="mask")
    assert found.valid.tolist() == [True, False, False]
    np.testing.assert_array_equal(found.total, [2, np.nan, np.nan])
    np.testing.assert_array_equal(found.components["length"], [1, 1, 1])
    assert found.failures == {"number: no reference": 2}
    with pytest.raises(
        UserError, match=r"prompt 'first' and 2 others up to 'third'.*expectation"
    ) as error:
        score({"gold": 1}, [prompt("first"), prompt("first"), prompt("third")], ["1"] * 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "reason", "bad"),
    [
        ([1.0, np.nan], "not finite", [1]),
        ([-np.inf, 1.0], "not finite", [0]),
        ([1e39, 1.0], "too large", [0]),
        ([1.0], "wrong length", [0, 1]),
        ([[1.0], [2.0]], "wrong length", [0, 1]),
        (["1", "2"], "not a number", [0, 1]),
    ],
)
def test_given_scores_are_checked(model, reason, bad):
    prompts, given = [prompt("a"), prompt("b")], {"model": np.array(model)}
    with pytest.raises(UserError, match=f"reward 'model', prompt '{'ab'[bad[0]]}'"):
        score({"model": 1}, prompts, ["x", "y"], given=given)
    found = score({"model": 0, "length": 1}, prompts, ["x", "y"], given=given, on_error="mask")
    assert np.flatnonzero(~found.valid).tolist() == bad
    for values in (found.total, found.components["model"]):
        assert np.flatnonzero(np.isnan(values)).tolist() == bad
    assert found.failures == {f"model: {reason}": len(bad)}


def test_a_total_that_float32_cannot_hold_is_no_score():
    given = {"model": np.array([3e38, 1.0])}
    with pytest.raises(UserError, match=r"'total', prompt 'a'.*too large"):
        score({"model": 10}, [prompt()] * 2, ["x", "y"], given=given)
    found = score({"model": 10}, [prompt()] * 2, ["x", "y"], given=given, on_error="mask")
    np.testing.assert_array_equal(found.total, [np.nan, 10])
    assert found.failures == {"total: too large": 1}


@pytest.mark.parametrize("value", [1e25, -3e38, 1e16])
def test_a_total_whose_square_float32_cannot_sum_is_no_score(value):
    given = {"model": np.array([1.0, value, 4e15])}
    arguments = {"model": 1}, [prompt("a"), prompt("b"), prompt("c")], ["x", "y", "z"]
    with pytest.raises(UserError, match=r"'total', prompt 'b': the score .* is too large, over 4"):
        score(*arguments, given=given)
    found = score(*arguments, given=given, on_error="mask")
    assert found.valid.tolist() == [True, False, True]


def test_the_first_failure_of_a_kind_is_said_and_then_their_number(capsys):
    bad, good = np.array([np.nan, 1.0]), np.array([1.0, 1.0])
    with TextScorers({"model": 1, "exact": 1}, on_error="mask") as scorers:
        for model in (good, bad, bad, bad, bad, good, np.array([np.inf, 1e39])):
            prompts = [prompt("a", answer="x"), prompt("b", answer="x")]
            scorers.score(prompts, ["x", "y"], lengths=[1, 1], given={"model": model})
        scorers.score([prompt("c")], ["x"], lengths=[1], given={"model": good[:1]})
    left_out = "left out and counted (reward.on_error=mask)"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: reward 'model', prompt 'a': the score nan is not finite; {left_out}",
        "warning: reward model: not finite: 2 responses left out",
        "warning: reward model: not finite: 4 responses left out",
        "warning: reward 'model', prompt 'b': the score 1e+39 is too large, over 3.4e+38: a loss "
        f"in float32 overflows; {left_out}",
        "warning: reward 'exact', prompt 'c': the record has no meta['answer'] or "
        f"meta['reference'] to compare with; {left_out}",
    ]
    counts = {reason: failed["count"] for reason, failed in scorers.failed.items()}
    assert counts == {"model: not finite": 5, "model: too large": 1, "exact: no reference": 1}
    assert scorers.failed["model: not finite"]["first"].startswith("reward 'model', prompt 'a'")


def test_nothing_to_score():
    found = score({"model": 1, "gold": 1}, [], [], given={"model": np.zeros(0)})
    assert found.total.shape == found.valid.shape == found.components["gold"].shape == (0,)


@pytest.mark.parametrize(
    ("weights", "options", "says"),
    [
        ({"regex": 1}, {}, "need each other"),
        ({"gold": 1}, {"pattern": "a"}, "need each other"),
        ({"regex": 1}, {"pattern": "("}, "no regular expression"),
        ({"regex": 1}, {"pattern": "a{99999999999}"}, "no regular expression"),
        ({"gold": 1}, {"timeout_seconds": 0}, "timeout_seconds"),
        ({"gold": 1}, {"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"gold": 1}, {"on_error": "zero"}, "fail or mask"),
        ({"golden": 1}, {}, "did you mean 'gold'"),
    ],
)
def test_options_are_checked(weights, options, says):
    with pytest.raises(UserError, match=says):
        TextScorers(weights, **options)


def test_calls_that_do_not_fit_are_bugs():
    with pytest.raises(ValueError, match="must be given"):
        score({"model": 1}, [prompt()], ["x"])
    with pytest.raises(ValueError, match="without a weight"):
        score({"length": 1}, [prompt()], ["x"], given={"model": np.zeros(1)})
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        score({"length": 1}, [prompt()] * 2, ["x"])


MATH = [
    ("12", "The answer is 12 (see step 3)", 1),
    ("3", "The answer is 12 (see step 3)", 0),
    (r"\frac12", "1/2", 1),
    ("1/2", r"\boxed{\frac{1}{2}}", 1),
    ("3000", "3 000", 1),
    ("1000", "1e3", 1),
    ("1", "1e3", 0),
    ("18", r"\$18", 1),
    ("18", "She makes $18 a day, since $9 * 2 = $18.", 1),
    ("1234.5", "1.234,5", 1),
    ("1.234", "1.234,5", 0),
    ("1 1/2", "3/2", 1),
    ("-5", "−5", 1),
    ("72", "so 48+24=72 clips.\n#### 72", 1),
    ("#### 72", r"\boxed{72}", 1),
    ("7", r"\boxed{3} and \boxed{7}", 1),
    ("3", r"\boxed{3} and \boxed{7}", 0),
    ("50%", "0.5", 1),
    ("0.5", r"\boxed{50\%}", 1),
    ("1/3", "0.3333333", 1),
    ("1/3", "0.33", 0),
    ("5", "", 0),
    ("8", "The answer is 3 + 5", 1),
    ("$2^3$", "8", 1),
    ("2", r"\boxed{2\sqrt{3}}", 0),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{1/\sqrt{2}}", 1),
    (r"2\pi", r"The answer is $2\pi$.", 1),
    (r"\pi", "3.14", 0),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ("y = 2x + 3", "$y=3+2x$", 1),
    ("(1,2)", "The answer is $(1,2)$.", 1),
    ("(1,2)", "(2, 1)", 0),
    (r"\{1,2\}", r"$\{2,1\}$", 1),
    ("[0,1)", "$[0,1)$", 1),
    ("[0,1)", "$[0,1]$", 0),
    ("5", r"\boxed{__import__('os').getpid()}", 0),
]


def test_mathematics():
    pytest.importorskip("math_verify")
    references, responses, _ = zip(*MATH, strict=True)
    prompts = [prompt(answer=reference) for reference in references]
    found = score({"math": 1}, prompts, responses)
    wrong = [row for row, value in zip(MATH, found.total, strict=True) if row[2] != value]
    assert wrong == [] and found.valid.all()


def test_an_answer_that_takes_too_long_is_wrong_and_ends_nothing(caplog):
    pytest.importorskip("math_verify")
    responses = [r"\boxed{9^{9^{9^9}}}", "$(10^9)!$", r"\boxed{5}"]
    found = score({"math": 1}, [prompt(answer="5")] * 3, responses, timeout_seconds=0.5)
    assert found.total.tolist() == [0, 0, 1] and found.failures == {}
    assert "2 answers were too long to compare" in caplog.text


def test_mathematics_needs_its_package_and_a_reference(monkeypatch):
    pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=r"'math', prompt 'a': the record has no meta\['answer'\]"):
        score({"math": 1}, [prompt()], ["5"])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'math' needs the package math-verify: pip install"):
        parse_rewards("math=1")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answers_of_gsm8k_are_right(split):
    path = (data_folder() or Path()) / f"sft_gsm8k/{split}.jsonl.gz"
    if not path.is_file():
        pytest.skip("GSM8K is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        replies = [json.loads(line)["answer"] for line in file]
    prompts = [prompt(answer=reply.rpartition("####")[2].strip()) for reply in replies]
    replies = [f"{reply}\n(in {len(reply)} letters)" for reply in replies]
    assert score({"number": 1}, prompts, replies).total.min() == 1
