#!/usr/bin/env bash
# datasets 5.2.0: text in a JSON file that looks like a date arrives as a datetime, if the column does.
#
# In a JSONL file "2024-05-01" is a string, and a good engineer would expect the answer that a model is to
# give, or is judged by, to arrive as written. Seen: where every value of a top-level column reads as an ISO
# date or date and time, `load_dataset("json", …)` makes a timestamp column of it, and the answer is a
# `datetime`, whose text is "2024-05-01 00:00:00": an exact match with the right reply fails, and a chat
# template writes the time into the reply that is trained on. Declaring the column as text (`features=`)
# gives text, of the datetime: "2024-05-01 00:00:00". One value that is no date keeps all of them as they
# are, so a sample, a filtered file or another split differs from the whole. "12:30", "1" and "true" stay,
# and so do dates inside messages. Read such a file with `json`, or keep the answer inside an object.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 jinja2==3.1.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import sys
import tempfile
from pathlib import Path

from datasets import Features, Value, load_dataset
from jinja2 import Template


def read(answers, **options):
    file = Path(tempfile.mkdtemp(dir=".")) / "answers.jsonl"
    file.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    rows = load_dataset("json", data_files=str(file), split="train", **options)
    template = Template("<|assistant|>{{ answer }}")
    return [template.render(row) for row in rows]


dates = ["2024-05-01", "2023-01-31"]
seen = {
    "dates": read(dates),
    "dates and one word": read([*dates, "never"]),
    "dates, declared as text": read(dates, features=Features({"answer": Value("string")})),
    "times of day": read(["12:30", "13:45"]),
}
for what, texts in seen.items():
    print(f"{what}: {texts}")
first = [texts[0].removeprefix("<|assistant|>") for texts in seen.values()]
sys.exit(first != ["2024-05-01 00:00:00", "2024-05-01", "2024-05-01 00:00:00", "12:30"])
PYTHON
