#!/usr/bin/env bash
# CTranslate2 4.8.5, transformers 5.23.0, torch 2.13.0: llama3 scaling is accepted and not applied.
#
# The converter has a name for llama3 scaling and stores its factors. A good engineer would expect a
# Llama with the rope_scaling of Llama 3.1 (factor 8, original length 8192) to score text as
# transformers does. Seen on a small random Llama, on a CPU in float32: the converted model's
# log-probabilities are those of transformers with no scaling at all, over 48 tokens and over 3000,
# and differ from the scaled ones by more than 0.1. Nothing is said. Whoever serves such a model with
# CTranslate2 must compare log-probabilities with transformers first.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ctranslate2==4.8.5 transformers==5.23.0
cd "$work"
venv/bin/python - 2>said <<'PYTHON' || { cat said >&2; exit 1; }
import json
import pathlib
import sys

import ctranslate2
import numpy
import torch
import transformers
from tokenizers import Tokenizer, models

WORDS = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(61)]
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
path = pathlib.Path("model", "config.json")


def with_transformers(config, ids):
    path.write_text(json.dumps(config))
    model = transformers.LlamaForCausalLM.from_pretrained("model").eval()
    with torch.no_grad():
        return model(ids[None]).logits[0].log_softmax(-1).numpy()


def with_ctranslate2(config, ids):
    path.write_text(json.dumps(config))
    ctranslate2.converters.TransformersConverter("model").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", device="cpu", compute_type="float32")
    return numpy.array(generator.forward_batch([[WORDS[i] for i in ids]], return_log_probs=True))[0]


torch.manual_seed(0)
transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )
).save_pretrained("model")
transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")),
    unk_token="<unk>", bos_token="<s>", eos_token="</s>",
).save_pretrained("model")
plain = {key: value for key, value in json.loads(path.read_text()).items() if "rope" not in key}
plain |= {"max_position_embeddings": 65536, "rope_theta": 5e5}
scaled = plain | {"rope_scaling": SCALING}
print(f"CTranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}")
changed = False
for length in (48, 3000):
    ids = torch.randint(3, 64, (length,))
    converted = with_ctranslate2(scaled, ids)
    from_scaled = abs(converted - with_transformers(scaled, ids)).max()
    from_plain = abs(converted - with_transformers(plain, ids)).max()
    print(f"{length} tokens, apart from scaled by up to {from_scaled:.2g}, from not scaled {from_plain:.2g}")
    changed |= not (from_scaled > 0.1 and from_plain < 1e-2)
sys.exit(1 if changed else 0)
PYTHON
if grep -qiE "rope|scaling" said; then
  cat said
  exit 1
fi
echo "warnings that name rope or scaling: none"
