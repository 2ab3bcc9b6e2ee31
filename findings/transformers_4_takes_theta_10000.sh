#!/usr/bin/env bash
# transformers 4.57.3 on a Llama model that 5.23.0 saved, torch 2.13.0: theta is 10,000.
#
# A good engineer would expect the older program to read the newer one's config.json right or to
# refuse it. Seen: 5.23.0 writes theta in rope_parameters alone, which 4.57.3 keeps and does not
# use. It builds the model with its default of 10,000, loads every weight and says nothing of theta;
# log-probabilities of a small random model move by more than 1. With rope_theta written at the top
# level as well, the two agree. Whoever publishes a model saved by 5.x for readers of 4.x must add
# rope_theta to config.json.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.3; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
cd "$work"
5.23.0/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import pathlib

import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
model = transformers.LlamaForCausalLM(config).eval()
for folder in ("saved", "both"):
    model.save_pretrained(folder)
path = pathlib.Path("both", "config.json")
written = json.loads(path.read_text())
path.write_text(json.dumps(written | {"rope_theta": 1e6}))
print(f"{transformers.__version__} wrote", {key: value for key, value in written.items() if "rope" in key})
with torch.no_grad():
    torch.save(model(torch.arange(3, 51)[None]).logits.log_softmax(-1), "logprobs.pt")
PYTHON
4.57.3/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import sys

import torch
import transformers

wanted = torch.load("logprobs.pt")
found = {}
for folder in ("saved", "both"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        apart = (model(torch.arange(3, 51)[None]).logits.log_softmax(-1) - wanted).abs().max().item()
    found[folder] = (model.config.rope_theta, apart)
    print(
        f"{transformers.__version__} on {folder}: rope_theta {model.config.rope_theta}, "
        f"log-probabilities apart by up to {apart:.2g}"
    )
changed = found["saved"][0] != 1e4 or found["saved"][1] < 1 or found["both"][1] > 1e-3
sys.exit(1 if changed else 0)
PYTHON
if grep -qiE "rope|theta" said; then
  cat said
  exit 1
fi
echo "warnings that name rope or theta: none"
