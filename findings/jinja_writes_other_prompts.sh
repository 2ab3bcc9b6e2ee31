#!/usr/bin/env bash
# jinja2 3.1.6 beside transformers 5.23.0: the same chat template and tools give another prompt.
#
# Chat templates are Jinja, so a good engineer who serves or trains without transformers renders a checkpoint's
# template by jinja2's sandbox, with the trim_blocks and lstrip_blocks that the documentation names, and would
# expect the same text. Seen: most templates write tools and calls by `tojson`, which transformers replaces by
# one of its own. Jinja's is for web pages: it sorts the keys, so that a function's arguments change places and
# "description" comes before "name", and writes <, >, & and ' as \u003c, \u003e, \u0026 and \u0027; it also
# writes é as \u00e9. A model that was trained on one reads other tokens from the other. It shows with tools
# alone: plain chats are the same.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

# As Hermes, Qwen and Llama 3.1 write what may be called.
TEMPLATE = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{%- for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
)
tool = {
    "type": "function",
    "function": {
        "name": "compare",
        "description": "Whether a < b, 'strictly'.",
        "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}},
    },
}
messages = [{"role": "user", "content": "Is 2 < 3 & 'so on'?"}]
plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=TEMPLATE)


def of_both(tools):
    theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    return theirs, plain.render(messages=messages, tools=tools)


theirs, ours = of_both([tool])
print("transformers:", theirs.splitlines()[0])
print("jinja2:      ", ours.splitlines()[0])
chats_agree = len({*of_both(None)}) == 1
print("without tools they agree:", chats_agree)
first = [json.loads(text.splitlines()[0]) for text in (theirs, ours)]
orders = [[*each["function"]["parameters"]["properties"]] for each in first]
print("the arguments' order:", *orders)
escaped = r"Whether a \u003c b, \u0027strictly\u0027." in ours and "a < b, 'strictly'." in theirs
sys.exit(not (escaped and chats_agree and orders == [["b", "a"], ["a", "b"]] and first[0] == first[1]))
PYTHON
