"""Optimizers against formulas by hand; schedules against lists."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rlhf_jax.config import build
from rlhf_jax.errors import UserError
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.training import model


def updates(config, grads, params, steps=10):
    optimizer, _ = make_optimizer(config, steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grad):
        update, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, update), state

    out = []
    for grad in grads:
        params, state = step(params, state, grad)
        out.append(params)
    return out


def test_adam_is_the_pytorch_form():
    # m̂ = g and v̂ = g² after one step, so the step is lr · g / (|g| + eps): here eps is not small.
    config = {"learning_rate": 0.1, "schedule": "constant", "b2": 0.99, "eps": 0.5}
    params = {"a": {"kernel": jnp.array([1.0, 1.0])}}
    g1, g2 = np.array([2.0, -0.5]), np.array([1.0, 1.0])
    first, second = updates(config, [{"a": {"kernel": jnp.array(g)}} for g in (g1, g2)], params)
    p1 = 1 - 0.1 * g1 / (np.abs(g1) + 0.5)
    np.testing.assert_allclose(first["a"]["kernel"], p1, rtol=1e-6)
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.99 * 0.01 * g1**2 + 0.01 * g2**2) / (1 - 0.99**2)
    p2 = p1 - 0.1 * m / (np.sqrt(v) + 0.5)
    np.testing.assert_allclose(second["a"]["kernel"], p2, rtol=1e-5)


def test_weight_decay_is_decoupled_and_spares_norms_biases_and_embeddings():
    config = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.5}
    names = {
        "lm_head": "kernel",
        "final_norm": "scale",
        "query": "bias",
        "embed": "embedding",
    }
    params = {name: {leaf: jnp.full((2,), 3.0)} for name, leaf in names.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    (after,) = updates(config, [zero], params)
    np.testing.assert_allclose(after["lm_head"]["kernel"], 3 - 0.1 * 0.5 * 3, rtol=1e-6)
    for name in ("final_norm", "query", "embed"):
        np.testing.assert_array_equal(after[name][names[name]], 3.0)


def test_lion_moves_by_the_sign():
    config = {"name": "lion", "learning_rate": 0.1, "schedule": "constant", "b2": 0.5}
    grads = [{"p": jnp.array([3.0, -1e-4, 0.0])}, {"p": jnp.array([-1.0, 1.0, 0.0])}]
    first, second = updates(config, grads, {"p": jnp.zeros(3)})
    np.testing.assert_allclose(first["p"], [-0.1, 0.1, 0.0], rtol=1e-6)
    # sign(0.9 m + 0.1 g) with m = 0.5 g₁: 1.35 − 0.1 > 0, −4.5e-5 + 0.1 > 0
    np.testing.assert_allclose(second["p"], [-0.2, 0.0, 0.0], atol=1e-7)


def test_adafactor_keeps_rows_and_columns_of_each_layer_only():
    config = {"name": "adafactor", "learning_rate": 0.1, "schedule": "constant"}
    params = {"layers": {"mlp": {"up": {"kernel": jnp.ones((2, 128, 256))}}}}
    optimizer, _ = make_optimizer(config, 10)
    state = optimizer.init(params)
    assert max(x.size for x in jax.tree.leaves(state)) == 2 * 256
    grad = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    update, _ = optimizer.update(grad, state, params)
    rms = np.sqrt(np.mean(np.square(update["layers"]["mlp"]["up"]["kernel"])))
    np.testing.assert_allclose(rms, 0.1, rtol=0.05)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
@pytest.mark.parametrize(("leaf", "shape"), [("kernel", (16, 40)), ("scale", (40,))])
def test_a_stacked_layer_is_trained_as_it_would_be_alone(name, leaf, shape):
    config = {"name": name, "learning_rate": 0.1, "schedule": "constant"}
    first, second = jax.random.normal(jax.random.key(0), (2, 3, *shape))
    second = second.at[1].multiply(100.0)  # which Adafactor clips in that layer alone

    def steps(layers):
        gradients = [{"layers": {"mlp": {leaf: each[layers]}}} for each in (first, second)]
        params = jax.tree.map(jnp.zeros_like, gradients[0])
        return updates(config, gradients, params)[-1]["layers"]["mlp"][leaf]

    for layer in range(3):
        alone = steps(slice(layer, layer + 1))
        np.testing.assert_allclose(steps(slice(None))[layer], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 16, 40), (3, 40, 16)])
def test_muon_orthogonalises_each_layer_by_itself(shape):
    config = {"name": "muon", "learning_rate": 1.0, "schedule": "constant"}
    gradient = jax.random.normal(jax.random.key(0), shape)
    gradient = gradient.at[1].multiply(1000.0)  # layers of very different size
    params = {"layers": {"mlp": {"up": {"kernel": jnp.zeros(shape)}}}}

    def step(gradient):
        (after,) = updates(config, [{"layers": {"mlp": {"up": {"kernel": gradient}}}}], params)
        return np.asarray(after["layers"]["mlp"]["up"]["kernel"])

    after = step(gradient)
    values = np.linalg.svd(after / (0.2 * np.sqrt(max(shape[1:]))), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vt = np.linalg.svd(np.asarray(gradient[1]), full_matrices=False)
    cosine = -np.sum(after[1] * (u @ vt)) / np.linalg.norm(after[1]) / np.linalg.norm(u @ vt)
    assert cosine > 0.97
    rms = np.sqrt(np.mean(np.square(after), axis=(1, 2)))
    np.testing.assert_allclose(rms, 0.2, atol=0.05)
    other = step(gradient.at[0].set(gradient[0][::-1]))
    np.testing.assert_array_equal(other[1:], after[1:])


def test_muon_orthogonalises_each_expert_by_itself():
    config = {"name": "muon", "learning_rate": 1.0, "schedule": "constant"}
    gradient = jax.random.normal(jax.random.key(0), (2, 3, 16, 40))

    def step(gradient):
        tree = {"layers": {"kernel": gradient}}
        (after,) = updates(config, [tree], jax.tree.map(jnp.zeros_like, tree))
        return np.asarray(after["layers"]["kernel"])

    alike = step(gradient.reshape(6, 16, 40)).reshape(gradient.shape)
    np.testing.assert_allclose(step(gradient), alike, rtol=1e-5, atol=1e-5)


def test_muon_leaves_embeddings_norms_and_heads_to_adam():
    params = model.init()
    gradient = jax.tree.map(jnp.ones_like, params)
    config = {"learning_rate": 0.1, "schedule": "constant"}
    (muon,) = updates(config | {"name": "muon"}, [gradient], params)
    (adam,) = updates(config | {"name": "adamw"}, [gradient], params)
    for name in ("embed", "lm_head"):
        jax.tree.map(np.testing.assert_array_equal, muon[name], adam[name])
    jax.tree.map(
        np.testing.assert_array_equal, muon["layers"]["mlp_norm"], adam["layers"]["mlp_norm"]
    )
    up = muon["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(up, adam["layers"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_every_optimizer_lowers_the_loss(name):
    params = model.init()
    optimizer, _ = make_optimizer({"name": name, "learning_rate": 3e-3}, 60)
    state, batch, rng = optimizer.init(params), model.make_batch(1), jax.random.key(0)

    @jax.jit
    def step(params, state):
        def mean(params):
            (total, weight), _ = model.loss_fn(params, batch, rng)
            return total / weight

        loss, grads = jax.value_and_grad(mean)(params)
        update, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, update), state, loss

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "values, expected",
    [
        # warm-up (t+1)/2, then linear in p = (t−1)/4 down to 0.2
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        # 0.2 + 0.8 · ½(1 + cos πp), p = 1/6 … 1
        ({"schedule": "cosine"}, [0.946410, 0.8, 0.6, 0.4, 0.253590, 0.2]),
        ({"schedule": "wsd", "decay_fraction": 0.5}, [1, 1, 1, 0.733333, 0.466667, 0.2]),
        ({"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(values, expected):
    config = {"learning_rate": 3.0, "final_fraction": 0.2} | values
    _, schedule = make_optimizer(config, 6)
    np.testing.assert_allclose([schedule(t) for t in range(6)], 3 * np.array(expected), rtol=1e-5)
    # and it is what the optimizer uses: Adam's step is the learning rate under a constant gradient
    params = {"p": jnp.float32(0)}
    path = updates(config | {"eps": 0.0}, [{"p": jnp.float32(1)}] * 6, params, steps=6)
    steps = -np.diff([0.0] + [float(p["p"]) for p in path])
    np.testing.assert_allclose(steps, 3 * np.array(expected), rtol=1e-4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "adamW"}, "unknown optimizer 'adamW'; did you mean 'adamw'"),
        ({"name": "moun"}, "did you mean 'muon'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"learningrate": 1}, "optimizer has no field learningrate; did you mean learning_rate"),
        (
            {"warmup_steps": 10},
            "warmup_steps=10 must be at least 0 and less than the run's 10 steps",
        ),
        (
            {"learning_rate": math.nan},
            "optimizer.learning_rate = nan is no number that float32 can hold",
        ),
        ({"learning_rate": math.inf}, "optimizer.learning_rate = inf is no number that"),
        ({"learning_rate": -1e-3}, r"optimizer.learning_rate must be in .* got -0.001"),
        ({"max_grad_norm": 0.0}, r"optimizer.max_grad_norm must be in \(0, inf\), got 0.0"),
        ({"b2": 1.0}, r"optimizer.b2 must be in \[0, 1\), got 1.0"),
        ({"final_fraction": 1.5}, r"optimizer.final_fraction must be in \[0, 1\], got 1.5"),
        ({"freeze": ("",)}, r"optimizer.freeze has '', .* give a regular expression"),
        ({"freeze": ("embed", "up[")}, r"optimizer.freeze has 'up\[', .* a regular expression"),
    ],
)
def test_a_mistake_is_a_user_error(values, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(values, 10)


def test_a_config_dict_will_do():
    config = build(OptimizerConfig, ConfigDict({"name": "lion", "freeze": ("embed",)}), "optimizer")
    assert config == OptimizerConfig(name="lion", freeze=("embed",))
