"""Meshes and sharding rules: every mesh computes what one device computes."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.training.mesh import make_mesh, overlapping, shard_batch, shardings
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step
from rlhf_jax.trees import named_leaves
from tests.training import model


def make(data, fsdp, tensor):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def test_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"date": 8}, "axis 'date' is unknown"),
        ({"data": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -1, "tensor": 16}, "does not fit 8 devices"),
    ],
)
def test_a_wrong_mesh_is_a_user_error(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(axes)


def test_rules_place_parameters_and_their_moments_alike():
    mesh = make(2, 2, 2)
    optimizer, _ = make_optimizer({"name": "adamw"}, 10)
    state = init_state(model.init(), optimizer, mesh=mesh)
    specs = {name: leaf.sharding.spec for name, leaf in named_leaves(state).items()}
    up = P(None, "fsdp", "tensor")
    assert specs["params/layers/mlp/up/kernel"] == up
    assert specs["opt_state/0/inner_states/adam/inner_state/mu/layers/mlp/up/kernel"] == up
    assert specs["params/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["params/embed/embedding"] == P("tensor", "fsdp")
    assert specs["params/layers/mlp_norm/scale"] == P()
    assert specs["step"] == P()
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = make(1, 2, 4)
    tree = {"layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((2, 6, 6), "float32")}}}}
    placed = shardings(mesh, tree)["layers"]["mlp"]["up"]["kernel"]
    assert placed.spec == P(None, "fsdp")


def test_a_matrix_without_a_rule_is_a_user_error():
    with pytest.raises(UserError, match=r"no sharding rule matches router/weights \(4, 4\)"):
        shardings(make(8, 1, 1), {"router": {"weights": np.zeros((4, 4))}})


def test_a_batch_that_does_not_divide_is_a_user_error():
    with pytest.raises(UserError, match="12 rows, not a multiple of the 8 parts"):
        shard_batch(make(4, 2, 1), model.make_batch(0, rows=12))


@functools.cache
def train(sizes, name, microbatches=1, steps=3):
    mesh = make(*sizes) if sizes else None
    optimizer, _ = make_optimizer({"name": name, "learning_rate": 1e-2, "weight_decay": 0.1}, 10)
    state = init_state(model.init(), optimizer, ema=True, mesh=mesh)
    step = make_step(
        model.loss_fn,
        optimizer,
        mesh=mesh,
        microbatches=microbatches,
        max_grad_norm=0.5,
        ema_decay=0.9,
    )
    before = jax.tree.map(lambda x: x.sharding, state)
    for i in range(steps):
        state, metrics = step(state, shard_batch(mesh, model.make_batch(i)))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize(
    "sizes, name, microbatches",
    [
        pytest.param((8, 1, 1), "adamw", 2, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "adamw", 1, marks=pytest.mark.slow),
        ((2, 2, 2), "adamw", 2),
        pytest.param((1, 1, 8), "adamw", 1, marks=pytest.mark.slow),
        ((2, 2, 2), "muon", 1),
    ],
)
def test_every_mesh_computes_what_one_device_computes(sizes, name, microbatches):
    state, metrics = train(sizes, name, microbatches)
    expected_state, expected_metrics = train(None, name)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for tree in ("params", "ema_params"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            getattr(state, tree),
            getattr(expected_state, tree),
        )


def test_options_of_overlapping_collectives_are_gpus_and_known_to_this_xla():
    assert overlapping(None) == overlapping(make(2, 2, 2)) == {}
    devices = np.array([SimpleNamespace(platform="gpu")] * 2)
    options = overlapping(SimpleNamespace(devices=devices, size=2))
    assert "xla_gpu_enable_latency_hiding_scheduler" in options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # else: no such option
    assert overlapping(SimpleNamespace(devices=devices[:1], size=1)) == {}
