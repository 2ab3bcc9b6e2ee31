#!/usr/bin/env bash
# datasets 5.2.0 with a chat template: a tool call gets the arguments of other rows' calls, as null.
#
# A conversation's calls name a tool and its arguments, other ones for each tool. A good engineer would expect
# the same rows from `Dataset.from_list(rows)` as from `load_dataset("json", …)` of a file that holds them.
# Seen: the file's messages keep their keys (a column of JSON), while `from_list` makes one struct type of all
# rows: each message gets every key of any message, and each call's arguments those of every other tool, as
# None. A chat template writes arguments with `tojson`, so the call that is trained on becomes
# {"city": "Paris", "a": null, "b": null}, which no tool takes; and a test such as "'tool_calls' in message"
# holds for every message. How many arguments are added depends on which rows are in the list. Write the
# arguments as a JSON string, or the rows to a file first.
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

from datasets import Dataset, load_dataset
from jinja2 import Environment

# As the templates of Hermes and Qwen write a call; `tojson` is what transformers gives them.
environment = Environment()
environment.filters["tojson"] = json.dumps
TEMPLATE = environment.from_string(
    "{% for message in messages %}{% if 'tool_calls' in message and message.tool_calls %}"
    '{% for call in message.tool_calls %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}{% endif %}{% endfor %}"
)


def conversation(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages}


rows = [conversation("weather", {"city": "Paris"}), conversation("add", {"a": 17, "b": 25})]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
from_file = load_dataset("json", data_files="rows.jsonl", split="train")
from_list = Dataset.from_list(rows)
texts = [TEMPLATE.render(each[0]) for each in (from_file, from_list)]
print("from a file:", texts[0])
print("from a list:", texts[1])
keys = [[sorted(each[0]["messages"][0]) for each in (from_file, from_list)]]
print("keys of the user's message:", *keys)
right = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
sys.exit(texts != [right, right.replace('"Paris"', '"Paris", "a": null, "b": null')])
PYTHON
