"""The command: what it keeps, what it says of the rest, and how many defects of a town it finds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.data.records import KINDS
from rlhf_jax.filter.__main__ import main
from rlhf_jax.filter.records import to_json
from tests.filter.defects import DEFECTS, LONGEST, clean_records, with_defects


def write(path: Path, lines: list) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat(asked: str, said: str, **more) -> dict:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns} | more


def refused(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_every_line_is_kept_or_went_for_one_reason(tmp_path, capsys):
    lines = [
        chat("Who?", "Ann lives on Elm Lane."),
        "{broken",
        chat("Where?", "In the old house by the"),
        "",
        chat("Who?", "Ann lives on  Elm Lane."),
        chat("When?", "At noon.", id="noon", topic="time"),
        chat("Sing!", "La la la la la la la la."),
        chat("Which day is it?", "Friday."),
    ]
    data = write(tmp_path / "chats.jsonl", lines)
    more = write(tmp_path / "alpaca.jsonl", [{"instruction": "Who?", "output": "Nobody."}])
    held_out = write(tmp_path / "test.jsonl", [{"prompt": "which day is it"}])
    out = tmp_path / "out"
    assert main([f"--data={data},{more}", f"--out={out}", f"--against={held_out}", "--finished",
                 "--repetition=0.3", "--words=2..", "--max-bad-fraction=0.2"]) == 0  # fmt: skip

    kept = read_jsonl(out / "kept.jsonl", "conversation")
    assert [record.messages[-1].content for record in kept] == [
        "Ann lives on Elm Lane.",
        "At noon.",
    ]
    assert (kept[1].id, kept[1].meta) == ("noon", {"topic": "time"})
    fates = {(Path(f["source"]).name, f["line"]): f.get("reason", f.get("kept"))
             for f in read(out / "lineage.jsonl")}  # fmt: skip
    assert fates == {
        ("chats.jsonl", 1): 1,
        ("chats.jsonl", 2): "not read",
        ("chats.jsonl", 3): "truncated",
        ("chats.jsonl", 5): "duplicate",
        ("chats.jsonl", 6): 2,
        ("chats.jsonl", 7): "repetition",
        ("chats.jsonl", 8): "contaminated",
        ("alpaca.jsonl", 1): "length",
    }
    report = json.loads((out / "report.json").read_text())
    assert (report["read"], report["kept"]) == (8, 2)
    assert {each["reason"]: each["gone"] for each in report["reasons"]} == dict.fromkeys(
        ("not read", "duplicate", "contaminated", "truncated", "repetition", "length"), 1
    )
    (example,) = report["reasons"][1]["examples"]
    assert example == {"place": f"{data}:5", "why": f"a copy of {data}:1",
                       "text": "Who?\nAnn lives on  Elm Lane."}  # fmt: skip
    assert "kept" in capsys.readouterr().out


def test_a_tie_is_counted_as_not_read(tmp_path):
    pair = {"prompt": "Who?", "chosen": "Ann.", "rejected": "No."}
    data, out = write(tmp_path / "a.jsonl", [pair, pair | {"tie": True}]), tmp_path / "out"
    assert main([f"--data={data}", "--kind=pair", f"--out={out}"]) == 0
    report = json.loads((out / "report.json").read_text())
    counts = {each["reason"]: each["gone"] for each in report["reasons"]}
    assert (report["read"], report["kept"], counts) == (2, 1, {"not read": 1, "duplicate": 0})


def test_a_prompt_that_an_evaluation_set_asks_in_a_tie_is_not_trained_on(tmp_path):
    asked = "Where does the baker of this town sell his bread on Mondays?"
    held_out = {"prompt": asked, "chosen": "Here.", "rejected": "There.", "tie": True}
    against = write(tmp_path / "held_out.jsonl", [held_out])
    data = write(tmp_path / "a.jsonl", [chat(asked, "At the mill."), chat("Who?", "Ann.")])
    out = tmp_path / "out"
    assert main([f"--data={data}", f"--against={against}", f"--out={out}"]) == 0
    assert [fate.get("reason") for fate in read(out / "lineage.jsonl")] == ["contaminated", None]


def test_what_the_system_says_everywhere_is_no_contamination(tmp_path):
    system = {"role": "system", "content": "You are the town's assistant. Answer in a sentence, "
              "be polite to whoever asks, and never tell what is not in the register."}  # fmt: skip
    asked = "Who sells bread beside the mill on Mondays and on Fridays?"
    held_out = {"messages": [system, {"role": "user", "content": asked}]}
    against = write(tmp_path / "held_out.jsonl", [held_out])
    chats = [chat("Where does the postman live?", "On Elm Lane."), chat(asked, "Ann.")]
    chats = [{"messages": [system, *each["messages"]]} for each in chats]
    data, out = write(tmp_path / "a.jsonl", chats), tmp_path / "out"
    assert main([f"--data={data}", f"--against={against}", f"--out={out}"]) == 0
    assert [fate.get("reason") for fate in read(out / "lineage.jsonl")] == [None, "contaminated"]


def test_ties_beyond_a_slice_are_not_read(tmp_path):
    pair = {"prompt": "Who?", "chosen": "Ann.", "rejected": "No."}
    lines = [pair, pair | {"tie": True}, pair | {"prompt": "Where?"}, pair | {"prompt": "When?"},
             pair | {"tie": True}, pair | {"tie": True}]  # fmt: skip
    data = write(tmp_path / "a.jsonl", lines)
    for part, left_out in (("[:2]", [2]), ("[2:]", [5, 6]), ("[1:2]", [])):
        out = tmp_path / f"out{part}"
        assert main([f"--data={data}{part}", "--kind=pair", f"--out={out}"]) == 0
        fates = read(out / "lineage.jsonl")
        assert [fate["line"] for fate in fates if "kept" not in fate] == left_out


def test_the_page_shows_texts_as_texts_and_three_of_a_reason(tmp_path):
    lines = [chat("Who?", "<b>Ann</b> & co")] * 6
    out = tmp_path / "out"
    assert main([f"--data={write(tmp_path / 'a.jsonl', lines)}", f"--out={out}"]) == 0
    page = (out / "report.html").read_text()
    assert page.count("&lt;b&gt;Ann&lt;/b&gt; &amp; co") == 3 and "<b>Ann" not in page
    assert json.loads((out / "report.json").read_text())["reasons"][0]["gone"] == 5


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]}  # fmt: skip
EACH = {
    "text": {"text": " Two\nlines ", "url": "x", "n": 3},
    "conversation": {"messages": [{"role": "user", "content": "When?"}, CALL], "tools": TOOLS,
                     "prompt": "a column of that name", "meta": {"id": "inner"}},
    "pair": {"prompt": "Who?", "chosen": "Ann.", "rejected": "", "margin": 0.5, "id": 7},
    "prompt": {"messages": [{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": "Who?"}], "answer": "Ann"},
    "preference": {"prompt": "Who?", "completion": "Ann.", "label": False},
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
           "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
}  # fmt: skip


@pytest.mark.parametrize("kind", EACH)
def test_what_is_written_is_read_as_the_same_record(kind, tmp_path):
    (record,) = read_jsonl(write(tmp_path / "a.jsonl", [EACH[kind]]), kind)
    again = write(tmp_path / "b.jsonl", [to_json(record)])
    assert read_jsonl(again, "pair" if kind == "hh" else kind) == [record]
    (read_again,) = read_jsonl(again, "pair" if kind == "hh" else kind)
    assert read_again.meta == record.meta


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_file_goes_through_the_command_again_as_it_is(kind, tmp_path):
    data = write(tmp_path / "a.jsonl", [EACH[kind], EACH[kind] | {"id": "again"}])
    for name in ("one", "two"):
        assert main([f"--data={data}", f"--kind={kind}", f"--out={tmp_path / name}"]) == 0
        data = str(tmp_path / name / "kept.jsonl")
    first, second = (tmp_path / name / "kept.jsonl" for name in ("one", "two"))
    assert first.read_text() == second.read_text() and first.read_text().count("\n") == 1


def test_a_part_of_a_file_is_filtered_by_the_lines_that_it_has(tmp_path):
    lines = ["", *(chat(f"Who is number {n}?", "Ann.") for n in range(4))]
    data, out = write(tmp_path / "a.jsonl", lines), tmp_path / "out"
    assert main([f"--data={data}[1:3]", f"--out={out}"]) == 0
    assert [fate["line"] for fate in read(out / "lineage.jsonl")] == [3, 4]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [chat("Who?", "Ann"), chat("When?", "At")])
    out = f"--out={tmp_path / 'out'}"
    given = (f"--data={data}", out)
    assert "no records are left of 2: 2 truncated" in refused(capsys, *given, "--finished")
    assert "--score and --scorer need each other" in refused(capsys, *given, "--score=1..")
    assert "LOW..HIGH" in refused(capsys, *given, "--words=7")
    assert "no records are left of 2: 2 length" in refused(capsys, *given, "--words=9..")
    assert "--overlap needs --against" in refused(capsys, *given, "--overlap=1")
    assert "--near must be above 0" in refused(capsys, *given, "--near=1.5")
    assert "no directory" in refused(capsys, *given, "--perplexity=..9", "--model=nowhere")
    assert "'length' is no scorer here" in refused(capsys, *given, "--score=1..", "--scorer=length")
    assert "nothing to verify" in refused(capsys, *given, "--score=1..", "--scorer=gold")
    assert "have none" in refused(capsys, *given, "--kind=prompt", "--score=1..", "--scorer=gold")
    assert "missing key" in refused(capsys, *given, "--kind=pair")
    assert "no.jsonl" in refused(capsys, *given, f"--against={tmp_path / 'no.jsonl'}")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "mine.txt", ["x"])
    assert "is not empty" in refused(capsys, *given)


DRAWS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.mark.parametrize("seed", DRAWS)
def test_defects_of_a_town_are_found_and_little_else_goes(seed, tmp_path):
    """Of 800 answers and 50 more with each defect; `pytest -n 0 -s` shows the table."""
    pytest.importorskip("datasketch", reason="requirements-filter.txt is not installed")
    truth = with_defects(clean_records(800), each=50, seed=seed)
    data = write(tmp_path / "town.jsonl", [to_json(record) for record, _ in truth])
    assert main([
        f"--data={data}", f"--out={tmp_path / 'out'}", "--against=town/prompt@validation",
        "--overlap=1", "--finished", "--repetition=0.3", f"--words=1..{LONGEST + 40}",
        "--score=1..", "--scorer=correct", "--near=0.8",
    ]) == 0  # fmt: skip
    found = [fate.get("reason", "") for fate in read(tmp_path / "out" / "lineage.jsonl")]
    hits = Counter(f for f, (_, defect) in zip(found, truth, strict=True) if f == defect)
    measured = {d: (hits[d] / max(1, found.count(d)), hits[d] / 50) for d in DEFECTS}
    for defect, (precision, recall) in measured.items():
        print(f"{defect:15} precision {precision:.3f}  recall {recall:.3f}")
    for defect in ("duplicate", "contaminated", "truncated"):
        assert min(measured[defect]) >= 0.95, (defect, measured[defect])
    for defect in ("repetition", "length", "score", "near duplicate"):
        assert min(measured[defect]) >= 0.8, (defect, measured[defect])
