"""What is exported loads in transformers and is the same model, tokens and chats included."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlhf_jax
from rlhf_jax.data.conversation import render_prompt, render_replies
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.export import main, push
from rlhf_jax.hub.hf_weights import write_weights
from rlhf_jax.models import PRESETS, apply, init, logits, scores
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.saved_model import Model, as_trainable, load_model, save_model
from tests.hub.test_hub_tokenizer import CONVERSATION, TEXT, write
from tests.rendered import render_conversation

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
    tokens, _ = render_conversation(CONVERSATION, tokenizer)
    assert spoken.apply_chat_template(messages, return_dict=False) == tokens
    prompt = spoken.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(CONVERSATION[:3], tokenizer)
    tokens = tokens[:60]
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens])).logits[0].numpy()
    hidden = apply(config, params, jnp.asarray([tokens], jnp.int32)).hidden
    np.testing.assert_allclose(logits(config, params, hidden)[0], wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        greedy = theirs.generate(torch.tensor([tokens[:5]]), max_new_tokens=16, do_sample=False)
    sampling = Sampling(16, temperature=0.0)
    (ours,) = generate(config, params, [tokens[:5]], sampling, seed=0)
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
    tokens, _ = render_conversation(CONVERSATION, tokenizer)
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
    assert render_prompt(user, again.tokenizer) == render_prompt(user, tokenizer)
    assert render_replies(user, ["It is 42."], again.tokenizer) == render_replies(
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


def hub_directory(path, dtype="float32", kind="chatml", **changes):
    """A Hub directory with a small random model and settings beyond the usual."""
    path.mkdir()
    tokenizer = write(path, kind)
    config, params = small("1b", tokenizer.vocab_size, **changes)
    write_weights(path, config, params, dtype=dtype, extra=tokenizer.special_ids)
    return tokenizer


def change(path, **values):
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | values))


SETTINGS = {
    "pad_token": "<think>",
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": True,
    "extra_special_tokens": ["<|im_start|>"],
}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95} | {
    "repetition_penalty": 1.05
}


@pytest.mark.parametrize("through_a_run", [False, True])
def test_settings_come_out_as_they_came(tmp_path, through_a_run):
    tokenizer = hub_directory(tmp_path / "given")
    change(tmp_path / "given/tokenizer_config.json", **SETTINGS)
    pad, (end,) = tokenizer.vocab_size - 1, tokenizer.ends
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    change(tmp_path / "given/config.json", **ids)
    came = GENERATION | {"eos_token_id": [end], "pad_token_id": pad}
    change(tmp_path / "given/generation_config.json", **came)
    source = tmp_path / "given"
    if through_a_run:
        source = tmp_path / "run"
        source.mkdir()
        model = load_model(tmp_path / "given")
        save_model(source, dataclasses.replace(model, adapter=None, base=None))
    assert main([f"--workdir={source}", f"--out={tmp_path}/out"]) == 0
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    wanted = SETTINGS | {"bos_token": None, "eos_token": "<|im_end|>"}
    wanted["additional_special_tokens"] = wanted.pop("extra_special_tokens")
    assert {name: settings.get(name, "absent") for name in wanted} == wanted
    assert "chat_template" not in settings
    template = (tmp_path / "out/chat_template.jinja").read_text()
    given = json.loads((tmp_path / "given/tokenizer_config.json").read_text())
    assert template == given["chat_template"]
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == came
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in ids} == ids

    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("given", "out")
    )
    for name in (
        *("pad_token", "bos_token", "eos_token", "padding_side", "truncation_side"),
        *("model_max_length", "special_tokens_map", "all_special_ids", "chat_template"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    defaults = [
        transformers.GenerationConfig.from_pretrained(tmp_path / name).to_dict()
        for name in ("given", "out")
    ]
    assert defaults[0] == defaults[1]
    batch = ours(["What is 12 + 30?", "One"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1, 0] == pad and batch["attention_mask"][1, 0] == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert loaded.generate(**batch, max_new_tokens=2).shape[0] == 2


def test_what_names_no_padding_gets_none(tmp_path):
    hub_directory(tmp_path / "given")
    assert main([f"--workdir={tmp_path}/given", f"--out={tmp_path}/out"]) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["pad_token_id"] is None
    assert "pad_token" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


def test_a_batch_of_our_own_tokenizer_is_padded(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    run, *_ = saved(tmp_path, "tiny")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out"]) == 0
    spoken = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = spoken(["What is 12 + 30?", "One"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1, 0] == 0 and set(batch) == {"input_ids", "attention_mask"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.generation_config.eos_token_id == [2]
    assert theirs.generate(**batch, max_new_tokens=2).shape[0] == 2


def test_a_score_is_read_at_the_token_that_ends_a_reply(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    hub_directory(tmp_path / "given")
    change(tmp_path / "given/tokenizer_config.json", pad_token="<|im_end|>")
    model = load_model(tmp_path / "given")
    config, params = small("1b", model.config.vocab_size, head="scalar")
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", Model(config, params, model.tokenizer))
    assert main([f"--workdir={tmp_path}/run", f"--out={tmp_path}/out"]) == 0
    assert "no pad_token_id is written" in capsys.readouterr().out
    tokens, _ = render_conversation(CONVERSATION, model.tokenizer)
    tokens = [*tokens[:40], tokens[-1]]
    assert tokens[-1] == model.tokenizer.end
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor([tokens])).logits[0, 0].item()
    hidden = apply(config, params, jnp.asarray([tokens], jnp.int32)).hidden
    np.testing.assert_allclose(scores(config, params, hidden)[0, -1], wanted, rtol=1e-4, atol=1e-4)


def test_files_are_readable_by_whom_the_umask_says(tmp_path):
    hub_directory(tmp_path / "given")
    run = adapted(tmp_path)
    old = os.umask(0o027)
    try:
        for name, more in (("adapter", []), ("whole", ["--merge", "--shard-bytes=30000"])):
            assert main([f"--workdir={run}", f"--out={tmp_path}/{name}", *more]) == 0
    finally:
        os.umask(old)
    for name in ("adapter", "whole"):
        files = list((tmp_path / name).iterdir())
        assert any(path.suffix == ".safetensors" for path in files)
        assert {"chat_template.jinja", "tokenizer.json"} < {path.name for path in files}
        assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def adapted(tmp_path):
    """A run with an adapter on the directory in tmp_path/given."""
    model = as_trainable(load_model(tmp_path / "given"), AdapterConfig(rank=2), 0)
    run = tmp_path / "run"
    run.mkdir()
    save_model(run, model)
    return run


@pytest.mark.parametrize("given", ["bfloat16", "float16"])
def test_merged_weights_keep_the_dtype_they_came_in(tmp_path, capsys, given):
    hub_directory(tmp_path / "given", given)
    run = adapted(tmp_path)
    cases = {"merged": (["--merge"], given), "wide": (["--merge", "--dtype=float32"], "float32")}
    cases["adapter"] = ([], "float32")  # in which it was trained
    for name, (options, wanted) in cases.items():
        assert main([f"--workdir={run}", f"--out={tmp_path}/{name}", *options]) == 0
        (path,) = (tmp_path / name).glob("*.safetensors")
        assert {str(x.dtype) for x in load_file(path).values()} == {wanted}
        said = f"weights are written in {given}, as in {tmp_path}/given" in capsys.readouterr().out
        assert said == (name == "merged")
        assert f"in {wanted}," in (tmp_path / name / "README.md").read_text()
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == given


def test_a_dtype_that_cannot_hold_a_weight_is_refused_and_leaves_nothing(tmp_path, capsys):
    run, config, params, tokenizer = saved(tmp_path, "1b")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(-65520.0)
    save_model(run, Model(config, params, tokenizer))
    flags = [f"--workdir={run}", f"--out={tmp_path}/out", "--shard-bytes=30000"]
    assert main([*flags, "--dtype=float16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: model.norm.weight holds 65520, and float16 ends at 65504: write it with "
        "--dtype=bfloat16 or float32"
    )
    assert not list((tmp_path / "out").iterdir())
    assert main([*flags, "--dtype=bfloat16"]) == 0
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(65519.0)  # rounds down
    save_model(run, Model(config, params, tokenizer))
    assert main([f"--workdir={run}", f"--out={tmp_path}/half", "--dtype=float16"]) == 0
    assert load_file(tmp_path / "half/model.safetensors")["model.norm.weight"].max() == 65504


def test_a_base_that_cannot_be_written_leaves_nothing_of_its_adapter(tmp_path, capsys):
    """The base, one of our runs, is written after the adapter, and holds what float16 cannot."""
    run, config, params, tokenizer = saved(tmp_path, "1b")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    save_model(run, Model(config, params, tokenizer))
    (tmp_path / "adapted").mkdir()
    model = as_trainable(load_model(run), AdapterConfig(rank=2), 0)
    save_model(tmp_path / "adapted", model)
    flags = [f"--workdir={tmp_path}/adapted", f"--out={tmp_path}/out"]
    assert main([*flags, "--dtype=float16"]) == 2
    assert "model.norm.weight holds 100000" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert main(flags) == 0 and (tmp_path / "out/base/model.safetensors").exists()


def test_a_stop_while_a_model_is_written_leaves_nothing(tmp_path, monkeypatch):
    run, *_ = saved(tmp_path, "tiny")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_jax.model_card.model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        main([f"--workdir={run}", f"--out={tmp_path}/out"])
    assert not list((tmp_path / "out").iterdir())


def test_weights_of_several_dtypes_lose_nothing(tmp_path):
    hub_directory(tmp_path / "given", "bfloat16")
    path = tmp_path / "given/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32) + 1e-5
    save_file(tensors, path)
    assert main([f"--workdir={tmp_path}/given", f"--out={tmp_path}/out"]) == 0
    again = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(again["model.norm.weight"], tensors["model.norm.weight"])


def test_a_card_says_how_the_model_was_made(tmp_path):
    yaml = pytest.importorskip("yaml")
    base = tmp_path / "models--owner--name/snapshots/given"
    base.parent.mkdir(parents=True)
    hub_directory(base)
    card = "---\nlicense: llama3.1\nlanguage: en\n---\n# Name\n\nlicense: none\n"
    (base / "README.md").write_text(card)
    run = tmp_path / "dpo"
    run.mkdir()
    save_model(run, as_trainable(load_model(base), AdapterConfig(rank=2), 0))
    change(
        run / "summary.json",
        stage="preference",
        status="done",
        parents={"policy": str(base)},
        command="python -m rlhf_jax.main --config=experiments/dpo.py:own",
    )
    data = {"train": "hf:trl-lib/pairs@train=2,mine.jsonl"}
    change(run / "config.json", data=data, loss={"name": "ipo"})
    for name, more in (("adapter", []), ("whole", ["--merge"])):
        assert main([f"--workdir={run}", f"--out={tmp_path}/{name}", *more]) == 0
        text = (tmp_path / name / "README.md").read_text()
        _, head, body = text.split("---\n")
        assert yaml.safe_load(head) == {
            "library_name": "transformers" if more else "peft",
            "pipeline_tag": "text-generation",
            "tags": ["rlhf_jax"],
            "license": "llama3.1",
            "base_model": "owner/name",
            "datasets": ["trl-lib/pairs"],
        }
        assert f"# {name}\n" in body and f"rlhf_jax {rlhf_jax.__version__}" in body
        assert "preference, ipo, on `hf:trl-lib/pairs@train=2,mine.jsonl`" in body
        assert "python -m rlhf_jax.main --config=experiments/dpo.py:own" in body


def test_a_card_claims_nothing_it_does_not_know(tmp_path):
    yaml = pytest.importorskip("yaml")
    run, *_ = saved(tmp_path, "tiny")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out"]) == 0
    _, head, body = (tmp_path / "out/README.md").read_text().split("---\n")
    assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}
    assert "Base model" not in body and "Trained" not in body


class Hub:
    """The Hub as huggingface_hub's HfApi is to it: what is created and uploaded is noted."""

    def __init__(self, monkeypatch):
        api, self.created, self.uploaded = "huggingface_hub.HfApi.", {}, {}
        self.fails: Exception | None = None
        monkeypatch.setattr(api + "whoami", lambda _: {"name": "me"})
        monkeypatch.setattr(api + "create_repo", lambda _, name, **given: self.create(name, given))
        monkeypatch.setattr(api + "upload_folder", lambda _, **given: self.upload(**given))

    def create(self, name, given):
        self.created[name] = given
        return f"https://hub/{name}"

    def upload(self, repo_id, folder_path, commit_message):
        if self.fails:
            raise self.fails
        assert commit_message == f"Written by rlhf_jax {rlhf_jax.__version__}"
        self.uploaded[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}


