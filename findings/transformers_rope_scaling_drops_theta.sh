#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: rope_scaling added to a config.json of 5.x drops its theta.
#
# Model cards tell users to add a rope_scaling section with YaRN's type, factor and original length
# to config.json. A good engineer would expect it to join the rope_parameters that 5.x writes
# there, or to be refused. Seen for Llama and Qwen3: it replaces rope_parameters whole, with the
# theta of 1,000,000 that stands in it, and the model is built with 10,000. No warning speaks of it.
# The right frequencies come of a rope_theta at the top level, or of the recipe written into
# rope_parameters beside the theta. Whoever follows such a card on a model saved by 5.x must print
# config.rope_parameters before use.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import pathlib
import sys

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

RECIPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
found = []
print(f"transformers {transformers.__version__}")
for kind in (transformers.LlamaConfig, transformers.Qwen3Config):
    kind(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ).save_pretrained("model")
    path = pathlib.Path("model", "config.json")
    saved = json.loads(path.read_text())
    for name, added in {
        "as saved": {},
        "rope_scaling added": {"rope_scaling": RECIPE},
        "and rope_theta": {"rope_scaling": RECIPE, "rope_theta": 1e6},
        "in rope_parameters": {"rope_parameters": RECIPE | {"rope_theta": 1e6}},
    }.items():
        path.write_text(json.dumps(saved | added))
        config = AutoConfig.from_pretrained("model")
        last = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq[-1].item()
        found.append((config.rope_parameters["rope_theta"], f"{last:.2e}"))
        print(f"{config.model_type}, {name}: {config.rope_parameters}, last frequency {last:.2e}")
wanted = [(1e6, "5.62e-06"), (1e4, "1.38e-04"), (1e6, "1.41e-06"), (1e6, "1.41e-06")]
sys.exit(0 if found == wanted * 2 else 1)
PYTHON
if grep -qiE "rope|theta" said; then
  cat said
  exit 1
fi
echo "warnings that name rope or theta: none"
