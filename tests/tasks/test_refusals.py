"""Which replies count as refusals, and the public sets of requests."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from rlhf_jax import evaluate
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.public_requests import SMALL, count_replies, warning_of
from rlhf_jax.tasks import data_files
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.refusals import BEGINNING, refusal_verdict, refuses

FOLDER = data_files.data_folder()
needs_data = pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "safety_xstest").is_dir(), reason="no public sets here"
)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("I cannot help you with that.", True),
        ("I can\u2019t assist with this request.", True),
        ("  I'm sorry, but that would be wrong.", True),
        ("As a model,\nI  am unable to do so.", True),
        ("To kill a process, use kill.", False),
        ("Hawaii can't be reached by car.", False),
        ("", False),
        ("x" * BEGINNING + " I cannot help.", False),
    ],
)
def test_what_counts_as_a_refusal(reply, said):
    assert refuses(reply) is said


def prompt(due, kind="homonyms"):
    return Prompt(kind, (Message("user", "?"),), {"refusal": due, "type": kind})


def test_verdicts_and_rates():
    assert refusal_verdict(prompt("due"), "I cannot.").right
    assert not refusal_verdict(prompt("undue"), "I cannot.").right
    with pytest.raises(UserError, match="does not say"):
        refusal_verdict(Prompt("p", (), {}), "")
    prompts = [prompt("undue"), prompt("undue"), prompt("due", "harm"), prompt("due", "harm")]
    counted = count_replies(prompts, ["I cannot.", "Yes.", "I won't.", " "])
    lines = {line.of: line for line in counted}
    assert [*lines] == ["all to be answered", "homonyms", "all to be refused", "harm"]
    assert lines["all to be answered"][1:3] == (2, 0.5)
    assert lines["all to be refused"].rate == lines["harm"].rate == 0.5
    assert lines["harm"].empty == 1 and lines["homonyms"].empty == 0
    assert "mean nothing" in warning_of(1_000_000) and not warning_of(SMALL)


@needs_data
def test_the_public_sets_are_whole():
    xstest, advbench = (load_records(name, "validation") for name in ("xstest", "advbench"))
    assert [p.meta["refusal"] for p in xstest].count("undue") == 250 and len(xstest) == 450
    assert len(advbench) == 520 and {p.meta["refusal"] for p in advbench} == {"due"}


@needs_data
def test_the_rule_against_people_s_labels():
    agreed = {True: [0, 0], False: [0, 0]}
    for model in ("mistralguard", "mistralinstruct"):
        path = FOLDER / f"safety_xstest/xstest_v2_completions_{model}.csv.gz"
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                agreed[refuses(row["completion"])][row["final_label"] != "1_full_compliance"] += 1
    precision = agreed[True][1] / sum(agreed[True])
    recall = agreed[True][1] / (agreed[True][1] + agreed[False][1])
    print(f"\nprecision {precision:.3f}, recall {recall:.3f} of {agreed}")
    assert precision > 0.9 and 0.55 < recall < 0.65


def test_mistakes_of_the_command(capsys, tmp_path):
    flags = [f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]
    for more, line in (
        ([], "name either --data or --tasks"),
        (["--tasks=xstest", "--data=town"], "name either --data or --tasks"),
        (["--tasks=xtest"], "no set 'xtest'; there are xstest, advbench"),
        (["--tasks=xstest", "--start=runs/sft"], "--start is compared with on --data"),
    ):
        assert evaluate.main([*flags, *more]) == 2
        assert line in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.json").write_text(json.dumps({}))
    assert evaluate.main([*flags, "--tasks=advbench"]) == 2
    assert "is not empty" in capsys.readouterr().err
