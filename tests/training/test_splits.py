"""No split of a batch, into microbatches or over devices, changes a loss, a metric or an update.

Names come from the package's own tables: what is added there is tried here. Rows are very uneven,
and of four parts one has nothing that counts.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.evaluation.rows import response_logprobs
from rlhf_jax.losses import AGGREGATIONS, LOSSES, OBJECTIVES, plackett_luce
from rlhf_jax.losses.cross_entropy import TokenStatistics, cross_entropy
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import defaults, preference, reward
from rlhf_jax.training import on_policy
from rlhf_jax.training.mesh import make_mesh, shard_batch
from rlhf_jax.training.on_policy import Task
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

SPLITS = [(2, 2), (4, 1), (1, 2)]  # microbatches, devices
ROWS, SLOTS, WIDTH = 8, 3, 4
LENGTH, WORDS = 5, 6  # of an answer, and tokens there are
RANDOM = np.random.default_rng(0)
# Of every row, how many of its slots hold something: rows 3 and 7 are one of four parts.
FILLED = np.array([3, 1, 1, 0, 2, 0, 1, 0])
VALID = (np.arange(SLOTS) < FILLED[:, None]).astype(np.float32)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def counts(most, *shape):
    return RANDOM.integers(1, most, shape).astype(np.float32)


def compare(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], tolerance, tolerance, err_msg=name)


def updates(losses, params, batch, microbatches=1, devices=1):
    """What a step of every loss says and leaves, {name: {metric or parameter: value}}."""
    mesh = make_mesh({"data": devices}, jax.devices()[:devices]) if devices > 1 else None
    options = {"mesh": mesh, "rules": ((r".*", jax.P()),), "microbatches": microbatches}
    optimizer = optax.sgd(0.1)

    def each(batch):
        said = {}
        for name, loss in losses.items():
            step = make_step(loss, optimizer, max_grad_norm=1.0, **options)
            state, metrics, *found = step(init_state(params, optimizer), batch)
            said[name] = dict(metrics), state.params, found
        return said

    said = jax.device_get(jax.jit(each)(shard_batch(mesh, batch)))
    for name, results in said.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(results)
        said[name] = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return said


# Preference and reward losses, of log-probs and scores that are linear in features.

REPLIES = {
    "features": normal(ROWS, SLOTS, 3, WIDTH),
    "reference_logprobs": -6 + normal(ROWS, SLOTS, 3),
    "lengths": counts(9, ROWS, SLOTS, 3),
    "valid": VALID,
    "labels": RANDOM.integers(0, 2, (ROWS, SLOTS, 1)).astype(np.float32),
}
PARAMS = {"w": normal(WIDTH), "b": np.float32(-5.6)}


def linear(shape, params, batch):
    return batch["features"] @ params["w"] + params["b"]


def preference_losses():
    def loss(name, unpaired, params, batch, rng):
        options = {"name": name, "beta": 0.5, "options": "", "sft_coefficient": 0.3}
        config = defaults.base("preference", loss=options)
        batch = dict(batch)
        if unpaired:
            for field in ("features", "reference_logprobs", "lengths"):
                batch[field] = batch[field][:, :, :2]
        else:
            del batch["labels"]
        return preference.loss(config, None, params, batch, rng)

    losses = {name: functools.partial(loss, name, False) for name in LOSSES}
    return losses | {"kto of labels": functools.partial(loss, "kto", True)}


def reward_losses():
    def loss(name, params, batch, rng):
        centering = 0.1 if name == "bradley_terry" else 0.0
        config = defaults.base("reward", loss={"name": name, "centering": centering})
        return reward.loss(config, None, params, batch, rng)

    def ranking(params, batch, rng):
        scores = linear(None, params, batch).reshape(-1, 3)
        return plackett_luce(scores, batch["valid"].reshape(-1))

    losses = {name: functools.partial(loss, name) for name in reward.LOSSES}
    return losses | {"plackett_luce": ranking}


# Language-model, policy and value losses, of logits that are linear in hidden states.

TOKENS = SLOTS * LENGTH
MASK = (np.arange(LENGTH) < counts(LENGTH + 1, ROWS, SLOTS, 1)) * VALID[..., None]
ANSWERS = {
    "hidden": normal(ROWS, TOKENS, WIDTH),
    "targets": RANDOM.integers(0, WORDS, (ROWS, TOKENS)).astype(np.int32),
    "weights": MASK.reshape(ROWS, -1),
    "members": np.where(VALID > 0, 0, -1).astype(np.int32),
    "slots": np.tile(np.arange(TOKENS).reshape(SLOTS, LENGTH), (ROWS, 1, 1)),
    "mask": MASK,
    "old_logprobs": -1.8 + 0.5 * normal(ROWS, SLOTS, LENGTH),
    "ref_logprobs": -1.8 + 0.5 * normal(ROWS, SLOTS, LENGTH),
    "behaviour_logprobs": -1.8 + 0.5 * normal(ROWS, SLOTS, LENGTH),
    "advantages": normal(ROWS, SLOTS, LENGTH),
    "returns": normal(ROWS, SLOTS, LENGTH),
    "old_values": normal(ROWS, SLOTS, LENGTH),
    "sequence_weights": VALID * counts(4, ROWS, SLOTS),
    "kl_coefficient": np.full(ROWS, 0.1, np.float32),
    "ptx/hidden": normal(ROWS, TOKENS, WIDTH),
    "ptx/targets": RANDOM.integers(0, WORDS, (ROWS, TOKENS)).astype(np.int32),
    "ptx/weights": (np.arange(TOKENS) < TOKENS - 2 * np.arange(ROWS)[:, None]).astype(np.float32),
}
LAYER = {"w": normal(WIDTH, WORDS), "v": normal(WIDTH)}


def statistics(params, batch):
    logits = batch["hidden"] @ params["w"]
    every = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(every, batch["targets"][..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(every) * every, -1)
    return TokenStatistics(chosen, jax.nn.logsumexp(logits, -1), logits.mean(-1), entropy, chosen)


def texts(params, batch):
    rows = (batch[f"ptx/{name}"] for name in ("hidden", "targets", "weights"))
    hidden, targets, weights = rows
    loss, _ = cross_entropy(hidden, params["w"], targets, weights, layout="dv")
    return loss, {"loss/ptx": loss}


def values(params, batch):
    return batch["hidden"] @ params["v"], jnp.zeros(batch["members"].shape)


def language_losses():
    def loss(options, params, batch, rng):
        arrays = batch["hidden"], params["w"], batch["targets"], batch["weights"]
        return cross_entropy(*arrays, layout="dv", **options)

    plain, all_options = {}, {"label_smoothing": 0.1, "z_loss": 0.01}
    return {str(o): functools.partial(loss, o) for o in (plain, all_options)}


def policy_losses():
    def loss(changes, mixed, scored, params, batch, rng):
        config = defaults.on_policy(
            "grpo",
            loss={"entropy_coefficient": 0.1, "ptx_coefficient": 0.5, "options": ""} | changes,
            kl={"placement": "loss", "estimator": "k3", "level": "token"},
        )
        task = Task(None, statistics, extra_loss=texts if mixed else None)
        if not scored:
            batch = {name: x for name, x in batch.items() if name != "old_logprobs"}
        return on_policy._policy_loss(config, task, params, batch, rng)

    def losses():
        for name, mode in zip(OBJECTIVES, itertools.cycle(AGGREGATIONS), strict=False):
            yield name, {"name": name, "aggregation": mode}, False, True
        for mode in AGGREGATIONS:
            how = {"name": "ppo", "aggregation": mode, "importance": "token"}
            yield f"ppo, {mode}, texts", how, True, True
        yield "own log-probs, texts", {"name": "ppo"}, True, False

    return {name: functools.partial(loss, *how) for name, *how in losses()}


def value_losses():
    def loss(clip, params, batch, rng):
        config = defaults.on_policy("ppo")
        config.critic.value_clip = clip
        return on_policy._value_loss(config, Task(None, None, values), params, batch, rng)

    return {f"clip {clip}": functools.partial(loss, clip) for clip in (0.0, 0.2)}


KINDS = {
    "preference": (preference_losses(), PARAMS, REPLIES),
    "reward": (reward_losses(), PARAMS, REPLIES),
    "language": (language_losses(), LAYER, ANSWERS),
    "policy": (policy_losses(), LAYER, ANSWERS),
    "value": (value_losses(), LAYER, ANSWERS),
}


@pytest.fixture
def linear_models(monkeypatch):
    monkeypatch.setattr(preference, "sequence_logprobs", linear)
    monkeypatch.setattr(reward, "sequence_scores", linear)


@functools.cache
def unsplit(kind):
    return updates(*KINDS[kind])


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_split_changes_a_loss_a_metric_or_an_update(kind, split, linear_models):
    whole, parts = unsplit(kind), updates(*KINDS[kind], *split)
    assert whole.keys() == parts.keys()
    failed = []
    for name in whole:
        try:
            compare(parts[name], whole[name])
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
