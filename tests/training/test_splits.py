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
from rlhf_jax.evaluation.row_passes import response_logprobs
from rlhf_jax.losses.cross_entropy import TokenStatistics, Words, cross_entropy
from rlhf_jax.losses.policy import AGGREGATIONS, OBJECTIVES
from rlhf_jax.losses.preference import LOSSES
from rlhf_jax.losses.reductions import weighted_sum
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rl import on_policy
from rlhf_jax.rl.on_policy import Task
from rlhf_jax.stages import defaults, preference, reward
from rlhf_jax.training.mesh import make_mesh, shard_batch
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import Coupled, make_step

# Microbatches and devices: both at once, and in the slow tests each by itself.
SPLITS = [(2, 2), *(pytest.param(split, marks=pytest.mark.slow) for split in ((4, 1), (1, 2)))]
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
}
LABELLED = {name: x if name == "valid" else x[:, :, :2] for name, x in REPLIES.items()}
LABELLED["labels"] = RANDOM.integers(0, 2, (ROWS, SLOTS, 1)).astype(np.float32)
PARAMS = {"w": normal(WIDTH), "b": np.float32(-5.6)}


def linear(shape, params, batch):
    return batch["features"] @ params["w"] + params["b"]


def preference_losses(names):
    def loss(name, params, batch, rng):
        options = {"name": name, "beta": 0.5, "sft_coefficient": 0.3}
        config = defaults.resolve(defaults.base("preference", loss=options))
        return preference.loss(config, None, params, batch, rng)

    return {name: functools.partial(loss, name) for name in names}


def reward_losses():
    def loss(name, params, batch, rng):
        centering = 0.1 if name == "bradley_terry" else 0.0
        loss = {"name": name, "centering": centering}
        config = defaults.resolve(defaults.base("reward", loss=loss))
        return reward.loss(config, None, params, batch, rng)

    return {name: functools.partial(loss, name) for name in defaults.REWARD_LOSSES}


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
    loss, _ = cross_entropy(hidden, params["w"], targets, weights, words=Words("dv"))
    return loss, {"loss/ptx": loss}


def values(params, batch):
    return batch["hidden"] @ params["v"], jnp.zeros(batch["members"].shape)


def language_losses():
    def loss(options, params, batch, rng):
        arrays = batch["hidden"], params["w"], batch["targets"], batch["weights"]
        return cross_entropy(*arrays, words=Words("dv"), **options)

    plain, all_options = {}, {"label_smoothing": 0.1, "z_loss": 0.01}
    return {str(o): functools.partial(loss, o) for o in (plain, all_options)}


def policy_losses():
    def loss(changes, mixed, scored, params, batch, rng):
        config = defaults.on_policy(
            "grpo",
            loss={"entropy_coefficient": 0.1, "ptx_coefficient": 0.5} | changes,
            kl={"placement": "loss", "estimator": "k3", "level": "token"},
        )
        task = Task(None, statistics, extra_loss=texts if mixed else None)
        config = defaults.resolve(config)
        objective = config.loss.objective
        if not scored:
            batch = {name: x for name, x in batch.items() if name != "old_logprobs"}
        return on_policy.policy_loss(config, task, objective, params, batch, rng)

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
        config = defaults.resolve(config)
        return on_policy.value_loss(config, Task(None, None, values), params, batch, rng)

    return {f"clip {clip}": functools.partial(loss, clip) for clip in (0.0, 0.2)}


KINDS = {
    "preference": (preference_losses(LOSSES), PARAMS, REPLIES),
    "labels": (preference_losses(["kto"]), PARAMS, LABELLED),
    "reward": (reward_losses(), PARAMS, REPLIES | {"labels": LABELLED["labels"]}),
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


SHAPE = ModelConfig(
    vocab_size=32, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=32, max_length=64
).validate()


@pytest.fixture(scope="module")
def replies():
    """Packed (chosen, rejected, another prompt's) replies to eight prompts, and log-probs of them.

    The policy is apart from its reference and, by chance, nearer to the replies.
    """
    policy = transformer.init(SHAPE, jax.random.key(0))
    apart = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), policy
    )
    random = np.random.default_rng(0)

    def text(length):
        return random.integers(3, 32, length).tolist()

    chosen = [text(random.integers(2, 14)) for _ in range(8)]
    groups = [Group(text(5), (chosen[i], text(6), chosen[(i + 1) % 8]), i) for i in range(8)]
    rows, _ = pack_groups(groups, 48, branches=3, most=1)
    rows["reference_logprobs"] = response_logprobs(SHAPE, apart, rows, 8)
    return policy, rows, response_logprobs(SHAPE, policy, rows, 8)


