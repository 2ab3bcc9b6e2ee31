#!/usr/bin/env bash
# CTranslate2 4.8.5 with transformers 4.57.3, torch 2.13.0: rope_scaling drops the theta of a Llama.
#
# A good engineer would expect CTranslate2's converter to keep the rope_theta of a config.json,
# scaled or not, whichever transformers loads the model for it. Seen on a small random Llama with a
# theta of 500,000: without scaling, log-probabilities are those of transformers. With a linear
# rope_scaling beside the theta they are apart by more than 1, and equal to those of a model with
# that scaling and a theta of 10,000, and nothing is said. The converter looks for theta inside the
# section alone, where transformers 5.23.0 puts it: with that version both models are right. Whoever
# converts a scaled Llama must have transformers 5.x there and compare log-probabilities.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$work"
cat >compare.py <<'PYTHON'
import json
import pathlib
import sys

import ctranslate2
import numpy
import torch
import transformers
from tokenizers import Tokenizer, models

WORDS = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(61)]
SCALING = {"rope_type": "linear", "factor": 2.0}
path = pathlib.Path("model", "config.json")


def with_transformers(config):
    path.write_text(json.dumps(config))
    model = transformers.LlamaForCausalLM.from_pretrained("model").eval()
    with torch.no_grad():
        return model(torch.arange(3, 51)[None]).logits[0].log_softmax(-1).numpy()


def with_ctranslate2(config):
    path.write_text(json.dumps(config))
    ctranslate2.converters.TransformersConverter("model").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", device="cpu", compute_type="float32")
    return numpy.array(generator.forward_batch([WORDS[3:51]], return_log_probs=True))[0]


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
base = {key: value for key, value in json.loads(path.read_text()).items() if "rope" not in key}
plain = base | {"rope_theta": 5e5}
scaled = plain | {"rope_scaling": SCALING}
low = scaled | {"rope_theta": 1e4}
print(f"CTranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}")
converted = with_ctranslate2(scaled)
apart = {
    "theta 500,000": abs(with_ctranslate2(plain) - with_transformers(plain)).max(),
    "theta 500,000, scaled": abs(converted - with_transformers(scaled)).max(),
    "the same against theta 10,000, scaled": abs(converted - with_transformers(low)).max(),
}
for name, value in apart.items():
    print(f"  {name}: apart by up to {value:.2g}")
same = [bool(value < 1e-3) for value in apart.values()]
wanted = [True, False, True] if transformers.__version__.startswith("4.") else [True, True, False]
sys.exit(0 if same == wanted else 1)
PYTHON
for version in 4.57.3 5.23.0; do
  venv/bin/pip install --quiet --disable-pip-version-check ctranslate2==4.8.5 "transformers==$version"
  rm -rf model converted
  venv/bin/python compare.py 2>said || { cat said >&2; exit 1; }
  if grep -qiE "rope|theta" said; then
    cat said
    exit 1
  fi
done
echo "warnings that name rope or theta: none"
