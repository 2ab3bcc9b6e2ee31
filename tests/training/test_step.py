"""The step: divided once, clipped after accumulation, skipped when not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step, with_constants
from tests.training import model


def linear(params, batch, rng):
    """Loss Σ w·x·p of weight Σ w: the gradient is the weighted mean of x."""
    total = jnp.sum(batch["w"] * batch["x"] * params["p"])
    return (total, jnp.sum(batch["w"])), {"x": (jnp.sum(batch["x"]), jnp.float32(4))}


def linear_batch(x, w):
    return {"x": np.asarray(x, np.float32), "w": np.asarray(w, np.float32)}


def run(batch, *, params=None, learning_rate=1.0, **options):
    optimizer = optax.sgd(learning_rate)
    state = init_state(params or {"p": jnp.float32(2)}, optimizer, ema="ema_decay" in options)
    return make_step(linear, optimizer, **options)(state, batch)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_gradient_is_the_weighted_mean_however_the_rows_are_split(microbatches):
    # Σ w·x / Σ w = (1·1 + 3·2 + 0·3 + 0·9) / 4 = 1.75
    batch = linear_batch([1, 2, 3, 9], [1, 3, 0, 0])
    state, metrics = run(batch, microbatches=microbatches)
    assert metrics["train/grad_norm"] == 1.75
    assert state.params["p"] == 0.25
    assert metrics["train/loss"] == 3.5
    assert metrics["train/weight"] == 4
    assert metrics["train/x"] == pytest.approx(15 / (4 * microbatches))
    assert metrics["train/update_norm"] == 1.75
    assert metrics["train/param_norm"] == 0.25


def test_the_clip_comes_after_accumulation_and_the_norm_before_the_clip():
    batch = linear_batch([1, 2, 3, 9], [1, 3, 0, 0])
    state, metrics = run(batch, microbatches=2, max_grad_norm=0.5)
    assert metrics["train/grad_norm"] == 1.75
    assert state.params["p"] == pytest.approx(1.5, rel=1e-6)


def test_microbatches_take_strided_rows():
    batch = linear_batch([1, 2, 3, 4], [1, 1, 1, 1])
    seen = []

    def loss(params, batch, rng):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch["x"], ordered=True)
        return linear(params, batch, rng)

    optimizer = optax.sgd(1.0)
    state = init_state({"p": jnp.float32(2)}, optimizer)
    jax.block_until_ready(make_step(loss, optimizer, microbatches=2)(state, batch))
    jax.effects_barrier()
    assert seen == [[1, 3], [2, 4]]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_what_a_loss_found_of_every_row_comes_back_in_order(microbatches):
    def loss(params, batch, rng):
        return *linear(params, batch, rng), {"squares": batch["x"] ** 2}

    optimizer = optax.sgd(1.0)
    state = init_state({"p": jnp.float32(2)}, optimizer)
    step = make_step(loss, optimizer, microbatches=microbatches)
    _, _, found = step(state, linear_batch([1, 2, 3, 4], [1, 1, 1, 1]))
    np.testing.assert_array_equal(found["squares"], [1, 4, 9, 16])


@pytest.mark.parametrize("microbatches", [2, 4, 8, 16])
def test_any_split_gives_the_gradient_of_the_whole_batch(microbatches):
    def gradient(microbatches):
        optimizer = optax.sgd(1.0)
        state = init_state(model.init(), optimizer)
        step = make_step(model.loss_fn, optimizer, microbatches=microbatches)
        state, metrics = step(state, model.make_batch(1))
        return state.params, metrics

    (params, metrics), (whole, whole_metrics) = gradient(microbatches), gradient(1)
    assert metrics.keys() == whole_metrics.keys()
    for split, expected in ((params, whole), (metrics, whole_metrics)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), split, expected
        )


def test_rows_that_do_not_split_are_a_user_error():
    with pytest.raises(UserError, match="4 rows does not split into 3 microbatches"):
        run(linear_batch([1, 2, 3, 9], [1, 3, 0, 0]), microbatches=3)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "x, w",
    [
        ([1, np.nan, 1, 1], [1, 1, 1, 1]),
        ([1, np.inf, 1, 1], [1, 1, 1, 1]),
        ([1, 3e38, 3e38, 1], [1, 1, 1, 1]),  # finite rows, infinite sum
        ([1, 2, 3, 4], [0, 0, 0, 0]),
    ],
)
def test_what_is_not_finite_or_has_no_weight_changes_nothing(x, w, microbatches):
    optimizer, _ = make_optimizer({"weight_decay": 0.1}, 10)
    state = init_state({"p": jnp.float32(2)}, optimizer, ema=True)
    step = make_step(linear, optimizer, microbatches=microbatches, max_grad_norm=1.0, ema_decay=0.9)
    state, _ = step(state, linear_batch([1, 2, 3, 4], [1, 1, 1, 1]))
    before = bits((state.params, state.opt_state, state.ema_params))
    for skips in (1, 2):
        state, metrics = step(state, linear_batch(x, w))
        assert bits((state.params, state.opt_state, state.ema_params)) == before
        assert (state.step, state.skipped, state.consecutive_skipped) == (skips + 1, skips, skips)
        assert (metrics["train/skipped"], metrics["train/consecutive_skipped"]) == (skips, skips)
        assert metrics["train/update_norm"] == 0
    state, metrics = step(state, linear_batch([1, 2, 3, 4], [1, 1, 1, 1]))
    assert bits(state.params) != before[:1]
    assert (state.step, state.skipped, state.consecutive_skipped) == (4, 2, 0)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped():
    def loss(params, batch, rng):
        total = jnp.sum(jnp.sqrt(params["p"] * batch["x"]))  # infinite slope at 0
        return (total, jnp.float32(1)), {}

    optimizer = optax.sgd(1.0)
    state = init_state({"p": jnp.float32(2)}, optimizer)
    state, metrics = make_step(loss, optimizer)(state, {"x": np.zeros(2, np.float32)})
    assert np.isfinite(metrics["train/loss"])
    assert (state.params["p"], state.skipped) == (2, 1)


@pytest.mark.parametrize("rate", [np.inf, np.nan, 1e30])  # the last one's norm is infinite
def test_an_update_that_is_not_finite_is_skipped(rate):
    rates = jnp.array([1.0, rate, 1.0])
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda i: -rates[i]))
    state = init_state({"p": jnp.float32(2), "q": jnp.float32(1e20)}, optimizer, ema=True)
    step = make_step(linear, optimizer, max_grad_norm=1.0, ema_decay=0.9)
    batch = linear_batch([1, 2], [1, 1])
    state, metrics = step(state, batch)
    # Parameters as large as q are no reason to skip; their own norm is what it is.
    assert state.params["p"] == pytest.approx(1, abs=1e-5) and metrics["train/param_norm"] == np.inf
    before = bits((state.params, state.opt_state, state.ema_params))
    state, metrics = step(state, batch)
    assert bits((state.params, state.opt_state, state.ema_params)) == before
    assert (state.step, state.skipped, state.consecutive_skipped) == (2, 1, 1)
    assert np.isfinite(metrics["train/loss"]) and np.isfinite(metrics["train/grad_norm"])
    assert metrics["train/update_norm"] == 0


def test_the_average_follows_the_parameters():
    state, _ = run(linear_batch([1, 1], [1, 1]), ema_decay=0.75)
    assert state.params["p"] == 1
    assert state.ema_params["p"] == 1.75  # 0.75 · 2 + 0.25 · 1


def test_the_rng_is_a_function_of_seed_and_step_only():
    def loss(params, batch, rng):
        noise = jax.random.uniform(rng)
        return (params["p"] * noise * len(batch["x"]), jnp.float32(len(batch["x"]))), {
            "noise": (noise, jnp.float32(1))
        }

    def noises(seed, microbatches=1):
        optimizer = optax.sgd(1.0)
        state = init_state({"p": jnp.float32(2)}, optimizer)
        step = make_step(loss, optimizer, seed=seed, microbatches=microbatches)
        out = []
        for _ in range(2):
            state, metrics = step(state, {"x": np.zeros(4, np.float32)})
            out.append(float(metrics["train/noise"]))
        return out

    expected = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.key(3), step))) for step in (0, 1)
    ]
    assert noises(3) == expected
    assert noises(3, microbatches=2) == expected
    assert noises(4) != expected


def test_frozen_parameters_stay_bitwise_and_out_of_the_norm():
    params = model.init()
    embedding = params["embed"]["embedding"].at[0, 0].set(-0.0)
    params["embed"]["embedding"] = embedding
    freeze = (r"^embed/", r"mlp/up")
    optimizer, _ = make_optimizer({"weight_decay": 0.1, "freeze": freeze}, 10)
    state = init_state(params, optimizer)
    step = make_step(with_constants(model.loss_fn, freeze), optimizer)
    moments = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert embedding.shape not in moments
    assert params["layers"]["mlp"]["up"]["kernel"].shape not in moments
    rng = jax.random.fold_in(jax.random.key(0), 0)
    batch = model.make_batch(1)
    grads = jax.jit(jax.grad(lambda p: model.loss_fn(p, batch, rng)[0][0]))(params)
    trained = (grads["layers"]["mlp"]["down"], grads["layers"]["mlp_norm"], grads["lm_head"])
    norm = optax.tree.norm(trained) / batch["weights"].sum()

    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, rtol=1e-5)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert bits(state.params["embed"]["embedding"]) == bits(embedding)
    assert bits(state.params["layers"]["mlp"]["up"]) == bits(params["layers"]["mlp"]["up"])
    assert bits(state.params["lm_head"]) != bits(params["lm_head"])


def test_the_state_is_donated_and_the_callers_parameters_live_on():
    optimizer = optax.adam(0.1)
    params = model.init()
    reference = bits(params)
    state = init_state(params, optimizer, ema=True)
    step = make_step(model.loss_fn, optimizer, ema_decay=0.9)
    new, _ = step(state, model.make_batch(1))
    step(new, model.make_batch(2))
    assert state.params["lm_head"]["kernel"].is_deleted()
    assert bits(params) == reference


def test_metric_names_and_a_loss_of_its_own():
    def loss(params, batch, rng):
        return (params["p"] * 6, jnp.float32(2)), {
            "loss": (jnp.float32(5), jnp.float32(2)),
            "rewards/margins": (jnp.float32(3), jnp.float32(4)),
            "empty": (jnp.float32(0), jnp.float32(0)),
        }

    optimizer, schedule = make_optimizer({"learning_rate": 0.5, "schedule": "constant"}, 10)
    state = init_state({"p": jnp.float32(2)}, optimizer)
    _, metrics = make_step(loss, optimizer, schedule=schedule)(state, {"x": np.zeros(2)})
    assert metrics["train/loss"] == 2.5
    assert metrics["rewards/margins"] == 0.75
    assert metrics["train/empty"] == 0
    assert metrics["train/learning_rate"] == 0.5
    assert all(value.shape == () for value in metrics.values())
