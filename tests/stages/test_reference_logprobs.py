"""The reference's log-probs on disk: found where nothing changed, never where anything did."""

from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.config import document
from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation.row_passes import response_logprobs
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.stages import defaults, preference, reference_logprobs
from rlhf_jax.training import kept_results
from rlhf_jax.training.loop import Loop
from rlhf_jax.training.mesh import make_mesh
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, as_trainable, load_model, save_model

CHATS = [("How are you?", "Fine, thank you.", "No."), ("Who is it?", "A friend.", "Go away!")]


def small_model(seed=0, vocab_size=300):
    tokenizer = train_bpe([" ".join(chat) for chat in CHATS], vocab_size)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        layers=1,
        width=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_width=32,
        max_length=128,
    )
    return Model(config, init(config, jax.random.key(seed)), tokenizer)


def saved(directory, model):
    """As a finished stage leaves it."""
    directory.mkdir()
    save_model(directory, model)
    summary = {"stage": "sft", "status": "done", "config_hash": "", "parents": {}}
    summary |= {"wall_seconds": 0.0, "metrics": {}}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def rows(seed=0, count=20):
    random = np.random.default_rng(seed)
    groups = [
        Group(*(lambda p, c, r: (p, (c, r)))(*random.integers(8, 200, (3, 5)).tolist()), i)
        for i in range(count)
    ]
    return pack_groups(groups, 32, branches=2)[0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference_logprobs"


@pytest.fixture
def passes(monkeypatch):
    """Rows of every forward pass of a reference."""
    seen = []

    def counted(config, params, arrays, tokens, name):
        seen.append(len(arrays["row_ids"]))
        return response_logprobs(config, params, arrays, tokens, name)

    monkeypatch.setattr(reference_logprobs, "response_logprobs", counted)
    return seen


def asked(model, directory, arrays, tokens=128):
    return reference_logprobs.reference_logprobs(model, directory, arrays, tokens)


def test_they_are_computed_once(tmp_path, passes, cache):
    directory = saved(tmp_path / "m", small_model())
    model, arrays = load_model(directory), rows()
    first = asked(model, directory, arrays)
    np.testing.assert_array_equal(first, response_logprobs(model.config, model.params, arrays, 128))
    second = asked(load_model(directory), directory, rows())
    assert len(passes) == 1
    np.testing.assert_array_equal(first, second)
    assert second.dtype == np.float32
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 128] ^= 1
    path.write_bytes(content)


def other_numbers(path):
    with np.load(path) as kept:
        document = dict(kept)
    document["logprobs"] = document["logprobs"] + np.float32(1e-3)
    np.savez(path, **document)


def no_checksum(path):
    with np.load(path) as kept:
        logprobs = kept["logprobs"]
    np.savez(path, logprobs=logprobs)


def pickled(path):
    np.savez(path, logprobs=np.array([{}], object), checksum=np.array("0"))


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        other_numbers,
        no_checksum,
        pickled,
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("nothing"),
    ],
)
def test_a_damaged_file_is_noticed_and_replaced(tmp_path, passes, cache, capsys, damage):
    directory = saved(tmp_path / "m", small_model())
    model = load_model(directory)
    first = asked(model, directory, rows())
    (path,) = cache.iterdir()
    damage(path)
    capsys.readouterr()
    np.testing.assert_array_equal(asked(model, directory, rows()), first)
    assert f"{path} is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(asked(model, directory, rows()), first)
    assert len(passes) == 2


def test_a_file_of_something_else_is_not_trusted(tmp_path, passes, cache):
    directory = saved(tmp_path / "m", small_model())
    model = load_model(directory)
    asked(model, directory, rows(0))
    (path,) = cache.iterdir()
    expected = asked(model, directory, rows(1))
    (other,) = set(cache.iterdir()) - {path}
    other.write_bytes(path.read_bytes())
    np.testing.assert_array_equal(asked(model, directory, rows(1)), expected)
    assert len(passes) == 3


def test_what_decides_the_numbers_decides_the_key(tmp_path):
    directory = saved(tmp_path / "m", small_model())
    model, arrays = load_model(directory), rows()

    def key(model=model, directory=directory, arrays=arrays, tokens=128):
        return reference_logprobs.cache_key(model, directory, arrays, tokens)

    moved = {name: x.copy() for name, x in arrays.items()}
    moved["tokens"][0, 1] += 1

    class Template:
        """The same ids, another template: a Hub tokenizer's hash is of both."""

        hash = "another template"

    other = saved(tmp_path / "other", small_model(seed=1))
    words = saved(tmp_path / "words", small_model(vocab_size=290))
    half = dataclasses.replace(model.config, compute_dtype="bfloat16")
    adapter = as_trainable(model, AdapterConfig(rank=2, base="int8"), 0)
    keys = {
        "same": key(),
        "data": key(arrays=moved),
        "order": key(arrays={name: x[::-1] for name, x in arrays.items()}),
        "weights": key(load_model(other), other),
        "tokenizer": key(load_model(words), words),
        "template": key(dataclasses.replace(model, tokenizer=Template())),
        "precision": key(dataclasses.replace(model, config=half)),
        "quantised": key(adapter),
        "rows": key(tokens=256),
    }
    assert len(set(keys.values())) == len(keys)
    assert key(load_model(directory), directory, rows()) == keys["same"]


