"""Two thousand damaged model directories: each loads or is refused in one line, nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import resource
import shutil

import jax
import pytest

from rlhf_jax.data import template
from rlhf_jax.errors import UserError
from rlhf_jax.hub.hf_weights import write_weights
from rlhf_jax.models import PRESETS, init
from rlhf_jax.training.saved_model import load_model
from tests.hub.test_hub_tokenizer import CONVERSATION, write

VALUES = [None, True, -1, 0, 1, 2**31, 2**70, 1e308, -0.5, "", "x", [], [1], {}, {"a": None}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    tokenizer = write(path, "chatml")
    config = dataclasses.replace(
        PRESETS["1b"], vocab_size=tokenizer.vocab_size, layers=2, width=8, heads=2, kv_heads=1,
        head_dim=4, mlp_width=8, max_length=32, compute_dtype="float32",
    )  # fmt: skip
    write_weights(path, config, init(config, jax.random.key(0)), shard_bytes=20_000)
    return path


def places(node, path=()):
    """Every place in a JSON document."""
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def change(document, chance):
    """One value replaced, removed or doubled, somewhere."""
    found = [p for p in places(document) if p]
    *way, last = chance.choice(found[:400])
    node = document
    for key in way:
        node = node[key]
    if chance.random() < 0.3:
        del node[last]
    else:
        node[last] = chance.choice(VALUES)
    return document


def damage(data, chance):
    """Bytes with some flipped, cut off, doubled, or a header of another length."""
    data = bytearray(data)
    match chance.randrange(5):
        case 0:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(min(len(data), 4000))] = chance.randrange(256)
        case 1:
            del data[chance.randrange(len(data)) :]
        case 2:
            start = chance.randrange(len(data))
            del data[start : start + chance.randint(1, 64)]
        case 3:
            data += data[: chance.randrange(len(data))]
        case _:
            data[:8] = chance.getrandbits(64).to_bytes(8, "little")
    return bytes(data)


def rewrite(template, chance):
    """A template with a few of its pieces removed, doubled, moved or replaced."""
    pieces = re.findall(r"\w+|\s+|.", template, re.DOTALL)
    for _ in range(chance.randint(1, 4)):
        i, j = chance.randrange(len(pieces)), chance.randrange(len(pieces))
        pieces[i] = chance.choice(["", pieces[j], pieces[i] * 2, "{{", "%}", "range(10**9)", "|"])
    return "".join(pieces)


def harm(path, chance):
    """Changes one file: its JSON, its template or its bytes."""
    if path.suffix == ".json" and chance.random() < 0.8:
        document = json.loads(path.read_text("utf-8"))
        if "chat_template" in document and chance.random() < 0.7:
            document["chat_template"] = rewrite(document["chat_template"], chance)
        else:
            document = change(document, chance)
        path.write_text(json.dumps(document), "utf-8")
    else:
        path.write_bytes(damage(path.read_bytes(), chance))


def loads(path):
    """Whether the directory loads; an error of the user's is one line."""
    try:
        model = load_model(path)
        model.tokenizer.conversation(CONVERSATION)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_one_line(directory, tmp_path, monkeypatch, count):
    monkeypatch.setattr(template, "SECONDS", 5.0)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    assert loads(directory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = 0
    for number in range(count):
        chance = random.Random(number)
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        harm(copy / chance.choice(files).name, chance)
        good += loads(copy)
        shutil.rmtree(copy)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 0 < good < count
    assert grown < 400_000  # KiB: compiled functions, never what a header promises
