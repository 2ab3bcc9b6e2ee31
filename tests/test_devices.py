"""Which devices train and which decode, and that decoding on several is decoding on one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.devices import decoding_mesh
from rlhf_jax.models import init
from rlhf_jax.sampling import engine
from rlhf_jax.training.mesh import make_mesh, placed
from tests.sampling.test_generate import CONFIG, PARAMS, PROMPTS, generated

OPTIONS = [
    {"stop_ids": [7, 2], "samples_per_prompt": 16},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"stop_strings": ["bc"], "decode": lambda tokens: "".join(chr(97 + t) for t in tokens)},
]


def spread(**axes: int):
    return placed(make_mesh(axes, jax.devices()[: math.prod(axes.values())]), PARAMS)


@pytest.mark.parametrize("options", OPTIONS, ids=["refills", "penalty", "looks"])
@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 2, "tensor": 2}, pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_rows_split_over_devices_are_the_rows_of_one(axes, options):
    same = {"batch_size": 8, "cache_length": 64, "seed": 0, "max_new_tokens": 30, **options}
    one = generated(CONFIG, PARAMS, PROMPTS, **same)
    split = generated(CONFIG, spread(**axes), PROMPTS, **same)
    assert [c.tokens for c in split] == [c.tokens for c in one]
    assert [c.finished for c in split] == [c.finished for c in one]
    for a, b in zip(split, one, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)


def test_groups_of_several_devices_end_their_loop_together():
    # Of words that the axis tensor divides XLA sums masses by collective permutes of all devices.
    config = dataclasses.replace(CONFIG, vocab_size=16, layers=1, heads=3, kv_heads=1)
    params = init(config, jax.random.key(0))
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    same = {"batch_size": 4, "cache_length": 32, "seed": 0, "max_new_tokens": 12, "stop_ids": [3]}
    one = generated(config, params, PROMPTS, **same)
    split = generated(config, placed(mesh, params), PROMPTS, **same)
    assert len({len(c.tokens) for c in one}) > 1  # or no group would end before another
    assert [c.tokens for c in split] == [c.tokens for c in one]


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_fewer_rows_than_devices_or_some_left_over(rows):
    same = {"batch_size": rows, "cache_length": 64, "seed": 0, "max_new_tokens": 9}
    one = generated(CONFIG, PARAMS, PROMPTS, **same)
    split = generated(CONFIG, spread(data=4), PROMPTS, **same)
    assert [c.tokens for c in split] == [c.tokens for c in one]


def test_each_device_has_its_rows_and_goes_on_by_itself():
    params = spread(data=4)
    mesh = decoding_mesh(params, 8)
    slots = engine.empty(CONFIG, 8, 64, False, mesh)
    shapes = {shard.data.shape[0] for x in jax.tree.leaves(slots) for shard in x.addressable_shards}
    assert shapes == {2}
    prompts, lengths = np.ones((8, 4), np.int32), np.full(8, 4, np.int32)
    read = engine.prefill(CONFIG, PARAMS, prompts, lengths, False)
    read = jax.device_put(read, NamedSharding(mesh, P()))
    names = np.stack([np.arange(8), np.zeros(8)], 1).astype(np.uint32)
    places = np.arange(8, dtype=np.int32)
    keys = engine.row_keys(jax.random.key(0), names)
    inserted = engine.insert.lower(slots, read, keys, places, places, mesh, True).compile()
    slots = engine.insert(slots, read, keys, places, places, mesh, True)
    assert (slots.cache["lengths"] == 4).all() and slots.active.all()
    sampling = engine.Drawing(None, None, None, None, None, None, np.zeros(13, bool), 9)
    live = np.array([True] * 6 + [False] * 2)  # the last device has nothing to do
    advanced = engine.advance.lower(CONFIG, params, slots, sampling, live, 0, 5, mesh).compile()
    slots = engine.advance(CONFIG, params, slots, sampling, live, 0, 5, mesh)
    # Programs that wait for each other's devices have been seen to wait for ever.
    for compiled in (inserted, advanced):
        assert not re.search("all-gather|all-reduce|collective|all-to-all", compiled.as_text())
    assert slots.steps.tolist() == [5] * 6 + [0] * 2
    assert slots.drawn.tolist() == [5] * 6 + [0] * 2


def test_what_decodes():
    assert decoding_mesh(PARAMS, 64) is None
    assert decoding_mesh(spread(data=4), 64).size == 4
    assert decoding_mesh(spread(data=4), 6).size == 3
    assert decoding_mesh(spread(data=4), 1) is None
    split = spread(data=2, tensor=2)
    assert decoding_mesh(split, 64).size == 4
    assert decoding_mesh(split, 1).shape["tensor"] == decoding_mesh(split, 1).size == 2


CORES = """
import json, os, jax, numpy
os.sched_getaffinity = lambda process: range(4)
from rlhf_jax import devices
devices.split_cores()
from rlhf_jax.training.mesh import make_mesh
from tests.sampling.test_generate import CONFIG, PARAMS, PROMPTS, generated

found = {
    "devices": jax.device_count(),
    "training": len(devices.training_devices()),
    "mesh": make_mesh({"data": -1}).size,
    "decoding": [
        getattr(devices.decoding_mesh(PARAMS, rows), "size", 1) for rows in (1, 8, 63, 64, 96, 256)
    ],
}
completions = generated(CONFIG, PARAMS, PROMPTS, max_new_tokens=12, seed=3, batch_size=64)
found["tokens"] = [completion.tokens for completion in completions]
print(json.dumps(found))
"""


def cores(**environment: str) -> dict:
    kept = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", CORES]
    run = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts cores its own way")
@pytest.mark.slow
def test_cores_of_a_cpu_decode_many_rows_and_train_as_one():
    found, asked = cores(), cores(JAX_NUM_CPU_DEVICES="3")
    assert (found["devices"], found["training"], found["mesh"]) == (4, 1, 1)
    assert found["decoding"] == [1, 1, 1, 2, 3, 4]
    assert (asked["devices"], asked["training"], asked["mesh"]) == (3, 3, 3)
    assert asked["decoding"] == [1] * 6  # the parameters are on one of the devices asked for
    here = generated(CONFIG, PARAMS, PROMPTS, max_new_tokens=12, seed=3, batch_size=64)
    assert found["tokens"] == asked["tokens"] == [completion.tokens for completion in here]
