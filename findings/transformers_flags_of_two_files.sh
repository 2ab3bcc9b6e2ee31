#!/usr/bin/env bash
# transformers 5.23.0, tokenizers as it brings: flags in tokenizer_config.json beat tokenizer.json.
#
# An added token's flags (lstrip, rstrip, normalized, special) stand in two files of a checkpoint:
# tokenizer.json, which the tokenizers library reads, and tokenizer_config.json, under
# added_tokens_decoder. A good engineer would expect tokenizer.json alone to say how text is cut, as
# it holds the whole pipeline. Seen where the two differ in lstrip: transformers cuts as
# tokenizer_config.json says, the tokenizers library as tokenizer.json says, so that the same folder
# gives "a <t>" two or three ids. Nothing is said. What reads tokenizer.json alone must take the
# flags from the other file.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

vocabulary = {"a": 0, "Ġ": 1, "<unk>": 2}
made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_tokens([AddedToken("<t>", lstrip=False, rstrip=False, normalized=False)])
folder = pathlib.Path("model")
folder.mkdir()
made.save(str(folder / "tokenizer.json"))
number = made.token_to_id("<t>")
flags = {"content": "<t>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
(folder / "tokenizer_config.json").write_text(
    json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(number): flags | {"special": False}},
        }
    )
)
alone = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a <t>").ids
loaded = PreTrainedTokenizerFast.from_pretrained("model")("a <t>")["input_ids"]
print(f"tokenizers: {alone}; transformers: {loaded}")
assert alone == [0, 1, number], alone
assert loaded == [0, number], loaded
PYTHON
