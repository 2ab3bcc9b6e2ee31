"""Checkpoints made by transformers, through SFT, DPO and GRPO under LoRA, and back."""

from __future__ import annotations

import pytest

from rlhf_jax.data import chat
from rlhf_jax.data.records import Message
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.model import load_model
from tests.data.test_hub_tokenizer import write
from tests.stages.conftest import run_main

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
LONG = ["--config.data.row_length=768"]
SAMPLED = ["--config.rollout.max_prompt_tokens=600", "--config.init.reward="]
ADAPTER = ["--config.adapter.rank=8", "--config.optimizer.learning_rate=1e-2"]


def greedy(model, prompts):
    options = {"max_new_tokens": 64, "temperature": 0.0, "stop_ids": (), "seed": 0}
    found = generate(model.config, model.params, prompts, **options)
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

    def run(stage, policy, *options):
        arguments = [f"--config={experiments}/{stage}.py", f"--workdir={tmp_path}/{stage}"]
        options = [f"--config.init.policy={policy}", *LONG, *ADAPTER, *options]
        result = run_main(*arguments, *options)
        assert result.returncode == 0, result.stderr[-2000:]
        return tmp_path / stage

    sft = run("sft", given)
    dpo = run("dpo", sft)
    grpo = run("grpo", dpo, *SAMPLED)
    model = load_model(grpo)
    asked = ["What is 2 plus 3?", "Hello there.", "Where does Ann live?"]
    prompts = [chat.render_prompt([Message("user", text)], model.tokenizer) for text in asked]
    ours = greedy(model, prompts)
    assert ours != greedy(load_model(given), prompts)

    exports = {"adapter": [], "merged": ["--merge"]}
    for name, options in exports.items():
        arguments = (f"--workdir={grpo}", f"--out={tmp_path}/{name}", *options)
        result = run_main(*arguments, module="rlhf_jax.export")
        assert result.returncode == 0, result.stderr[-2000:]
    base = transformers.AutoModelForCausalLM.from_pretrained(given)
    on_base = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    spoken = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, prompt, wanted in zip(asked, prompts, ours, strict=True):
        messages = [{"role": "user", "content": text}]
        theirs = spoken.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert theirs == prompt
        for model_there in (on_base, merged):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                found = model_there.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                    do_sample=False, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            assert found[0, len(prompt) :].tolist() == wanted
    assert greedy(load_model(tmp_path / "merged"), prompts) == ours
