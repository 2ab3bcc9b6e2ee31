"""A run is what it was made from: contents of inputs, parents' weights, code, resolved options."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import dpo, grpo, sft
from rlhf_jax.config import document
from rlhf_jax.data import packing
from rlhf_jax.stages import identity as identity_module
from rlhf_jax.stages.chain import prepare
from rlhf_jax.stages.defaults import resolve
from rlhf_jax.stages.identity import made_from
from rlhf_jax.training.checkpoint import save_params
from rlhf_jax.training.origin import config_hash
from rlhf_jax.training.saved_model import fingerprint

PAIRS = '{"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}\n'


def own(module, tmp_path, **data):
    config = module.get_config("own")
    config.init.policy = str(tmp_path)
    config.data.update(data)
    return config


def identity(config):
    """The digest of a config's run, without parents."""
    config = prepare(config)
    return config_hash(document(config), made_from(config, {}))


def test_contents_of_data_decide(tmp_path):
    file, held_out = tmp_path / "pairs.jsonl", tmp_path / "more.jsonl"
    file.write_text(PAIRS * 3)
    held_out.write_text(PAIRS)
    config = own(dpo, tmp_path, train=f"{file}=2", validation=str(held_out))
    before = identity(config)
    for path in (file, held_out):
        text = path.read_text()
        path.write_text(text.replace("Hello", "Hallo"))
        assert identity(config) != before
        path.write_text(text)
    assert identity(config) == before


def test_contents_of_a_data_set_decide(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    folder = tmp_path / "pretrain_tinyshakespeare"
    folder.mkdir()
    (folder / "input.txt.gz").write_bytes(b"one")
    config = own(sft, tmp_path, train="tiny_shakespeare", validation="tiny_shakespeare")
    before = made_from(prepare(config), {})["contents"]
    assert before.keys() == {f"{name}: tiny_shakespeare" for name in (
        "data.train", "data.validation", "eval.source"
    )}  # fmt: skip
    (folder / "input.txt.gz").write_bytes(b"two")
    assert made_from(prepare(config), {})["contents"] != before


def test_what_the_town_is_made_of_is_code(tmp_path):
    config = sft.get_config("town")
    origin = made_from(prepare(config), {})
    assert not origin["contents"] and "tasks/town/gold.py" in origin["code"]


def test_contents_of_a_template_decide(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(PAIRS * 3)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    data = {"train": f"{tmp_path}/pairs.jsonl", "chat_template": str(template)}
    before = identity(own(dpo, tmp_path, **data))
    template.write_text("{{ messages }}!")
    assert identity(own(dpo, tmp_path, **data)) != before


def test_contents_of_a_reward_file_and_what_it_imports_decide(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' * 3)
    (tmp_path / "words").mkdir()
    files = {
        "mine.py": "import numpy\nfrom words import lists\n\ndef score(prompts, responses): ...\n",
        "words/__init__.py": "",
        "words/lists.py": "from .bad import BAD\n",
        "words/bad.py": "BAD = ['bad']\n",
        "other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = own(grpo, tmp_path, train=f"{tmp_path}/prompts.jsonl")
    config.reward.scorers = f"{tmp_path}/mine.py:score=1,length=-0.01"
    before = identity(config)
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# changed\n")
        assert (identity(config) != before) == (name != "other.py"), name
        (tmp_path / name).write_text(text)
    assert identity(config) == before


def test_reward_code_is_found_where_its_process_looks(tmp_path, monkeypatch):
    """Beside the file that a link leads to, in the working directory, and on PYTHONPATH."""
    imported = ["rewards/beside.py", "here.py", "lib/there.py"]
    imported += ["lib/p/__init__.py", "lib/p/up.py", "lib/p/q/deep.py"]
    for name in (*imported, "folder.py", "lib/p/q/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "rewards/mine.py").write_text("import math\nimport beside, here, there, p.q.deep\n")
    (tmp_path / "lib/p/q/deep.py").write_text("from ..up import x\nfrom .. import y\n")
    (tmp_path / "mine.py").symlink_to("rewards/mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    for name in ("mine.py", "rewards/mine.py", str(tmp_path / "mine.py")):
        first, *files = identity_module._with_imports(Path(name))
        assert str(first) == name
        assert {file.name for file in files} == {Path(file).name for file in imported}


def test_options_are_recorded_with_their_defaults(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' * 3)
    config = own(grpo, tmp_path, train=f"{tmp_path}/prompts.jsonl")
    config.reward.scorers = "length"
    loss = document(resolve(config))["loss"]
    options = {"clip_low": 0.2, "clip_high": 0.2, "delta": None, "dual_clip": None}
    assert options.items() <= loss.items()
    same = own(grpo, tmp_path, train=f"{tmp_path}/prompts.jsonl")
    same.reward.scorers = "length"
    same.loss.clip_high = 0.20
    assert identity(same) == identity(config)
    same.loss.clip_high = 0.28
    assert identity(same) != identity(config)
    assert document(resolve(same))["loss"]["clip_high"] == 0.28
    simpo = dpo.get_config()
    simpo.loss.name = "simpo"
    expected = {"name": "simpo", "file": "", "beta": 0.1, "gamma": 0.5, "sft_coefficient": 0.3}
    assert document(resolve(simpo))["loss"] == expected


def test_a_model_is_its_numbers_not_its_files(tmp_path):
    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}

    def saved(name, params, **document):
        save_params(tmp_path / name / "model", params, {"tokenizer_hash": "0"} | document)
        return fingerprint(tmp_path / name)

    first = saved("a", params, weights=packing.fingerprint(params))
    assert first == saved("b", params, weights=packing.fingerprint(params))
    assert first != saved("c", params, weights=packing.fingerprint(params), tokenizer_hash="1")
    changed = {"w": params["w"] + np.float32(1e-6) * (params["w"] == 3)}
    assert first != saved("d", changed, weights=packing.fingerprint(changed))
    other_dtype = {"w": params["w"].view(np.int32)}
    assert (
        packing.fingerprint(other_dtype)
        != packing.fingerprint(params)
        != packing.fingerprint({"w": params["w"].reshape(3, 2)})
    )


def test_a_byte_in_the_middle_of_a_hub_directory_is_seen(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weights = bytearray(5 << 20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "chat_template.jinja").write_text("a")
    before = fingerprint(tmp_path)
    weights[5 << 19] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    changed = fingerprint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("b")
    assert len({before, changed, fingerprint(tmp_path)}) == 3
