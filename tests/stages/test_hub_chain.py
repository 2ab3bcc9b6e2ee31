"""The README's commands on checkpoints that transformers made: in, three stages of LoRA, out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Message
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.saved_model import load_model
from tests.hub.test_hub_tokenizer import write
from tests.stages.conftest import ROOT

torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
peft = pytest.importorskip("peft", reason="needs requirements-parity.txt")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# A few steps, and rates at which they change what a random model says.
SHORT = [
    *("--config.train.steps=4", "--config.train.tensorboard=False", "--config.batch.rows=2"),
    *("--config.eval.count=4", "--config.eval.max_new_tokens=12"),
    *("--config.optimizer.learning_rate=1e-2", "--config.optimizer.warmup_steps=1"),
]
SAMPLED = [
    *("--config.rollout.prompts=2", "--config.rollout.samples=4", "--config.rollout.slots=8"),
    *("--config.rollout.max_new_tokens=12", "--config.eval.during=4"),
]
REWARD = "def brevity(prompts, responses):\n    return [-len(r) for r in responses]\n"


def readme_commands():
    """Those of the section on one's own model, as lists of words."""
    section = (ROOT / "README.md").read_text("utf-8").split("## Your own model and data", 1)[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines()]


def greedy(model, prompts):
    sampling = Sampling(64, temperature=0.0)
    found = generate(model.config, model.params, prompts, sampling, seed=0)
    return [list(completion.tokens) for completion in found]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sft_dpo_grpo_and_export_say_the_same_there(experiments, tmp_path, family):
    torch.manual_seed(0)
    given = tmp_path / "given"
    given.mkdir()
    tokenizer = write(given, "chatml")
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size}
    made = transformers.AutoConfig.for_model(family, **shape)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(given)
    for name in ("chats", "pairs", "prompts"):
        shutil.copy(experiments / f"{name}.jsonl", tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")

    def run(words, typed=None):
        words = [word.replace("/path/to/model", str(given)) for word in words]
        if "rlhf_jax.main" in words:
            words += SHORT + (SAMPLED if "grpo" in words[3] else [])
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=600, input=typed,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    *stages, export, talk = readme_commands()
    preflight = run([*stages[0], "--preflight"])
    assert "chats.jsonl" in preflight and not (tmp_path / "runs").exists()
    for words in stages:
        run(words)
    run(export)
    run([*export[:-1], "--out=merged", "--merge"])
    assert run(talk, "Hello there.\n/quit\n")

    model = load_model(tmp_path / "runs/grpo-own")
    asked = ["What is 2 plus 3?", "Hello there.", "Where does Ann live?"]
    prompts = [render_prompt([Message("user", text)], model.tokenizer) for text in asked]
    ours = greedy(model, prompts)
    assert ours != greedy(load_model(given), prompts)
    assert greedy(load_model(tmp_path / "merged"), prompts) == ours

    base = transformers.AutoModelForCausalLM.from_pretrained(given)
    on_base = peft.PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for folder in ("mine", "merged"):
        spoken = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for text, prompt in zip(asked, prompts, strict=True):
            messages = [{"role": "user", "content": text}]
            theirs = spoken.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            assert theirs == prompt
    for model_there in (on_base, merged):
        for prompt, wanted in zip(prompts, ours, strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                found = model_there.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                    do_sample=False, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            assert found[0, len(prompt) :].tolist() == wanted