@pytest.mark.parametrize("microbatches", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_ktos_reference_point_is_that_of_the_whole_batch(microbatches, replies):
    policy, rows, logprobs = replies
    ratios = (logprobs - rows["reference_logprobs"]).reshape(-1, 3)[rows["valid"].ravel() > 0]
    point = max(0, ratios[:, 2].mean())
    gains = 0.1 * np.stack([point - ratios[:, 0], ratios[:, 1] - point])
    by_hand = (1 / (1 + np.exp(-gains))).sum(0).mean()
    np.testing.assert_allclose([point, by_hand], [9.459253, 0.978184], atol=1e-5)

    options = {"name": "kto", "beta": 0.1, "sft_coefficient": 0.0}
    config = defaults.resolve(defaults.base("preference", loss=options))
    optimizer = optax.sgd(1.0)
    loss = functools.partial(preference.loss, config, SHAPE)
    step = make_step(loss, optimizer, microbatches=microbatches)
    _, metrics = step(init_state(policy, optimizer), jax.tree.map(jnp.asarray, rows))
    np.testing.assert_allclose(metrics["train/loss"], by_hand, atol=1e-5)
    np.testing.assert_allclose(metrics["train/grad_norm"], 0.174416, atol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_texts_are_mixed_in_by_their_mean_over_the_whole_batch(microbatches):
    """Policy: (1·2 + 3·6) / 4 = 5. Texts: (5·1 + 1·7) / 6 = 2, half of it: 6."""

    def loss(params, batch, rng):
        policy = weighted_sum(batch["x"] * params["p"], batch["w"])
        extra = weighted_sum(batch["text"] * params["p"], batch["words"])
        parts = jax.tree.map(lambda x: x[None], (policy, extra))
        sums, metrics = mix(parts, batch)
        return Coupled(sums, parts, mix), metrics

    config = defaults.resolve(defaults.on_policy("ppo", loss={"ptx_coefficient": 0.5}))
    mix = functools.partial(on_policy._mixed, config)
    batch = {"x": [2, 9, 6, 9], "w": [1, 0, 3, 0], "text": [1, 9, 9, 7], "words": [5, 0, 0, 1]}
    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, microbatches=microbatches)
    arrays = {name: jnp.array(x, jnp.float32) for name, x in batch.items()}
    state, metrics = step(init_state({"p": jnp.float32(1)}, optimizer), arrays)
    assert (metrics["train/loss"], metrics["train/grad_norm"], state.params["p"]) == (6, 6, -5)
    assert metrics["train/weight"] == 4


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_largest_least_and_counts_of_parts_are_those_of_the_batch(microbatches):
    def loss(params, batch, rng):
        x, counts = batch["x"], batch["w"] > 0
        some = jnp.any(counts)
        return (params["p"] * jnp.sum(batch["w"]), jnp.sum(batch["w"])), {
            "a/max": (jnp.max(jnp.where(counts, x, -jnp.inf), initial=-9), some),
            "a/x_max": (jnp.max(x), 1),
            "a/min": (jnp.min(jnp.where(counts, x, jnp.inf), initial=9), some),
            "pairs/tied": (jnp.sum(counts), 1),
            "a/mean": (jnp.sum(x), len(x)),
        }

    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer, microbatches=microbatches)
    x, w = jnp.array([-1.0, 7, -3, -2]), jnp.array([1.0, 0, 2, 1])
    _, metrics = step(init_state({"p": jnp.float32(2)}, optimizer), {"x": x, "w": w})
    expected = {"a/max": -1, "a/x_max": 7, "a/min": -3, "pairs/tied": 3, "a/mean": 0.25}
    assert {name: metrics[name] for name in expected} == expected