def test_push_uploads_what_is_written_with_its_card(tmp_path, monkeypatch, capsys):
    pytest.importorskip("huggingface_hub")
    hub = Hub(monkeypatch)
    run, *_ = saved(tmp_path, "tiny")
    assert main([f"--workdir={run}", f"--out={tmp_path}/out", "--push=me/dpo"]) == 0
    assert hub.created == {"me/dpo": {"private": True, "exist_ok": True}}
    files = hub.uploaded["me/dpo"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert (
        files["README.md"].startswith(b"---\nlibrary_name") and b"\n# out\n" in files["README.md"]
    )
    assert "uploaded: https://hub/me/dpo" in capsys.readouterr().out
    public = [f"--workdir={run}", f"--out={tmp_path}/again", "--push=me/open", "--public"]
    assert main(public) == 0 and hub.created["me/open"]["private"] is False


def test_a_push_that_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    errors = pytest.importorskip("huggingface_hub").errors
    hub = Hub(monkeypatch)
    run, *_ = saved(tmp_path, "tiny")
    flags = [f"--workdir={run}", f"--out={tmp_path}/out"]
    assert main([*flags, "--public"]) == 2
    assert "--public is of a repository" in capsys.readouterr().err
    assert main([*flags, "--push=dpo"]) == 2
    assert "is named owner/name" in capsys.readouterr().err

    def nobody(_):
        raise errors.LocalTokenNotFoundError("no token")

    class ConnectError(Exception):
        """As of httpx, by which the library sends: no OSError."""

    def nowhere(_):
        raise ConnectError("[Errno 111] Connection refused")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.whoami", nobody)
        assert main([*flags, "--push=me/dpo"]) == 2
        assert "hf auth login" in capsys.readouterr().err
        patch.setattr("huggingface_hub.HfApi.whoami", nowhere)
        assert main([*flags, "--push=me/dpo"]) == 2
        assert "the Hub says [Errno 111] Connection refused" in capsys.readouterr().err
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert main([*flags, "--push=me/dpo"]) == 2
        assert "pip install it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not hub.uploaded

    hub.fails = ConnectError("503\nService Unavailable")
    assert main([*flags, "--push=me/dpo"]) == 2
    said = capsys.readouterr().err
    assert "the Hub says 503 Service Unavailable; " in said and "hf upload me/dpo" in said
    (tmp_path / "out/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="--merge the whole model"):
        push(tmp_path / "out", "me/dpo", public=False)
