"""What is exported loads in transformers and is the same model, tokens and chats included."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import chat
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.export import main
from rlhf_jax.models import PRESETS, apply, init, logits, scores
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.model import Model, load_model, save_model
from tests.data.test_hub_tokenizer import CONVERSATION, TEXT

LAYOUTS = {"tiny": "Qwen3", "125m": "GPT2", "1b": "Llama"}


SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "mlp_width": 48}


def small(preset, vocabulary, **changes):
    fields = SMALL | {"max_length": 64, "compute_dtype": "float32"} | changes
    config = dataclasses.replace(PRESETS[preset], vocab_size=vocabulary, **fields)
    return config, init(config, jax.random.key(0))


def saved(tmp_path, preset, **changes):
    tokenizer = train_bpe(TEXT, 400)
    config, params = small(preset, tokenizer.vocab_size, **changes)
    run = tmp_path / "run"
    run.mkdir()
    save_model(run, Model(config, params, tokenizer))
    return run, config, params, tokenizer


@pytest.mark.parametrize("preset", ["tiny", "1b", pytest.param("125m", marks=pytest.mark.slow)])
def test_a_language_model_is_the_same_there(tmp_path, preset):
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    run, config, params, tokenizer = saved(tmp_path, preset)
    assert main([f"--workdir={run}", f"--out={tmp_path}/out", "--shard-bytes=30000"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__.startswith(LAYOUTS[preset])
    spoken = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    tokens, _ = chat.render_conversation(CONVERSATION, tokenizer)
    assert spoken.apply_chat_template(messages, return_dict=False) == tokens
    prompt = spoken.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert prompt == chat.render_prompt(CONVERSATION[:3], tokenizer)
    tokens = tokens[:60]
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens])).logits[0].numpy()
    hidden = apply(config, params, jnp.asarray([tokens], jnp.int32)).hidden
    np.testing.assert_allclose(logits(config, params, hidden)[0], wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        greedy = theirs.generate(torch.tensor([tokens[:5]]), max_new_tokens=16, do_sample=False)
    options = {"max_new_tokens": 16, "temperature": 0.0, "stop_ids": (), "seed": 0}
    (ours,) = generate(config, params, [tokens[:5]], **options)
    assert tokens[:5] + list(ours.tokens) == greedy[0].tolist()


def test_a_reward_model_is_the_same_there(tmp_path):
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    run, config, params, tokenizer = saved(tmp_path, "tiny", head="scalar")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out"]) == 0
    again = load_model(tmp_path / "out")
    assert again.config.head == "scalar"
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens, _ = chat.render_conversation(CONVERSATION, tokenizer)
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor([tokens[:64]])).logits
    hidden = apply(config, params, jnp.asarray([tokens[:64]], jnp.int32)).hidden
    ours = scores(config, params, hidden)[0, -1]
    np.testing.assert_allclose(ours, wanted[0, 0].item(), rtol=1e-4, atol=1e-4)


def test_what_is_exported_is_read_again_bitwise(tmp_path):
    run, _, params, tokenizer = saved(tmp_path, "tiny")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out"]) == 0
    again = load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    user = [Message("user", "What is 12 + 30?")]
    assert chat.render_prompt(user, again.tokenizer) == chat.render_prompt(user, tokenizer)
    assert chat.render_replies(user, ["It is 42."], again.tokenizer) == chat.render_replies(
        user, ["It is 42."], tokenizer
    )
    assert again.tokenizer.ends == tokenizer.ends


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    run, *_ = saved(tmp_path, "tiny", head="scalar")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out"]) == 0
    path = tmp_path / "out/config.json"
    document = json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b"}}
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="a classifier of 2 labels; a reward model has one"):
        load_model(tmp_path / "out")


def test_mistakes_end_in_one_line(tmp_path, capsys):
    run, *_ = saved(tmp_path, "tiny")
    assert main([f"--workdir={run}", f"--out={run}"]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert main([f"--workdir={run}", f"--out={tmp_path}/o", "--dtype=int8"]) == 2
    assert "choose one of float32, bfloat16, float16" in capsys.readouterr().err
    assert main([f"--workdir={tmp_path}", f"--out={tmp_path}/p"]) == 2
    assert main(["--out=x"]) == 2
