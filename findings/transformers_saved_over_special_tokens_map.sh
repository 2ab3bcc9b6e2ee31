#!/usr/bin/env bash
# transformers 5.23.0 over a folder of 4.57.3: a changed end or padding token is saved and not read.
#
# A good engineer would expect that a tokenizer loaded, given another eos_token and pad_token and
# saved to its own folder has them when loaded again. Seen: 5.23.0 writes them to
# tokenizer_config.json, drops added_tokens_decoder from it and leaves special_tokens_map.json as
# 4.57.3 wrote it. With no added_tokens_decoder, the reader lets that old file win, so the tokenizer
# comes back with the old tokens and nothing is said. Saved to an empty folder, it keeps the new
# ones. Whoever changes special tokens with 5.x must save to a new folder or remove
# special_tokens_map.json, and look at what is read back.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.3 5.23.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
cd "$work"
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
4.57.3/bin/python - <<'PYTHON'
import pathlib

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["<unk>", "<end>", "<turn>", "<pad>", "<fill>", "hello", "world"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(words[:5])
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
).save_pretrained("model")
print(f"{transformers.__version__} wrote", sorted(path.name for path in pathlib.Path("model").iterdir()))
PYTHON
5.23.0/bin/python - <<'PYTHON'
import json
import pathlib
import sys

import transformers
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
print(f"{transformers.__version__} reads", tokenizer.eos_token, tokenizer.pad_token)
tokenizer.eos_token, tokenizer.pad_token = "<turn>", "<fill>"
found = {}
for folder in ("model", "empty"):
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    found[folder] = (again.eos_token, again.pad_token)
    stated = json.loads(pathlib.Path(folder, "tokenizer_config.json").read_text())
    print(
        f"saved to {folder}: tokenizer_config.json says {stated['eos_token']} {stated['pad_token']}, "
        f"special_tokens_map.json is there: {pathlib.Path(folder, 'special_tokens_map.json').exists()}, "
        f"read again: {' '.join(found[folder])}"
    )
sys.exit(0 if found == {"model": ("<end>", "<pad>"), "empty": ("<turn>", "<fill>")} else 1)
PYTHON
