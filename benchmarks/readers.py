"""Which other programs compute the same from what `rlhf_jax.export` writes: READERS.md.

    python -m benchmarks.readers --reader transformers=PYTHON --reader mlx-lm=PYTHON \\
        --reader ctranslate2=PYTHON --reader llama.cpp=PYTHON --converter=convert_hf_to_gguf.py

PYTHON is that of an environment with the reader (for mlx-lm: mlx[cpu]; for llama.cpp: xllamacpp and
what its converter imports); --reader may be given again with another version. Every family is
exported with random weights, once with RoPE as it is (θ = 500,000) and once under each kind of
scaling; families with a window also with one that is shorter than the rows, and those whose models
all have θ = 10,000 with that. A cell says how far the reader's log-probs after the last token of a
row are from ours, or why it would not read the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.tokenizer import OwnTokenizer, train_bpe
from rlhf_jax.export import export
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.models import apply, init, logits
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.saved_model import Model, save_model

CLOSE = 5e-3  # nats; llama.cpp's tables of GELU are in half precision
LENGTHS = (8, 24, 60)
WINDOW = 16
THETA = {"rope_theta": 500_000.0}
LONG = {"factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | LONG,
    "yarn": {"rope_type": "yarn"} | LONG,
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2}
MULTIHEAD = {"num_key_value_heads": 4}
SIX = {"num_hidden_layers": 6, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "sliding_window": None} | EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True} | EXPERTS,
    "gemma": MULTIHEAD,
    "gemma2": {"sliding_window": 64} | SIX,
    "gemma3_text": {"sliding_window": 64} | SIX,
    "olmo2": {},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    "gpt_neox": {"intermediate_size": 256} | MULTIHEAD,
}
MORE = {
    "mistral": ("window",),
    "gemma": ("θ = 10,000",),
    "gemma2": ("window", "θ = 10,000"),
    "gemma3_text": ("window",),
    "gpt_neox": ("θ = 10,000",),
}


def model_config(family: str, variant: str, vocab_size: int, folder: Path) -> ModelConfig:
    """A small model of the family, as its config.json is read."""
    document = {"model_type": family, "vocab_size": vocab_size, **FAMILIES[family]}
    if family != "gpt2":
        rope = VARIANTS.get(variant, VARIANTS["plain"]) | THETA
        if variant == "θ = 10,000":
            rope["rope_theta"] = 10_000.0
        if family == "gpt_neox":
            rope["partial_rotary_factor"] = 0.5
        if family == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": 10_000.0}
            rope = {"full_attention": rope, "sliding_attention": local}
        document = SHAPE | document | {"rope_parameters": rope}
    if variant == "window":
        document["sliding_window"] = WINDOW
    (folder / "config.json").write_text(json.dumps(document))
    _, config = read_config(folder)
    return dataclasses.replace(config, compute_dtype="float32", remat="none")


def random_params(config: ModelConfig) -> Any:
    """Random weights, norms and biases too, so that none can hide a mistake."""
    params = init(config, jax.random.key(0))
    leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape) if path[-1].key != "kernel" else leaf
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def make(
    folder: Path, family: str, variant: str, tokenizer: OwnTokenizer
) -> tuple[Path, np.ndarray]:
    """(the exported directory, our log-probs [lengths, vocabulary])."""
    folder.mkdir()
    config = model_config(family, variant, tokenizer.vocab_size, folder)
    params = random_params(config)
    (folder / "run").mkdir()
    save_model(folder / "run", Model(config, params, tokenizer))
    export(folder / "run", folder / "out", dtype="float32", shard_bytes=10**9)
    settings = folder / "out/tokenizer_config.json"  # of a Hub model of most families
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"unk_token": "<|pad|>"}))
    written = json.loads((folder / "out/config.json").read_text())["model_type"]
    assert written == family, f"{family} was written as {written}"
    hidden = apply(config, params, jnp.asarray([rows(config.vocab_size)[-1]])).hidden
    found = jax.nn.log_softmax(logits(config, params, hidden)[0], axis=-1)
    return folder / "out", np.asarray(found)[np.array(LENGTHS) - 1]


def rows(vocab_size: int) -> list[list[int]]:
    """Beginnings of one row of random tokens, without control tokens."""
    ids = np.random.default_rng(0).integers(10, vocab_size, max(LENGTHS))
    return [ids[:n].tolist() for n in LENGTHS]


def ask(reader: str, python: str, more: list[str], cases: dict[str, Any]) -> tuple[str, Any]:
    """(the reader's name, its answers by case); one that ends in the middle is started again."""
    answers: dict[str, Any] = {}
    name = reader
    while left := {case: given for case, given in cases.items() if case not in answers}:
        command = [python, "-m", "benchmarks.reader", reader, *more]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(
                command, input=json.dumps(left), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:]
        begun = None
        for line in done.stdout.splitlines():
            said = json.loads(line)
            name, begun = said.get("reader", name), said.get("case", begun)
            if len(said) > 1:
                answers[begun] = said
        if begun is None:
            sys.exit(f"{reader} in {python}: {' '.join(last)}")
        answers.setdefault(begun, {"refused": f"ended with {done.returncode}: {' '.join(last)}"})
    return name, answers


def cell(answer: dict[str, Any], wanted: np.ndarray, notes: list[str]) -> str:
    """What the table says: the distance, or the number of a note with the reader's words."""
    if refused := answer.get("refused"):
        words = " ".join(refused.split()).replace("|", "\\|")[:200]
        if words not in notes:
            notes.append(words)
        return f"[{notes.index(words) + 1}]"
    found = [np.asarray(x)[: len(w)] for x, w in zip(answer["logprobs"], wanted, strict=True)]
    off = max(float(np.abs(x - w).max()) for x, w in zip(found, wanted, strict=True))
    return "same" if off < CLOSE else f"**{off:.2g} off**"


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads exports with other programs.")
    parser.add_argument("--reader", action="append", required=True, metavar="READER=PYTHON")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these")
    given = parser.parse_args()
    text = Path(__file__).read_text("utf-8")
    tokenizer = train_bpe([text], 400)
    with tempfile.TemporaryDirectory() as folder:
        cases, wanted = {}, {}
        for family in given.family or FAMILIES:
            variants = ["plain"] if family == "gpt2" else [*VARIANTS]
            for variant in (*variants, *MORE.get(family, ())):
                case = f"{family} {variant}"
                path, wanted[case] = make(
                    Path(folder, case.replace(" ", "-")), family, variant, tokenizer
                )
                cases[case] = {"directory": str(path), "rows": rows(tokenizer.vocab_size)}
        answers = []
        for each in given.reader:
            reader, _, python = each.partition("=")
            more = [given.converter] if reader == "llama.cpp" else []
            answers.append(ask(reader, python, more, cases))
    notes: list[str] = []
    print("| | " + " | ".join(name for name, _ in answers) + " |")
    print("|---|" + "---|" * len(answers))
    for case, values in wanted.items():
        cells = [cell(answered[case], values, notes) for _, answered in answers]
        print(f"| {case} | " + " | ".join(cells) + " |")
    for i, note in enumerate(notes):
        print(f"\n[{i + 1}] `{note}`")


if __name__ == "__main__":
    main()