def test_a_place_that_cannot_be_written_costs_a_line(tmp_path, passes, cache, capsys):
    directory = saved(tmp_path / "m", small_model())
    cache.parent.write_text("a file")
    found = asked(load_model(directory), directory, rows())
    assert found.shape == rows()["last"].shape
    assert "the reference's log-probs are not kept" in capsys.readouterr().out


def dpo(tmp_path, parent, name, beta, *, rank=0, **train):
    lines = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in CHATS * 40]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p, *_ in CHATS))
    config = defaults.base(
        "preference",
        init={"policy": str(parent)},
        data={"train": str(data), "validation": str(data), "row_length": 64},
        batch={"rows": 8},
        adapter={"rank": rank},
        train={"steps": 2, "log_every": 1, "tensorboard": False} | train,
        loss={"name": "sigmoid", "beta": beta, "sft_coefficient": 0.0},
        eval={"source": str(prompts), "count": 2, "max_new_tokens": 4},
    )
    config = defaults.resolve(config)
    with RunDirectory(tmp_path / name, document(config)) as run:
        return preference.run(config, run, {"policy": parent})


@pytest.mark.slow
def test_another_beta_asks_no_reference_and_training_holds_none(tmp_path, passes, monkeypatch):
    parent = saved(tmp_path / "parent", small_model())
    given, alive = [], []
    load, train_loop = preference.load_start, Loop.train

    def loaded(*arguments):
        given.append(load(*arguments))
        return given[-1]

    def train(loop, state):
        leaves = jax.tree.leaves(given[-1].params)
        alive.append(sum(not leaf.is_deleted() for leaf in leaves) / len(leaves))
        return train_loop(loop, state)

    monkeypatch.setattr(preference, "load_start", loaded)
    monkeypatch.setattr(Loop, "train", train)
    first = dpo(tmp_path, parent, "one", 0.1)
    assert len(passes) == 1  # train and validation are the same rows
    second = dpo(tmp_path, parent, "two", 0.5)
    assert len(passes) == 1
    assert alive == [0, 0]
    assert first["eval/rewards/margins"] != second["eval/rewards/margins"]
    dpo(tmp_path, parent, "three", 0.5, eval_every=1)
    assert alive == [0, 0, 1] and len(passes) == 1
    dpo(tmp_path, parent, "four", 0.5, rank=2)
    assert alive == [0, 0, 1, 1]  # what is frozen is the reference's own


def test_what_is_kept_is_readable_by_whom_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        kept_results._write(tmp_path / "kept.npz", "key", {"logprobs": np.zeros((2, 3))})
    finally:
        os.umask(old)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_key_is_of_the_mesh_the_devices_and_the_processor(tmp_path, monkeypatch):
    directory = saved(tmp_path / "sft", small_model())

    def key(mesh=None):
        model = load_model(directory, mesh=mesh)
        return kept_results.result_key("rlhf_jax.stages.reference_logprobs", model, directory, 1, 0)

    two = jax.devices()[:2]
    keys = [key(), *(key(make_mesh({name: 2}, two)) for name in ("data", "fsdp", "tensor"))]
    model = load_model(directory)
    for kind in ("NVIDIA H100", "NVIDIA H200"):
        with monkeypatch.context() as patched:
            device = SimpleNamespace(device_kind=kind)
            patched.setattr(jax, "devices", lambda device=device: [device])
            module = "rlhf_jax.stages.reference_logprobs"
            keys.append(kept_results.result_key(module, model, directory, 1, 0))
    monkeypatch.setattr(kept_results, "processor_name", lambda: "another")
    keys.append(key())
    assert len(set(keys)) == len(keys) == 7


def test_a_bit_that_flips_is_never_more_than_a_line(tmp_path, capsys):
    path, arrays = tmp_path / "kept.npz", {"logprobs": np.arange(6, dtype=np.float32)}
    kept_results._write(path, "key", arrays)
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the zip's table of contents
    # The version needed, the flags encrypted, patched and strongly encrypted, the method, the CRC.
    for at, bit in ((6, 6), (6, 7), (8, 0), (8, 5), (8, 6), (10, 0), (10, 5), (16, 0)):
        damaged = bytearray(whole)
        damaged[entry + at] ^= 1 << bit
        path.write_bytes(damaged)
        assert kept_results._read(path, "log-probs", "key") is None, (at, bit)
        assert capsys.readouterr().out == f"{path} is damaged: log-probs are computed again\n"
    path.write_bytes(whole)
    np.testing.assert_array_equal(
        kept_results._read(path, "log-probs", "key")["logprobs"], arrays["logprobs"]
    )
